"""Files that grow, such as logs, for a folder that may be in a bucket."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from ldm_jax.io.paths import bucket_errors, file_system, is_bucket, upload


class Mirror:
    """A local folder whose files are copied to ``folder``, which may be in a bucket.

    An object of a bucket cannot grow: its file grows on this machine and is written again as a
    whole. For a folder of this machine nothing is copied.

    Args:
      folder: The folder of the files.
      interval: Seconds between two copies of `push_sometimes`.

    Attributes:
      local: Where the files are written, ``folder`` itself where it is on this machine.
    """

    def __init__(self, folder: Path, interval: float = 60.0):
        self.folder, self._interval, self._copies = folder, interval, is_bucket(folder)
        self.local = Path(tempfile.mkdtemp(prefix="ldm_jax_")) if self._copies else folder
        self._pushed: dict[Path, tuple[int, int]] = {}
        self._last = time.monotonic()

    def fetch(self, name: str) -> Path:
        """Returns the local path of a file, with what ``folder`` holds under its name."""
        local = self.local / name
        if self._copies:
            with bucket_errors(self.folder):
                if (there := self.folder / name).exists():
                    file_system(there).get_file(os.fspath(there), os.fspath(local))
        return local

    def push(self) -> None:
        """Copies the files that have changed since the last time."""
        if not self._copies:
            return
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            status = file.stat()
            state = status.st_size, status.st_mtime_ns
            if self._pushed.get(file) != state:
                upload(file, self.folder / file.relative_to(self.local).as_posix())
                self._pushed[file] = state
        self._last = time.monotonic()

    def push_sometimes(self) -> None:
        """Pushes where the last time was long ago."""
        if time.monotonic() - self._last > self._interval:
            self.push()

    def close(self) -> None:
        """Pushes, and removes the local folder of a bucket."""
        try:
            self.push()
        finally:
            if self._copies:
                shutil.rmtree(self.local, ignore_errors=True)
