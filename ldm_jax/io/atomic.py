"""Files and folders that appear under their name only when they are whole."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ldm_jax.io.paths import as_path, is_bucket, upload


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; moves it there when the block ends without an error.

    The block may create a file or a folder at the temporary path. An existing file at ``path`` is
    replaced; an existing folder makes the move fail, as `os.replace` does. Devices and pipes, such
    as /dev/stdout, are written to. For a bucket the temporary path is on this machine and is
    uploaded: a file appears whole, a folder file by file. After an error nothing is left behind.
    """
    path = as_path(path)
    if is_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            upload(temporary, path)
        return
    if path.exists() and not (path.is_file() or path.is_dir()):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            path.write_bytes(temporary.read_bytes())
        return
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = scratch / path.name
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes ``data`` (text as UTF-8); ``path`` holds either all of it or its old content."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
