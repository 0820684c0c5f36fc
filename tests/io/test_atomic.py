"""Writing whole files, and to pipes and devices."""

import os
import stat
import threading

import pytest

from ldm_jax.io.atomic import atomic_path, write_atomic

pytestmark = pytest.mark.fast


def test_a_file_has_its_old_content_until_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fails():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert path.read_text() == "old"
    write_atomic(path, b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX has named pipes")
def test_a_pipe_is_written_to_and_stays(tmp_path):
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write_atomic(path, b"content")
    reader.join(10)
    assert read == [b"content"]
    assert stat.S_ISFIFO(path.stat().st_mode)
