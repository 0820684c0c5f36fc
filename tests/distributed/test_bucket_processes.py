"""Aspect-ratio buckets in a run of several processes."""

import signal

import numpy as np
import pytest

from ldm_jax.train.loop import train
from tests.distributed.test_parallel import ended, reached, together, write
from tests.train.test_bucket_training import bucketed, shapes  # noqa: F401
from tests.train.test_loop import final, first_stage, metrics  # noqa: F401


@pytest.mark.processes
def test_two_processes_take_the_same_bucket_and_resume_after_a_kill(
    shapes,  # noqa: F811
    first_stage,  # noqa: F811
    tmp_path,
):
    config = bucketed("autoencoder", shapes, first_stage)
    config.update(steps=8, save_every=2, eval_every=8, eval_batches=2)
    config.optim.lr = 1e-4
    train(config, tmp_path / "one")  # eight devices of one process

    file, workdir = write(config, tmp_path), tmp_path / "two"
    processes = together(file, workdir, devices=1)
    reached(workdir, 4, *processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    outputs = [process.communicate()[1] for process in processes]
    assert "buckets have pictures" in outputs[0]
    kept = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert 2 <= max(kept) < 8, "\n".join(outputs)
    ended(*together(file, workdir, devices=1))

    for part in ("train", "validation"):
        ours = {m["step"]: m["loss"] for m in metrics(workdir) if m["part"] == part}
        alone = {m["step"]: m["loss"] for m in metrics(tmp_path / "one") if m["part"] == part}
        assert ours.keys() == alone.keys()
        for step, loss in alone.items():
            # The file has six digits. Parameters are not compared: Adam turns the rounding of
            # gradients that are nearly zero into whole steps.
            np.testing.assert_allclose(ours[step], loss, rtol=2e-5)
