"""one_line: what the machine lacks, closed pipes, and lists of what does not fit."""

import errno
import os
import sys

import pytest

from ldm_jax.cli.run import PIPE_CLOSED, one_line
from ldm_jax.errors import ConversionError

pytestmark = pytest.mark.fast


def ends(error):
    def main():
        raise error

    return one_line("ldm-x", main)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space", "/a/b"), "/a/b cannot be written, the disk is full"),
        (OSError(errno.EDQUOT, "Quota", "/a/b"), "/a/b cannot be written, the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device"), "the output cannot be written"),
        (MemoryError(), "out of memory: lower the batch or the size\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: 5 bytes"), "lower the batch or the size (RESOURCE"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
    ],
    ids=str,
)
def test_what_the_machine_lacks_is_one_line(capsys, error, line):
    assert ends(error) == 2
    text = capsys.readouterr().err
    assert text.startswith("ldm-x: ")
    assert line in text
    assert text.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        one_line("ldm-x", lambda: 1 // 0)


def test_lists_keep_their_lines_where_they_are_wanted(capsys):
    error = ConversionError("x.ckpt", missing=["a", "b"])

    def main():
        raise error

    assert one_line("error", main, lists=True) == one_line("error", main) == 2
    long, short = capsys.readouterr().err.split("error: ")[1:]
    assert long.splitlines() == str(error).splitlines()
    assert short.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_standard_output_is_one_line(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert one_line("ldm-x", lambda: print("a result")) == 2
    monkeypatch.undo()
    assert capsys.readouterr().err == (
        "ldm-x: the output cannot be written, the disk is full: make room and start the same "
        "command again\n"
    )


def test_a_reader_that_has_seen_enough_is_no_error(capsys, monkeypatch):
    out, end = os.pipe()
    os.close(out)
    with os.fdopen(end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert one_line("ldm-x", lambda: print("a result")) == PIPE_CLOSED
    monkeypatch.undo()
    assert capsys.readouterr().err == ""
