"""What a run shows of itself: the progress line, the log, TensorBoard's groups."""

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import struct
import sys
import termios
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.configs.common import base
from ldm_jax.distributed.chips import Chip
from ldm_jax.train import report as report_module
from ldm_jax.train.report import Report
from ldm_jax.train.tasks.autoencoder import AutoencoderTask

pytestmark = pytest.mark.fast


@pytest.fixture
def quick():
    return base("autoencoder")


def report_of(workdir, config):
    """The report of a run without a model."""
    return Report(workdir, config, AutoencoderTask(config, None), 0, lambda step: 0.1)


class Terminal(io.StringIO):
    """A terminal of some width, whose text is kept."""

    def __init__(self, width):
        super().__init__()
        _, self.there = os.openpty()
        fcntl.ioctl(self.there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    def isatty(self):
        return True

    def fileno(self):
        return self.there


@pytest.mark.parametrize("width", [40, 120])
def test_the_line_of_a_terminal_is_redrawn_and_cut_to_its_width(
    quick, tmp_path, monkeypatch, width
):
    """What others log stands above it."""
    terminal = Terminal(width)
    monkeypatch.setattr(sys, "stderr", terminal)
    log = logging.getLogger("ldm_jax")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(log, "handlers", [handler])
    quick.update(steps=100, log_every=1)
    with contextlib.closing(report_of(tmp_path, quick)) as report:
        for step in (1, 2):
            report.step(step, {"loss": 0.25, "grad_norm": 0.5})
            log.warning("something happened")
            report.bar.refresh()
    assert log.handlers == [handler]
    shown = re.split(r"[\r\n]+", terminal.getvalue())
    lines = [line for line in shown if "2/100: loss 0.2500" in line]
    assert lines
    assert max(map(len, lines)) <= width
    assert all(("GiB" in line) == (width == 120) for line in lines)
    assert any(line.strip() == "something happened" for line in shown)


def test_a_log_file_gets_where_to_look_and_a_line_a_record(quick, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ldm_jax")
    quick.update(steps=4, log_every=2)
    with contextlib.closing(report_of(tmp_path, quick)) as report:
        for step in range(1, 5):
            report.step(step, {"loss": 0.25, "grad_norm": 0.5})
    first, *lines = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"progress: tensorboard --logdir {tmp_path}; {tmp_path / 'previews'}")
    assert len(lines) == 2
    number = r"[\d.:]+"
    pattern = rf"step 2/4: loss 0.2500, {number} images/s, {number} left, {number} GiB"
    assert re.fullmatch(pattern, lines[0])


def test_the_mfu_is_recorded_where_the_peak_is_known(quick, tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    caplog.set_level(logging.INFO, "ldm_jax")
    # The product of [64, 64] matrices is 2 * 64^3 FLOPs: at two steps a second 25 % of the peak.
    chip = Chip("a chip", 0, 0, 4 * 2 * 2 * 64**3 / jax.device_count(), 0)
    quick.update(steps=2, log_every=2)
    matrix = jnp.ones((64, 64))
    for known, remat in ((chip, "none"), (chip, "blocks"), (None, "none")):
        monkeypatch.setattr(report_module, "chip_of", lambda kind, known=known: known)
        quick.remat = remat
        with contextlib.closing(report_of(tmp_path, quick)) as report:
            report.count(jax.jit(jnp.dot), matrix, matrix)
            now[0] += 1.0
            report.step(2, {"loss": 0.25, "grad_norm": 0.5})
    assert ["MFU 25 %" in line for line in caplog.text.splitlines() if "loss" in line] == [
        True,
        False,
        False,
    ]
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert "mfu" not in json.loads(last)


def test_tensorboard_has_groups(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderTask, "bins", ("psnr_q1",))
    with contextlib.closing(report_of(tmp_path, quick)) as report:
        scalars, images = [], []
        monkeypatch.setattr(report.board, "add_scalar", lambda name, *_: scalars.append(name))
        monkeypatch.setattr(report.board, "add_image", lambda name, *_, **__: images.append(name))
        report.step(quick.steps, {"loss": 1.0, "grad_norm": 0.5})
        report.evaluation(1, {"psnr": 20.0, "psnr_q1": 21.0})
        for step in (1, 2):
            made, real = np.zeros((4, 6, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
            report.preview(step, made, real)
    assert {name.split("/")[0] for name in scalars} == {"train", "speed", "data", "eval", "bins"}
    assert {"train/loss", "eval/psnr", "bins/psnr_q1"} <= set(scalars)
    assert images == ["previews/made", "previews/real", "previews/made"]
