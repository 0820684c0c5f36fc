"""LoRA: factors of a frozen model are trained, exported, and merged."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, pipeline_of, random_params
from ml_collections import ConfigDict
from safetensors import safe_open
from test_loop import pictures  # noqa: F401

from ldm_jax.configs.common import base
from ldm_jax.convert.conversion import export
from ldm_jax.convert.lora import merge_lora
from ldm_jax.convert.tables import flatten
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import CheckpointError, ConfigError, TargetError
from ldm_jax.io.checkpoint import load_model, save_model
from ldm_jax.sampling.pipeline import Pipeline, load
from ldm_jax.train import adapters, loop
from ldm_jax.train.config import check_config, complete
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.loop import train
from ldm_jax.train.tasks import task_class
from ldm_jax.train.tasks.base import plain

CLIP = {
    "kind": "clip",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
MODEL = {
    **TINY,
    "schedule": {**TINY["schedule"], "timesteps": 10},
    "first_stage": {**TINY["first_stage"], "ch_mult": [1]},
    "conditioner": CLIP,
    "sampling": {"size": [8, 8], "steps": 2, "guidance": 2.0},
}
TARGETS = (r"attn\d/to_(q|k|v|out)$", "in_conv", "/proj_in$", "/emb$", r"layers_\d/(q|fc1)$")


def write_model(path, config=MODEL):
    """Writes the directory of a model of random parameters."""
    model = pipeline_of(config).model
    save_model(
        path, config, jax.device_get({**model.params, "first_stage": model.first_stage.params})
    )
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The directory of a small model with CLIP's text tower."""
    return write_model(tmp_path_factory.mktemp("models") / "clip")


def make_config(model_dir, pictures):  # noqa: F811
    """A run of two steps of a LoRA of the UNet and the text tower."""
    config = base("lora")
    config.update(steps=2, batch_size=4, ema=0.5, save_every=2, eval_every=2, preview_every=2)
    config.update(eval_batches=1, log_every=1, preview_captions=("1",))
    config.data.update(path=str(pictures), size=(8, 8))
    config.optim.update(lr=1e-1)
    config.model.path = str(model_dir)
    config.adapter.update(rank=2, alpha=3.0, targets=TARGETS)
    return config


@pytest.fixture
def config(model_dir, pictures):  # noqa: F811
    return make_config(model_dir, pictures)


def _pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def task_of(config, **options):
    config = complete(config)
    check_config(config)
    return task_class(config).from_config(config, **options).with_measured({"scale_factor": 0.5})


@pytest.mark.fast
def test_the_product_of_the_factors_is_added_to_the_kernels():
    rng = np.random.default_rng(0)
    params = {
        "unet": {
            "a": {"kernel": rng.normal(size=(6, 5)), "bias": rng.normal(size=5)},
            "b": {"kernel": rng.normal(size=(3, 3, 4, 7))},
            "c": {"kernel": rng.normal(size=(4, 4))},
        }
    }
    params = jax.tree.map(np.float32, params)
    targets = adapters.find_targets(params, ["^unet/[ab]$"])
    assert targets == (("unet", "a", "kernel"), ("unet", "b", "kernel"))
    factors = adapters.init_factors(params, targets, 2, jax.random.key(0))
    assert factors["unet"]["b"]["kernel"]["down"].shape == (3, 3, 4, 2)
    same = adapters.with_factors(params, factors, 1.5)
    assert all(np.array_equal(a, b) for a, b in _pairs(same, params))
    factors = random_params(jax.eval_shape(lambda: factors), 1)
    new = adapters.with_factors(params, factors, 1.5)["unet"]
    for name, letters in (("a", "ir,ro->io"), ("b", "hwir,ro->hwio")):
        pair = factors["unet"][name]["kernel"]
        update = 1.5 * np.einsum(letters, pair["down"], pair["up"])
        np.testing.assert_allclose(
            new[name]["kernel"], params["unet"][name]["kernel"] + update, rtol=1e-5, atol=1e-6
        )
    assert new["a"]["bias"] is params["unet"]["a"]["bias"]
    assert new["c"] is params["unet"]["c"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("patterns", "message"),
    [(["^unet/z$"], "no layer fits '.unet/z.'"), (["("], "no pattern"), ([], "is empty")],
)
def test_patterns_that_choose_nothing_are_named(patterns, message):
    params = {"unet": {"a": {"kernel": np.zeros((2, 2))}}}
    with pytest.raises(ConfigError, match=message):
        adapters.find_targets(params, patterns)


@pytest.mark.compile
def test_a_lora_is_trained_exported_and_sampled(config, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
    task, (_, before) = task_of(config), load_model(model_dir)
    trained = train(config, tmp_path / "run")
    fields, factors = load_model(trained)
    assert (fields["kind"], fields["rank"], fields["alpha"]) == ("lora", 2, 3.0)
    assert {path[:-1] for path in flatten(factors)} == set(task.targets)
    assert {part for part, *_ in task.targets} == {"unet", "conditioner"}
    assert all(np.abs(pair).max() > 0 for pair in jax.tree.leaves(factors))
    assert sum(map(np.size, jax.tree.leaves(factors))) < 0.2 * sum(
        map(np.size, jax.tree.leaves(before["unet"]))
    )

    _, after = load_model(model_dir)
    params = {part: after[part] for part in ("unet", "conditioner")}
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    expected = adapters.with_factors(params, factors, 1.5)
    files = {"kohya": tmp_path / "kohya.safetensors", "peft": tmp_path / "peft.safetensors"}
    for to, file in files.items():
        export(trained, to, file)
    for file in (trained, *files.values()):
        merged = merge_lora(MODEL, params, file)
        for path, leaf in flatten(expected).items():
            found = flatten(merged)[path]
            np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6, err_msg=str(path))
    with safe_open(files["kohya"], "np") as file:
        assert file.metadata()["ss_network_dim"] == "2"
        assert "lora_unet_mid_block_resnets_0_conv1.lora_down.weight" in file.keys()  # noqa: SIM118
        assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in file.keys()  # noqa: SIM118

    pipe = load(model_dir, devices=1)
    whole = dataclasses.replace(pipe.model, params=expected)
    found = pipe.with_lora(trained)(["1"], seeds=[3])
    made = Pipeline(whole, devices=1)(["1"], seeds=[3]).astype(int)
    assert np.abs(found - made).max() <= 1
    assert np.abs(found.astype(int) - pipe(["1"], seeds=[3])).max() > 3


@pytest.mark.compile
def test_training_starts_at_the_frozen_model_and_moves_factors_alone(config):
    config.base_dtype = "bfloat16"
    task = task_of(config)
    factors = jax.jit(task.init)(jax.random.key(0))
    base_, batch = (
        task.base,
        task.host_batch(next(iter(make_loader(task.config, "train").batches(1)))),
    )
    assert base_["unet"]["input_blocks_0_0"]["kernel"].dtype == jnp.bfloat16
    assert base_["unet"]["input_blocks_0_0"]["bias"].dtype == jnp.float32

    @jax.jit
    def step(factors, frozen, batch):
        return jax.value_and_grad(task.loss, has_aux=True)(factors, frozen, batch, 0, False)

    (loss, _), grads = step(factors, task.frozen, batch)
    own = super(type(task).__mro__[1], task).loss  # of the diffusion stage
    expected, _ = jax.jit(own, static_argnums=4)(base_, task.frozen, batch, 0, False)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for path, grad in flatten(grads).items():
        assert grad.dtype == jnp.float32
        # "up" is zero: "down" has no gradient yet.
        assert (np.abs(grad).max() > 0) == (path[-1] == "up"), path


@pytest.mark.fast
def test_mistakes_are_one_line(config, model_dir, pictures, tmp_path):  # noqa: F811
    def changed(**fields):
        new = make_config(model_dir, pictures)
        with new.unlocked():
            for name, value in fields.items():
                *path, last = name.split("__")
                section = new
                for part in path:
                    section = section[part]
                section[last] = value
        return new

    cases = {
        "model.path is missing": changed(model__path=""),
        "neither a path nor a model": changed(model__path=str(tmp_path / "none")),
        "model.objective is that of the model": changed(model__objective="v"),
        "optim.kind 'muon' has no form": changed(optim__kind="muon"),
        "adapter.rank must be at least 1": changed(adapter__rank=0),
        "adapter.alpha must be above 0": changed(adapter__alpha=0.0),
        "no layer fits": changed(adapter__targets=("^vae/",)),
        "base_dtype 'int7' does not exist": changed(base_dtype="int7"),
        "model.like 'sd9' is no config": changed(model__path="none", model__like="sd9"),
        "loss.learn_logvar: the model is frozen": changed(loss__learn_logvar=True),
    }
    for message, case in cases.items():
        with pytest.raises((ConfigError, CheckpointError), match=message) as error:
            task_of(case, weights=False)
        assert "\n" not in str(error.value)
    with pytest.raises(TargetError, match="latent_diffusion is no LoRA"):
        export(model_dir, "kohya", tmp_path / "x.safetensors")
    task = task_of(config, weights=False)
    with pytest.raises(ConfigError, match="a latent_diffusion is no LoRA"):
        task.adopt({"kind": "latent_diffusion"}, {})
    with pytest.raises(ConfigError, match=r"has rank 4: set adapter.rank"):
        task.adopt({"kind": "lora", "rank": 4, "alpha": 3.0}, {})


@pytest.mark.fast
def test_a_complete_config_is_that_of_its_run(config):
    config.model.sampling = ConfigDict({"guidance": 5.0})
    once = complete(config)
    assert plain(once.model)["sampling"] == {"size": [8, 8], "steps": 2, "guidance": 5.0}
    assert plain(complete(once)) == plain(once)
    assert plain(complete(ConfigDict(json.loads(json.dumps(plain(once)))))) == plain(once)
