"""Runs, data, caches and models in buckets, served by emulators that are started here."""

import http.server
import importlib.util
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import child
from test_loop import first_stage, make_config, metrics, pictures  # noqa: F401

from ldm_jax.data import make_source
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import CheckpointError, StorageError
from ldm_jax.io import paths
from ldm_jax.io.atomic import atomic_path, write_atomic
from ldm_jax.io.checkpoint import TrainingCheckpoints, find_model, load_model, save_model
from ldm_jax.io.mirror import Mirror
from ldm_jax.io.paths import as_path, check_writable, listing, local_copy, upload
from ldm_jax.io.resources import resource_errors
from ldm_jax.sampling.pipeline import load
from ldm_jax.train import encode as encoding
from ldm_jax.train import loop
from ldm_jax.train.encode import encode
from ldm_jax.train.loop import train

EMULATOR = str(Path(__file__).parent.parent / "gcs_emulator.py")
NEEDED = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto", "boto3", "flask")}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def settings_of(url: str) -> dict[str, str]:
    """Environment variables that lead all clients to an endpoint."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "test",
        "NO_GCE_CHECK": "true",
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, tmp_path_factory) -> Iterator[str]:
    """The address of an empty bucket of an emulator."""
    scheme = request.param
    for package in NEEDED[scheme]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{scheme}:// is tested where {package} is installed")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    commands = {"gs": [EMULATOR, str(port)], "s3": ["-m", "moto.server", "-p", str(port)]}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, *commands[scheme]], **quiet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.CACHE_VARIABLE, str(tmp_path_factory.mktemp("copies")))
        for name, value in settings_of(url).items():
            patch.setenv(name, value)
        for _ in range(600):
            try:
                with socket.create_connection(("127.0.0.1", port)):
                    break
            except OSError:
                assert server.poll() is None
                time.sleep(0.05)
        if scheme == "s3":
            urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
        yield f"{scheme}://bucket"
        server.kill()
        server.wait()


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as a storage does to an account without rights."""

    protocol_version = "HTTP/1.1"  # answers "Expect: 100-continue", for which s3fs waits

    def answer(self) -> None:
        body = b'{"error": {"code": 403, "message": "no access to the object"}}'
        if "AWS4-HMAC-SHA256" in self.headers.get("Authorization", ""):
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["gs", "s3"])
def closed(request) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a bucket without rights, and the environment of its endpoint."""
    for package in NEEDED[request.param][:1]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{request.param}:// is tested where {package} is installed")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield f"{request.param}://closed", settings_of(url)
        server.shutdown()


@pytest.mark.processes
def test_a_bucket_without_rights_is_one_line(closed, pictures, first_stage, tmp_path):  # noqa: F811
    address, environment = closed
    config = make_config("diffusion", str(pictures), str(first_stage))
    flags = [f"--config={write(config, tmp_path)}", f"--workdir={address}/run"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        trained = child("train.py", *flags)
        read = child("train.py", *flags, f"--config.data.path={address}/data.zip", "--dry_run")
        _, refused = trained.communicate(timeout=200)
        checked, rest = read.communicate(timeout=200)
    assert trained.returncode == 2, refused
    lines = [line for line in refused.splitlines() if not line.startswith(("E1", "E0"))]
    assert lines == [f"train.py: {address}/run refuses to read or write: {ADVICE}"], refused
    assert read.returncode == 1, rest
    assert "Traceback" not in rest
    found = {line.split()[0]: line for line in checked.splitlines()}
    assert "refuses" in found["config"], checked
    assert "refuses to write" in found["storage"], checked


ADVICE = "give these credentials the role for it, or use others"


def test_files_and_folders(bucket, tmp_path):
    write_atomic(f"{bucket}/one/a.txt", "hello")
    with atomic_path(f"{bucket}/one/tree") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "b").write_bytes(b"12")
        (temporary / "c").write_bytes(b"3")
    assert {name: info["size"] for name, info in listing(f"{bucket}/one").items()} == {
        "a.txt": 5,
        "tree/inner/b": 2,
        "tree/c": 1,
    }
    assert as_path(Path(f"{bucket}/one/a.txt")).read_text() == "hello"  # Path joins the slashes
    with pytest.raises(ValueError, match="broken"), atomic_path(f"{bucket}/one/not"):
        raise ValueError("broken")
    assert not paths.exists(f"{bucket}/one/not")
    assert paths.matches(f"{bucket}/one/*.txt") == [f"{bucket}/one/a.txt"]
    paths.move_tree(as_path(f"{bucket}/one/tree"), as_path(f"{bucket}/two"))
    assert sorted(listing(f"{bucket}/two")) == ["c", "inner/b"]
    assert not paths.exists(f"{bucket}/one/tree")
    with pytest.raises(FileNotFoundError) as error:
        paths.read_bytes(f"{bucket}/nothing")
    assert error.value.filename == f"{bucket}/nothing"


def test_copies_follow_the_bucket(bucket, caplog):
    caplog.set_level(logging.INFO, "ldm_jax")
    for name in ("x", "y"):
        write_atomic(f"{bucket}/copied/{name}", name)
    folder = local_copy(f"{bucket}/copied")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"x": "x", "y": "y"}
    assert local_copy(f"{bucket}/copied") == folder
    assert sum("copying" in line for line in caplog.messages) == 1
    write_atomic(f"{bucket}/copied/x", "z")
    as_path(f"{bucket}/copied/y").unlink()
    assert {file.name: file.read_text() for file in local_copy(folder_of(bucket)).iterdir()} == {
        "x": "z"
    }


def folder_of(bucket: str) -> str:
    return f"{bucket}/copied/"


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    missing = bucket.replace("bucket", "nosuch")
    with pytest.raises(StorageError, match=r"^..://nosuch/run is in a bucket that does not exist"):
        check_writable(f"{missing}/run")
    with pytest.raises(StorageError, match="is in a bucket that does not exist"):
        paths.read_bytes(f"{missing}/a.json")
    with pytest.raises(StorageError, match="does not exist"):
        find_model(f"{missing}/model")
    check_writable(f"{bucket}/run")
    assert not paths.exists(f"{bucket}/run")


def test_a_mirror_uploads_what_has_grown(bucket):
    mirror = Mirror(as_path(f"{bucket}/log"))
    (mirror.local / "a.txt").write_text("1")
    mirror.push()
    (mirror.local / "a.txt").write_text("12")
    mirror.close()
    assert not mirror.local.exists()
    assert as_path(f"{bucket}/log/a.txt").read_text() == "12"
    again = Mirror(as_path(f"{bucket}/log"))
    assert again.fetch("a.txt").read_text() == "12"
    assert not again.fetch("new").exists()
    again.close()


def test_checkpoints_and_models(bucket):
    state = {"a": jax.numpy.arange(6.0), "b": {"c": jax.numpy.ones((2, 3))}}
    checkpoints = TrainingCheckpoints(f"{bucket}/ck", keep=2)
    for step in range(4):
        checkpoints.save(step, jax.tree.map(lambda a, n=step: a + n, state), {"step": step})
    assert checkpoints.latest() == 3
    checkpoints.close()
    assert TrainingCheckpoints.steps_in(f"{bucket}/ck") == [2, 3]
    resumed = TrainingCheckpoints(f"{bucket}/ck", keep=2, restore_step=2)
    assert resumed.latest() == 2
    restored, info = resumed.restore(2, state)
    resumed.close()
    assert info == {"step": 2}
    np.testing.assert_array_equal(restored["a"], np.arange(6.0) + 2)
    assert paths.exists(f"{bucket}/ck/checkpoints_after_2/3")

    config, params = {"kind": "none"}, jax.tree.map(np.asarray, state)
    save_model(f"{bucket}/model", config, params)
    with pytest.raises(CheckpointError, match="is not empty"):
        save_model(f"{bucket}/model", config, params)
    for path in (f"{bucket}/model", find_model(f"{bucket}/model")):
        found, arrays = load_model(path)
        assert found["kind"] == "none"
        np.testing.assert_array_equal(arrays["b"]["c"], params["b"]["c"])


def test_sources(bucket, pictures, tmp_path):  # noqa: F811
    expected = make_source({"path": str(pictures)})
    shutil.make_archive(str(tmp_path / "all"), "zip", pictures)
    shutil.make_archive(str(tmp_path / "part"), "tar", pictures)
    upload(pictures, as_path(f"{bucket}/folder"))
    upload(tmp_path, as_path(f"{bucket}/archives"))
    for name in ("folder", "archives/all.zip", "archives/part.tar"):
        found = make_source({"path": f"{bucket}/{name}"})
        assert list(found.rows) == list(expected.rows)
        assert found[3]["image"] == expected[3]["image"]
    found = make_source(
        {"path": f"{bucket}/folder/metadata.jsonl", "source": "table", "where": {"text": ["3"]}}
    )
    assert [row["file_name"] for row in found.rows] == ["03.png", "13.png"]
    assert found[1]["image"] == (pictures / "13.png").read_bytes()
    found = make_source({"path": f"{bucket}/archives/part*.tar", "source": "webdataset"})
    assert len(found) == 20


def test_errors_of_orbax_are_one_line(bucket):
    folder = as_path(f"{bucket.replace('bucket', 'nosuch')}/run")
    with pytest.raises(StorageError, match="does not exist"), resource_errors("", folder):
        save_model(folder, {}, {"a": np.ones(3)})


@pytest.fixture
def run(bucket, pictures, first_stage):  # noqa: F811
    """A run of eight steps whose data and first stage are in the bucket."""
    for local, name in ((pictures, "pictures"), (first_stage, "first_stage")):
        if not paths.exists(f"{bucket}/{name}"):
            upload(local, as_path(f"{bucket}/{name}"))
    config = make_config("diffusion", f"{bucket}/pictures", f"{bucket}/first_stage")
    config.update(steps=8, save_every=2, eval_every=8, preview_every=8)
    config.optim.lr = 1e-4  # near zero, rounding decides the sign of Adam's steps
    return config


@pytest.mark.processes
def test_a_run_in_a_bucket_is_killed_and_resumed_by_other_processes(
    bucket, run, tmp_path, monkeypatch, no_preview
):
    monkeypatch.setattr(encoding, "BATCH", 8)
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
    run.data.cache = f"{bucket}/cache"
    encode(run, run.data.cache, shard_size=8)
    file = write(run, tmp_path)
    workdir = f"{bucket}/run"
    processes = together(file, workdir)
    while all(p.poll() is None for p in processes) and max(steps(workdir), default=0) < 4:
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    outputs = [process.communicate()[1] for process in processes]
    assert 4 <= max(steps(workdir)) < 8, "\n".join(outputs)

    model = train(run, workdir)
    run.data.cache = str(encode(run, tmp_path / "cache", shard_size=8))
    on_disk = train(run, tmp_path / "run")
    (_, found), (_, expected) = load_model(model), load_model(on_disk)
    for path, leaf in jax.tree.leaves_with_path(expected):
        ours = dict(jax.tree.leaves_with_path(found))[path]
        np.testing.assert_allclose(ours, leaf, atol=1e-5, err_msg=str(path))

    lines = as_path(f"{workdir}/metrics.jsonl").read_text().splitlines()
    there = [(m["step"], m["part"]) for m in map(json.loads, lines)]
    assert there == [(m["step"], m["part"]) for m in metrics(tmp_path / "run")]
    names = set(listing(workdir))
    assert {"config.json", "report.html", "previews/0000008.png", "model/config.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    sampled = [load(path, devices=1)(prompts=["1"], seeds=[3]) for path in (model, on_disk)]
    assert np.abs(np.subtract(*sampled, dtype=int)).max() <= 1


def steps(workdir: str) -> list[int]:
    return TrainingCheckpoints.steps_in(workdir)


def write(config, folder: Path) -> Path:
    """Writes the config as a Python file."""
    file = folder / "config.py"
    file.write_text(
        "import json\n\nimport ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({config.to_json()!r}))\n"
    )
    return file


def together(file: Path, workdir: str) -> list[subprocess.Popen[str]]:
    """Two processes of one device each."""
    flags = [f"--config={file}", f"--workdir={workdir}"]
    flags += [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    return [child("train.py", *flags, f"--process_index={i}") for i in range(2)]
