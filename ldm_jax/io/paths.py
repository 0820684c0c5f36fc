"""Paths on this machine and in buckets (``gs://``, ``s3://``): the one place that tells them apart.

Local paths are `pathlib.Path`, those of a bucket `etils.epath.Path`, which has the same methods and
works through gcsfs and s3fs. Credentials are found by these packages, as their documentation
says. A bucket has no folders: a name that ends before a "/" of another name counts as one.
"""

import contextlib
import errno
import glob
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from ldm_jax.errors import StorageError

_LOG = logging.getLogger(__name__)

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> what reads and writes it
CACHE_VARIABLE = "LDM_JAX_STORAGE_CACHE"
# `Path("gs://a/b")` reads "gs:/a/b"; it is understood, too.
_BUCKET = re.compile(r"(gs|gcs|s3):/+(.*)", re.IGNORECASE | re.DOTALL)
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)

AnyPath = str | os.PathLike[str]


# ------------------------------------------------------------------------------ what a path is


def is_bucket(path: AnyPath) -> bool:
    """Whether a path is in a bucket."""
    return _BUCKET.fullmatch(os.fspath(path)) is not None


def as_path(path: AnyPath) -> Path:
    """Returns a path as an object with the methods of `pathlib.Path`.

    Raises:
      StorageError: It is a URL of another kind, names no bucket, or its package is not installed.
    """
    text = os.fspath(path)
    if (found := _BUCKET.fullmatch(text)) is None:
        if (url := _URL.match(text)) and not os.path.exists(text):
            raise StorageError(
                f"{text}: paths of {url[1]}:// cannot be used: give one of this machine, of "
                "gs://BUCKET/... or of s3://BUCKET/..."
            )
        return Path(text)
    scheme, name = found[1].lower().replace("gcs", "gs"), found[2].rstrip("/")
    if not name:
        raise StorageError(f"{text} names no bucket: write {scheme}://BUCKET/...")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise StorageError(
            f"{text}: {scheme}:// needs {PACKAGES[scheme]}: pip install 'ldm_jax[storage]'"
        )
    _configure()
    from etils import epath

    return cast(Path, epath.Path(f"{scheme}://{name}"))


def absolute_path(path: AnyPath) -> Path:
    """Returns `as_path` of a path, made absolute where it is on this machine."""
    return as_path(path) if is_bucket(path) else as_path(path).absolute()


def parent_of(path: AnyPath) -> str:
    """Returns the folder that holds a path."""
    return os.fspath(absolute_path(path).parent)


def local_only(path: AnyPath, what: str) -> Path:
    """Returns a path on this machine; StorageError for ``what`` cannot be written to a bucket."""
    if is_bucket(path):
        raise StorageError(
            f"{path}: {what} cannot be written to a bucket: give a path of this machine and copy "
            "it from there"
        )
    return as_path(path)


def _configure() -> None:
    """Sets up epath and fsspec for buckets that other processes write to as well."""
    # TensorFlow's file systems would be taken where it is installed; it has none for s3://.
    os.environ.setdefault("EPATH_USE_TF", "false")
    from fsspec.config import conf

    for name in (*PACKAGES, "gcs"):  # a cached listing does not show what others write
        conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    # gcsfs prints the traceback of every error that it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def file_system(path: AnyPath) -> Any:
    """Returns the fsspec file system of a bucket."""
    from etils.epath.backend import fsspec_backend

    return fsspec_backend.fs(os.fspath(as_path(path)))


# ------------------------------------------------------------------------------------ contents


def read_bytes(path: AnyPath) -> bytes:
    """Reads a file; OSError where that fails."""
    with bucket_errors(path):
        return as_path(path).read_bytes()


def exists(path: AnyPath) -> bool:
    """Whether there is a file or folder."""
    with bucket_errors(path):
        return as_path(path).exists()


def is_folder(path: AnyPath) -> bool:
    """Whether there is a folder."""
    with bucket_errors(path):
        return as_path(path).is_dir()


def matches(pattern: AnyPath) -> list[str]:
    """Returns the files that a pattern such as "data/train-*.tar" means, sorted."""
    if not is_bucket(pattern):
        return sorted(name for name in glob.glob(os.fspath(pattern)) if os.path.isfile(name))
    where = os.fspath(as_path(pattern))
    with bucket_errors(pattern):
        found: dict[str, Any] = file_system(pattern).glob(where, detail=True)
    scheme = where.split("://", 1)[0]
    return sorted(f"{scheme}://{name}" for name, info in found.items() if info["type"] == "file")


def listing(path: AnyPath) -> dict[str, dict[str, Any]]:
    """Lists a folder of a bucket, or a single object.

    Returns:
      The objects under ``path``: name relative to it, "" for itself -> {"size": bytes, "version": a
      text that changes with the object}.
    """
    where = os.fspath(as_path(path))
    with bucket_errors(path):
        found = file_system(path).find(where, detail=True)
    prefix = where.split("://", 1)[1]
    objects = {}
    for name, info in found.items():
        inner = name.removeprefix(prefix).lstrip("/")
        if name.endswith("/") or info.get("type") == "directory":  # the mark of an empty folder
            continue
        versions = (info.get(key) for key in ("generation", "etag", "ETag", "LastModified"))
        version = next((str(v) for v in versions if v), "")
        objects[inner] = {"size": info["size"], "version": f"{info['size']} {version}"}
    return objects


def size_of(folder: Path) -> int:
    """Returns the bytes of the files in a folder."""
    if is_bucket(folder):
        return sum(info["size"] for info in listing(folder).values())
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove_tree(path: Path) -> None:
    """Removes a folder with its contents, if it is there."""
    if not is_bucket(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        file_system(path).rm(os.fspath(path), recursive=True)


def move_tree(path: Path, target: Path) -> None:
    """Moves a folder to another name; in a bucket its objects are copied, then removed."""
    if not is_bucket(path):
        os.replace(path, target)
        return
    files = file_system(path)
    for name in listing(path):
        files.cp_file(f"{path}/{name}", f"{target}/{name}")
    remove_tree(path)


def upload(local: Path, path: Path) -> None:
    """Copies a file or folder of this machine to a bucket; each object appears when it is whole."""
    files = file_system(path)
    with bucket_errors(path):
        if local.is_file():
            files.put_file(os.fspath(local), os.fspath(path))
            return
        inside = (file for file in local.rglob("*") if file.is_file())
        # The files of the folder itself describe what is in it: they come last.
        for file in sorted(inside, key=lambda file: (-len(file.parts), file)):
            name = file.relative_to(local).as_posix()
            files.put_file(os.fspath(file), f"{path}/{name}")


# ------------------------------------------------------------------------- copies on this machine


def cache_folder() -> Path:
    """Returns the folder of the copies, $LDM_JAX_STORAGE_CACHE or one in the home folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "ldm_jax" / "storage"


def local_copy(path: AnyPath) -> Path:
    """Returns a path on this machine of what is read at any place or by other packages.

    A file or folder of a bucket is copied to `cache_folder`, once, and again where an object has
    changed. Processes of one machine share the copy.

    Raises:
      StorageError: It is in a bucket and does not exist or cannot be read.
    """
    if not is_bucket(path):
        return as_path(path)
    where = os.fspath(as_path(path))
    found = listing(where)
    if not found:
        raise StorageError(f"{where} does not exist")
    scheme, name = where.split("://", 1)
    digest = hashlib.sha256(where.encode()).hexdigest()[:24]
    target, record = cache_folder() / scheme / name, cache_folder() / "versions" / f"{digest}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    with _locked(record.with_suffix(".lock")):
        known = json.loads(record.read_text()) if record.exists() else {}
        stale = [
            inner
            for inner, info in found.items()
            if known.get(inner) != info["version"] or not (target / inner).is_file()
        ]
        if stale:
            size = sum(found[inner]["size"] for inner in stale)
            _LOG.info("copying %s (%.1f MB) to %s", where, size / 1e6, cache_folder())
        for inner in stale:
            with bucket_errors(where):
                _download(f"{where}/{inner}".rstrip("/"), target / inner)
        for inner in known.keys() - found.keys():
            (target / inner).unlink(missing_ok=True)
        if stale or known.keys() != found.keys():
            text = json.dumps({inner: info["version"] for inner, info in found.items()})
            record.write_text(text)
    return target


def _download(source: str, target: Path) -> None:
    """Copies an object to a file, which appears when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        file_system(source).get_file(source, os.fspath(partial))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lets one process of this machine at a time inside."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes may copy the same
        yield
        return
    with open(file, "w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


# -------------------------------------------------------------------------------------- rights


def check_writable(folder: AnyPath) -> None:
    """Writes, reads and deletes a small file in a folder, which need not exist.

    Raises:
      StorageError: One of them fails.
    """
    where = absolute_path(folder)
    if not is_bucket(where):
        there = next(path for path in (where, *where.parents) if path.exists())
        if not there.is_dir():
            raise StorageError(f"{where} cannot be written: {there} is not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise StorageError(f"{where} cannot be written: {there} is read-only")
        return
    probe, content = where / f".ldm_jax_probe_{uuid.uuid4().hex}", b"written by ldm_jax"
    steps: dict[str, Callable[[], Any]] = {
        "write": lambda: probe.write_bytes(content),
        "read": lambda: probe.read_bytes(),
        "delete": lambda: probe.unlink(),
    }
    for verb, step in steps.items():
        with bucket_errors(where, verb):
            step()


@contextlib.contextmanager
def bucket_errors(path: AnyPath, verb: str = "read or write") -> Iterator[None]:
    """Raises what a bucket refuses as StorageError; nothing is changed for other paths."""
    try:
        yield
    except Exception as error:
        if not is_bucket(path) or (problem := storage_problem(error)) is None:
            raise
        if problem == "missing":
            bucket = "/".join(os.fspath(as_path(path)).split("/")[:3])
            if _bucket_exists(bucket) is not False:
                code = errno.ENOENT
                raise FileNotFoundError(code, os.strerror(code), os.fspath(path)) from None
            problem = "bucket"
        reason = f" ({type(error).__name__})" if problem == "network" else ""
        raise StorageError(f"{path} {_sentence(problem, verb)}{reason}") from None


def _bucket_exists(bucket: str) -> bool | None:
    """Whether there is a bucket; None where it cannot be listed."""
    try:
        file_system(bucket).ls(bucket)
    except FileNotFoundError:
        return False
    except Exception as error:  # gcsfs and s3fs raise many classes
        return False if storage_problem(error) == "bucket" else None
    return True


def storage_problem(error: BaseException | None) -> str | None:
    """Returns what a storage refuses.

    Returns:
      "rights", "credentials", "bucket" (there is none of this name), "missing" (an object, or the
      bucket) or "network"; None for any other error.
    """
    while error is not None:
        text, name = str(error), type(error).__name__
        if any(sign in text for sign in ("NoSuchBucket", "specified bucket does not exist")):
            return "bucket"
        if name in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
            return "credentials"
        if name in ("RefreshError", "TokenRetrievalError", "SSOTokenLoadError", "ProfileNotFound"):
            return "credentials"
        refused = isinstance(error, PermissionError) and error.filename is None
        if refused or _status(error) in (401, 403) or text.startswith("Forbidden: "):
            return "rights"
        if name in ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError"):
            return "network"
        if name.startswith("ClientConnector") or name == "ServerDisconnectedError":
            return "network"
        if isinstance(error, FileNotFoundError) and error.filename is None:
            return "missing"
        if _status(error) == 404:
            return "missing"
        error = error.__cause__ or error.__context__
    return None


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status of an error of gcsfs or TensorStore."""
    code = getattr(error, "code", None)
    if isinstance(code, int):
        return code
    found = re.search(r"\[http_response_code='(\d+)'\]", str(error))
    return int(found[1]) if found else None


def _sentence(problem: str, verb: str) -> str:
    return {
        "rights": f"refuses to {verb}: give these credentials the role for it, or use others",
        "credentials": "needs credentials, and none are found: log in "
        "(gcloud auth application-default login, aws configure)",
        "bucket": "is in a bucket that does not exist: create it, or correct its name",
        "network": "cannot be reached: check the network and the endpoint",
    }[problem]


def describe_problem(problem: str, path: AnyPath | None) -> str:
    """Returns the message for a `storage_problem` that other packages have met."""
    where = path if path is not None and is_bucket(path) else "the bucket"
    return f"{where} {_sentence('bucket' if problem == 'missing' else problem, 'read or write')}"
