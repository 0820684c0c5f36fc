"""Damaged checkpoints: intact steps restore exactly, errors name damaged ones and a remedy."""

import contextlib
import gc
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from ldm_jax.errors import CheckpointError
from ldm_jax.io.checkpoint import BestCheckpoints, TrainingCheckpoints
from ldm_jax.train.state import create_state

INFO = {"scale_factor": 1.5}


@pytest.fixture(scope="module")
def state():
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": rng.standard_normal((30, 40)).astype(np.float32)},
        "b": rng.standard_normal(5).astype(np.float32),
        "large": rng.standard_normal((300, 400)).astype(np.float32),
    }
    tx = optax.chain(optax.clip(1.0), optax.adam(0.1))
    return jax.jit(lambda p: create_state(p, tx, ema=True))(params)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 1, 2 and 3."""
    run = tmp_path_factory.mktemp("saved") / "run"
    with contextlib.closing(TrainingCheckpoints(run)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, INFO)
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def restored(run: Path, state, **options) -> int:
    """Restores the newest step, bit-exact."""
    with contextlib.closing(TrainingCheckpoints(run, **options)) as checkpoints:
        step = checkpoints.latest()
        assert step is not None
        found, info = checkpoints.restore(step, state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert info == INFO
    return step


def test_a_newest_checkpoint_cut_at_any_byte(saved, state, tmp_path, capfd):
    """Truncated files are either never read or reported, without a traceback."""
    rng, refused = np.random.default_rng(1), 0
    files = [path for path in (saved / "checkpoints/3").rglob("*") if path.is_file()]
    for file in files:
        size, run = file.stat().st_size, tmp_path / "run"
        for cut in {0, size - 1, int(rng.integers(0, size))}:
            shutil.copytree(saved, run)
            (run / file.relative_to(saved)).write_bytes(file.read_bytes()[:cut])
            message = ""
            try:
                assert restored(run, state) == 3
            except CheckpointError as error:
                message = str(error)
                refused += 1
            assert not message or "checkpoints/3 is damaged or incomplete: " in message
            assert not message or message.endswith("resume from it with --restore_step=2")
            assert "\n" not in message
            assert not re.search(r"<bound method|object has no attribute|pybind", message)
            shutil.rmtree(run)
    gc.collect()
    assert refused > len(files) / 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("missing", ["info", "state", "state/d", "state/_METADATA", "*"])
def test_parts_of_a_checkpoint_that_are_missing(run, state, missing):
    for path in (run / "checkpoints/3").glob(missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=r"damaged or incomplete: .*--restore_step=2"):
        restored(run, state)


@pytest.mark.fast
def test_the_newest_whole_checkpoint_is_named(run, state):
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoints/{step}/info")
    with pytest.raises(CheckpointError, match=r"checkpoints/3 is damaged.*--restore_step=1$"):
        restored(run, state)
    assert restored(run, state, restore_step=1) == 1
    assert [path.name for path in sorted((run / "checkpoints_after_1").iterdir())] == ["2", "3"]
    assert restored(run, state) == 1
    shutil.rmtree(run / "checkpoints/1/info")
    with pytest.raises(CheckpointError, match=r"checkpoints/1 is damaged or incomplete: "):
        restored(run, state)


def test_a_step_to_resume_from_that_is_not_there(run, state):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 \(known: 1, 2, 3\)"):
        restored(run, state, restore_step=5)
    assert restored(run, state) == 3


def test_a_damaged_best_checkpoint_is_one_line(state, tmp_path):
    with contextlib.closing(BestCheckpoints(tmp_path, 2, "loss", "min")) as best:
        best.offer(1, {"x": np.ones(3)}, INFO, {"loss": 1.0})
    for file in (tmp_path / "best/1/metrics").iterdir():
        file.write_text("{")
    with pytest.raises(CheckpointError, match="best cannot be read"):
        BestCheckpoints(tmp_path, 2, "loss", "min").best()
