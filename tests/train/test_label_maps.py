"""The task label_maps: a VQ first stage of maps of labels."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax.configs.emoji_maps_vq import get_config
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import ConfigError
from ldm_jax.io.checkpoint import load_model
from ldm_jax.models.build import build_first_stage
from ldm_jax.train import loop
from ldm_jax.train.loop import train
from ldm_jax.train.tasks.label_maps import LabelMapTask, binary_cross_entropy

pytestmark = pytest.mark.compile


def small():
    config = get_config("smoke")
    config.update(steps=30, batch_size=4, save_every=30, eval_every=30, preview_every=30)
    config.log_every = 10
    config.optim.update(lr=5e-3, warmup=0)
    config.data.update(size=(16, 16), count=24)
    config.model.first_stage.update(ch=16, ch_mult=(1, 1), n_embed=16, resolution=16)
    return config


def test_it_trains_previews_and_exports(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
    model = train(small(), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [row["bce_loss"] for row in rows if row["part"] == "train"]
    assert trained[-1] < 0.8 * trained[0]
    assert 0 < rows[-1]["accuracy"] <= 1
    assert np.asarray(Image.open(next((tmp_path / "run/previews").glob("*.png")))).ndim == 3
    config, params = load_model(model)
    assert (config["kind"], config["first_stage"]["n_labels"]) == ("first_stage", 9)
    module = build_first_stage(config)
    y, code = module.apply({"params": params["first_stage"]}, np.zeros((1, 16, 16, 9), np.float32))
    assert y.shape == (1, 16, 16, 9)
    assert code.indices.size == 64


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_stage.in_channels": 3}, "first_stage.in_channels is 3: the maps have 9 labels"),
        ({"first_stage.kind": "kl"}, "label maps need a codebook"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    config = get_config()
    config.model.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=message):
        LabelMapTask.check_config(config)


@pytest.mark.fast
def test_an_adversary_is_an_error():
    config = get_config()
    config.adversary.weight = 0.5
    with pytest.raises(ConfigError, match=r"adversary\.weight: a first stage of label maps"):
        LabelMapTask.check_config(config)


@pytest.mark.fast
def test_binary_cross_entropy_averages_over_channels():
    logits, targets = np.array([[2.0, -1.0]]), np.array([[1.0, 0.0]])
    p = 1 / (1 + np.exp(-logits))
    expected = -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    assert np.isclose(jax.device_get(binary_cross_entropy(logits, targets)), expected)
