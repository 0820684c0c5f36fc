"""Training of a CLIP model."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_loop import pictures  # noqa: F401

from ldm_jax.configs.common import base
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import ConfigError, DataError
from ldm_jax.io.checkpoint import load_model
from ldm_jax.models.clip import clip_from_config, fit_pixels
from ldm_jax.train import loop
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.loop import train
from ldm_jax.train.tasks import task_class

pytestmark = pytest.mark.compile
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 2, "projection_dim": 8}


@pytest.fixture
def config(pictures):  # noqa: F811
    config = base("contrastive")
    config.update(steps=30, batch_size=8, ema=0.5, log_every=10, save_every=30, eval_every=30)
    config.update(eval_batches=1, preview_every=30)
    config.data.update(path=str(pictures), size=(8, 8))
    config.optim.update(lr=1e-2, clip=1.0)
    config.model.conditioner = ConfigDict({"kind": "clip", "max_position_embeddings": 5, **TOWER})
    config.model.vision = ConfigDict({"kind": "vit", "image_size": 16, "patch_size": 8, **TOWER})
    return config


def test_the_loss_is_the_cross_entropy_of_both_directions(config):
    task = task_class(config).from_config(config)
    params = jax.jit(task.init)(jax.random.key(0))
    params["logit_scale"] = np.float32(9.0)  # above the bound, 100
    raw = next(iter(make_loader(config, "train").batches(1)))
    batch = task.host_batch(raw)
    assert batch["tokens"].shape == (8, 5)
    loss, metrics = jax.jit(task.loss, static_argnums=4)(params, {}, batch, 0, True)
    pixels = fit_pixels(raw["image"] / np.float32(127.5) - 1, 16)
    image = np.asarray(task.model.encode_pixels(params, pixels), np.float64)
    text = np.asarray(task.model.encode_text(params, batch["tokens"]), np.float64)
    image, text = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (image, text))
    logits = 100 * image @ text.T
    rows, columns = (np.log(np.exp(logits).sum(axis)) for axis in (1, 0))
    expected = ((rows - np.diag(logits)).mean() + (columns - np.diag(logits)).mean()) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["accuracy"]) == (logits.argmax(1) == np.arange(8)).mean()


def test_a_run_learns_and_exports_a_clip_model(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
    fields, params = load_model(train(config, tmp_path / "run"))
    assert fields["kind"] == "clip"
    task = task_class(config).from_config(config)
    batch = task.host_batch(next(iter(make_loader(config, "train").batches(1))))
    assert clip_from_config(fields) == clip_from_config({"kind": "clip", **fields})
    before = task.evaluate(jax.jit(task.init)(jax.random.key(0)), {}, batch)["loss"]
    assert task.evaluate(params, {}, batch)["loss"] < before - 0.2
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("model.vision.kind", "resnet", ConfigError, "fixed batch statistics"),
        ("model.vision.projection_dim", 9, ConfigError, "need the same projection_dim"),
        ("model.vision.heads", 9, ConfigError, "vision: field 'heads' does not exist"),
        ("data.caption", "emoji", DataError, "every caption is the same"),
    ],
)
def test_what_cannot_be_trained_is_named(config, tmp_path, field, value, error, message):
    section = config
    *path, last = field.split(".")
    for name in path:
        section = section[name]
    with section.unlocked():
        section[last] = value
    with pytest.raises(error, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
