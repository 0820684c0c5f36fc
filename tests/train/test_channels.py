"""A first stage of pictures of five floating-point channels: training, figures, reconstruction."""

import json

import numpy as np
import pytest
from conftest import SMALL_KL
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.configs.common import base
from ldm_jax.errors import ConfigError, EvaluationError
from ldm_jax.eval.evaluation import evaluate
from ldm_jax.eval.metrics import psnr
from ldm_jax.train.loop import train
from tests.train.test_loop import metrics, one_device  # noqa: F401

CHANNELS, LOW, HIGH = 5, -1.0, 3.0


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Eight arrays of smooth fields."""
    folder, rng = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    y, x = np.mgrid[:16, :16] / 16
    for i in range(8):
        phase = rng.random((2, CHANNELS))
        field = np.sin(6 * (y[..., None] + phase[0])) * np.cos(6 * (x[..., None] + phase[1]))
        np.save(folder / f"{i}.npy", (1 + 2 * field).astype(np.float32))
    return folder


def make_config(folder) -> ConfigDict:
    config = base("autoencoder")
    config.update(steps=4, batch_size=4, log_every=1, save_every=4, eval_every=4, eval_batches=1)
    config.update(preview_every=4, ema=0.0)
    config.data.update(path=str(folder), size=(16, 16), channels=CHANNELS, values=(LOW, HIGH))
    stage = {**SMALL_KL, "in_channels": CHANNELS, "out_ch": CHANNELS}
    config.model.first_stage = ConfigDict(stage)
    return config


@pytest.mark.compile
def test_five_channels_from_data_to_figures(arrays, tmp_path, script):
    workdir = tmp_path / "run"
    model = train(make_config(arrays), workdir)
    found = metrics(workdir)
    assert np.isfinite([m["loss"] for m in found]).all()
    saved = json.loads((model / "config.json").read_text())
    assert saved["pixels"] == {"channels": CHANNELS, "values": [LOW, HIGH]}
    assert Image.open(workdir / "previews" / "0000004.png").mode == "RGB"

    result = evaluate(model, arrays, features="none", reconstruct=True, batch=8, progress=False)
    assert result.metrics.keys() == {"PSNR", "SSIM"}
    with pytest.raises(EvaluationError, match="--features none"):
        evaluate(model, arrays, features="none", reconstruct=True, lpips=(None, None))

    out = tmp_path / "out"
    ran = script("sample.py", f"--model={model}", f"--reconstruct={arrays}", f"--out={out}")
    assert ran.status == 0, ran.stderr
    kept = [np.load(file) for file in sorted(out.glob("*.npy"))]
    assert {(one.shape, one.dtype.name) for one in kept} == {((16, 16, CHANNELS), "float32")}
    originals = np.stack([np.load(arrays / f"{i}.npy") for i in range(8)])
    a, b = ((x - LOW) / (HIGH - LOW) * 2 - 1 for x in (np.stack(kept), originals))
    assert psnr(a, b).mean() == pytest.approx(result.metrics["PSNR"], abs=0.01)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.perceptual_weight": 1.0}, "LPIPS compares RGB pictures"),
        ({"data.channels": 4}, "first_stage.in_channels is 5: the pictures have 4"),
        ({"data.channels": 17}, "give 1 to 16"),
        ({"task": "diffusion"}, "'diffusion' trains on 8-bit RGB pictures"),
    ],
)
def test_what_does_not_go_with_many_channels(changes, message, arrays, tmp_path):
    config = make_config(arrays)
    if "task" in changes:
        config = base(changes.pop("task"))
        config.data.channels = CHANNELS
    config.update_from_flattened_dict(changes)
    with pytest.raises((ConfigError, ValueError), match=message):
        train(config, tmp_path / "run")
