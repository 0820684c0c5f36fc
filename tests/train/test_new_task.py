"""A new training task is one class: it trains, previews, samples and exports."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL
from ml_collections import ConfigDict
from PIL import Image
from test_loop import metrics, pictures  # noqa: F401

import ldm_jax
from ldm_jax.configs.common import base
from ldm_jax.diffusion.schedule import q_sample
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import ConfigError
from ldm_jax.io import png
from ldm_jax.models.build import build, init_params
from ldm_jax.models.ldm import to_float
from ldm_jax.sampling.export import export
from ldm_jax.sampling.pipeline import Pipeline
from ldm_jax.train import loop
from ldm_jax.train.config import complete
from ldm_jax.train.encode import encode
from ldm_jax.train.loop import train
from ldm_jax.train.state import normal_rows, row_keys
from ldm_jax.train.tasks import TASKS
from ldm_jax.train.tasks.base import Task, flatten, plain

pytestmark = pytest.mark.compile


@dataclasses.dataclass(frozen=True, eq=False)
class OneLevel(Task):
    """Learns to remove the noise of one timestep from pixels."""

    config: Any
    model: Any

    @staticmethod
    def defaults():
        return {"level": 5, "loss": {"weight": 1.0}}

    @classmethod
    def from_config(cls, config, weights=True):
        return cls(config, build({"kind": "latent_diffusion", **plain(config.model)}, None, None))

    def init(self, key):
        return init_params(self.model, key)

    def loss(self, params, frozen, batch, step, train):
        x, t = to_float(batch["image"]), jnp.full(len(batch["row"]), self.config.level)
        noise = normal_rows(row_keys(self.config.seed, step, batch["row"]), 0, x.shape[1:])
        noisy = q_sample(self.model.schedule, x, t, noise)
        conditioner = self.model.conditioner
        cond = conditioner(params["conditioner"], conditioner.encode_null(len(x)))
        error = self.model.apply(params, noisy, t, cond, train=train) - noise
        loss = self.config.loss.weight * jnp.square(error).mean()
        return loss, {"loss": loss}

    def preview(self, weights, frozen, raw):
        return png.sheet([Pipeline(dataclasses.replace(self.model, params=weights), devices=1)()])

    def export(self, weights):
        return self.model.config, {**weights, "first_stage": None}


@pytest.fixture
def config(monkeypatch, pictures):  # noqa: F811
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
    monkeypatch.setitem(TASKS, "one_level", OneLevel)
    config = base("one_level")
    config.update(steps=2, batch_size=4, save_every=1, eval_every=2, eval_batches=1)
    config.data.update(path=str(pictures), size=(8, 8))
    config.model.update(
        objective="eps",
        schedule=ConfigDict(SMALL["schedule"]),
        first_stage=ConfigDict({"kind": "identity"}),
        conditioner=ConfigDict({"kind": "none"}),
        sampling=ConfigDict({"size": (8, 8), "steps": 2}),
    )
    config.model.unet = ConfigDict(
        {**SMALL["unet"], "in_channels": 3, "out_channels": 3, "use_spatial_transformer": False}
    )
    config.model.unet.context_dim = None
    return config


def test_a_new_task_trains_previews_samples_and_exports(config, tmp_path):
    model = train(config, tmp_path / "run")
    assert [(m["step"], m["part"]) for m in metrics(tmp_path / "run")] == [
        (2, "train"),
        (2, "validation"),
    ]
    preview = np.asarray(Image.open(tmp_path / "run/previews/0000002.png"))
    pipe = ldm_jax.load(model, devices=1)
    made = pipe()
    assert made.shape == (1, 8, 8, 3)
    np.testing.assert_array_equal(preview[2:10, 2:10], made[0])
    exported = export(model, tmp_path / "exported", steps=2)
    assert any(exported.iterdir())


def test_a_new_task_has_no_latent_cache_by_default(config, tmp_path):
    with pytest.raises(ConfigError, match="trains on pictures, not on latents"):
        encode(config, tmp_path / "cache")


def test_an_old_config_gets_the_defaults_of_new_fields(config, caplog):
    whole = flatten(plain(config))
    del config.level, config.best, config.loss.weight
    assert flatten(plain(complete(config))) == whole
    assert [record.getMessage() for record in caplog.records] == [
        "the config lacks best and 2 more: the defaults are used"
    ]
    assert "best" not in config
    caplog.clear()
    complete(complete(config))
    assert len(caplog.records) == 1


def test_a_task_that_does_not_exist(config, tmp_path):
    config.task = "one_levl"
    with pytest.raises(ConfigError, match="task 'one_levl' does not exist; did you mean"):
        train(config, tmp_path / "run")


def test_the_package_is_the_function(config, tmp_path):
    assert callable(ldm_jax.train)
    assert ldm_jax.train.loop is loop
    config.steps = 0
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        ldm_jax.train(config, tmp_path / "run")
    assert jax.tree.leaves(list(tmp_path.iterdir())) == []
