"""A full disk and exhausted memory are one-line errors, wherever they occur."""

import errno
import logging
import threading

import pytest

from ldm_jax.errors import RequestError, ResourceError
from ldm_jax.io.resources import resource_errors

pytestmark = pytest.mark.fast

ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
    (ValueError("RESOURCE_EXHAUSTED: Error writing x: No space left on device"), "disk is full"),
    (MemoryError(), "out of memory: use less"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"), "out of memory: use"),
    (RuntimeError("can't start new thread"), "out of memory: use less"),
]


@pytest.mark.parametrize(("error", "message"), ERRORS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("wrapped", [False, True])
def test_each_is_one_line(tmp_path, error, message, wrapped):
    def fail():
        with resource_errors("use less", tmp_path):
            if wrapped:
                raise RuntimeError("a save failed") from error
            raise error

    with pytest.raises(ResourceError, match=message) as caught:
        fail()
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_the_file_that_an_error_names_is_named():
    error = OSError(errno.ENOSPC, "No space left on device", "/data/x.png")
    with (
        pytest.raises(ResourceError, match=r"^/data/x.png cannot be written, the disk is full"),
        resource_errors("use less"),
    ):
        raise error
    text = 'RESOURCE_EXHAUSTED: Error writing "/data/params/d/7f": No space left on device'
    with (
        pytest.raises(ResourceError, match=r"^/data/params/d/7f cannot .* and come back$"),
        resource_errors("use less", after="come back"),
    ):
        raise ValueError(text)


def test_an_error_with_a_line_of_its_own_keeps_it():
    with pytest.raises(RequestError, match=r"^out of memory: 8 pictures"), resource_errors("x"):
        raise RequestError("out of memory: 8 pictures")


def test_other_errors_are_unchanged(tmp_path):
    with pytest.raises(ZeroDivisionError), resource_errors("", tmp_path):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), resource_errors("", tmp_path):
        (tmp_path / "missing").read_text()


def test_threads_and_logs_print_no_traceback(tmp_path, caplog, capfd):
    before, log = threading.excepthook, logging.getLogger("absl")

    def work(error):
        try:
            raise error
        except Exception as caught:
            log.error("saving failed", exc_info=True)
            raise caught

    def save():
        with resource_errors("", tmp_path):
            thread = threading.Thread(target=work, args=(ERRORS[0][0],))
            thread.start()
            thread.join()

    with pytest.raises(ResourceError, match="disk is full"):
        save()
    assert threading.excepthook is before
    assert not caplog.records
    assert "Traceback" not in capfd.readouterr().err
