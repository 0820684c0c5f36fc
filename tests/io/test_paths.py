"""Paths of this machine, and what is refused before a bucket is reached."""

import errno
import importlib.util
import os
from pathlib import Path

import pytest

from ldm_jax.errors import StorageError
from ldm_jax.io import paths
from ldm_jax.io.mirror import Mirror
from ldm_jax.io.paths import (
    absolute_path,
    as_path,
    check_writable,
    is_bucket,
    local_copy,
    local_only,
    matches,
    storage_problem,
)

pytestmark = pytest.mark.fast


def test_local_paths_are_plain_paths(tmp_path):
    assert as_path("a/b") == Path("a/b")
    assert absolute_path("a/b") == Path("a/b").absolute()
    assert local_copy(tmp_path) == tmp_path
    (tmp_path / "x-1.tar").write_bytes(b"")
    (tmp_path / "x-2.tar").mkdir()
    assert matches(tmp_path / "x-*.tar") == [str(tmp_path / "x-1.tar")]
    assert local_only(tmp_path, "an array") == tmp_path


@pytest.mark.parametrize("text", ["gs://b/c", "s3://b/c", "GS://b", "gcs://b/c", Path("gs://b/c")])
def test_buckets_are_recognised(text):
    assert is_bucket(text)


@pytest.mark.parametrize("text", ["b/gs://c", "gs", "/gs://b", "s3.txt", "C:/x", "s3:x"])
def test_other_names_are_local(text):
    assert not is_bucket(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://host/a.zip", "paths of https:// cannot be used: give one of this machine"),
        ("hdfs://host/a", "paths of hdfs:// cannot be used"),
        ("gs://", "gs:// names no bucket: write gs://BUCKET/..."),
    ],
)
def test_other_urls_are_refused_by_name(text, message):
    with pytest.raises(StorageError, match=message.replace("//", ".?//")):
        as_path(text)


def test_a_missing_package_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "s3fs" else find(name)
    )
    with pytest.raises(StorageError, match=r"s3:// needs s3fs: pip install 'ldm_jax\[storage\]'$"):
        as_path("s3://bucket/run")


def test_outputs_that_grow_are_not_for_buckets():
    with pytest.raises(StorageError, match=r"^gs://b/o: an array cannot be written to a bucket"):
        local_only("gs://b/o", "an array")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    check_writable(tmp_path / "new" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "run")
    if os.geteuid():  # the superuser may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(StorageError, match="closed is read-only"):
            check_writable(tmp_path / "closed" / "run")


class NoCredentialsError(Exception):
    """Named as botocore's."""


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (PermissionError("Access Denied"), "rights"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), None),
        (OSError("Forbidden: b/x\nno access"), "rights"),
        (ValueError("PERMISSION_DENIED: x [http_response_code='403'] [y='z']"), "rights"),
        (FileNotFoundError("The specified bucket does not exist"), "bucket"),
        (FileNotFoundError("b/bucket/o/x"), "missing"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a"), None),
        (NoCredentialsError("Unable to locate credentials"), "credentials"),
        (ValueError("other"), None),
        (None, None),
    ],
)
def test_what_a_storage_refuses_is_recognised(error, problem):
    assert storage_problem(error) == problem


def test_a_cause_is_recognised():
    outer = RuntimeError("save failed")
    outer.__cause__ = PermissionError("Access Denied")
    assert storage_problem(outer) == "rights"


def test_a_mirror_of_a_local_folder_is_the_folder(tmp_path):
    mirror = Mirror(tmp_path)
    assert mirror.local == tmp_path
    (tmp_path / "metrics.jsonl").write_text("1\n")
    assert mirror.fetch("metrics.jsonl").read_text() == "1\n"
    mirror.close()
    assert (tmp_path / "metrics.jsonl").exists()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path))
    assert paths.cache_folder() == tmp_path
