"""Whole checkpoints: recorded names and shapes, duplicates, constants, averages and losses."""

import json
from typing import Any

import numpy as np
import pytest

from ldm_jax.convert.compvis.whole import (
    BUFFERS,
    Whole,
    first_stage,
    latent_diffusion,
    whole_from_config,
)
from ldm_jax.convert.tables import flatten, source_shapes, to_ours, to_theirs
from ldm_jax.errors import ConversionError, TargetError
from ldm_jax.models.perceptual import VGG16_WIDTHS

from .golden import golden_folder

pytestmark = pytest.mark.parity

CASES = json.loads((golden_folder() / "manifest.json").read_text())["cases"]
CKPTS = [name for name, spec in CASES.items() if "ckpt_keys" in spec]
NARROW = (4, 4, 4, 4, 4)
STAGE = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 2,
        "n_embed": 5,
        "ddconfig": {
            "double_z": False,
            "z_channels": 2,
            "resolution": 8,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
SMALL: dict[str, Any] = {
    "timesteps": 10,
    "linear_start": 0.0015,
    "linear_end": 0.0195,
    "scale_by_std": True,
    "learn_logvar": True,
    "first_stage_config": STAGE,
    "cond_stage_config": "__is_first_stage__",
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": 8,
            "in_channels": 4,
            "out_channels": 2,
            "model_channels": 32,
            "attention_resolutions": [],
            "num_res_blocks": 1,
            "channel_mult": [1],
            "num_heads": 2,
        },
    },
}


def arrays(model: Whole) -> dict[str, np.ndarray]:
    """Random arrays under the original's names, constants and duplicates as they have to be."""
    rng = np.random.default_rng(0)
    params = {
        path: rng.normal(size=s.shape).astype(np.float32)
        for path, s in flatten(model.shapes).items()
    }
    tree: dict[str, Any] = {}
    for path, a in params.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.int32(3) if path[-1] == "count" else a
    return to_theirs(model.table, tree)


@pytest.mark.parametrize("name", CKPTS)
def test_recorded_checkpoints_are_accounted_for(name: str) -> None:
    spec = CASES[name]
    keys = {key: tuple(shape) for key, (shape, _) in spec["ckpt_keys"].items()}
    options = (
        {"ema": any(key.startswith("model_ema.") for key in keys)}
        if "unet_config" in spec["kwargs"]
        else {}
    )
    vgg = spec.get("vgg_widths", VGG16_WIDTHS)
    model = whole_from_config(spec["class"], spec["kwargs"], vgg=vgg, **options)
    assert source_shapes(model.table, model.shapes, name) == keys


def test_round_trip_with_duplicates_averages_and_buffers() -> None:
    model = latent_diffusion(SMALL, ema=True)
    theirs = arrays(model)
    assert set(BUFFERS.split()) <= theirs.keys()
    assert {"scale_factor", "logvar", "model_ema.decay", "model_ema.num_updates"} <= theirs.keys()
    assert "model_ema.diffusion_modelinput_blocks00weight" in theirs
    assert np.array_equal(
        theirs["cond_stage_model.quantize.embedding.weight"],
        theirs["first_stage_model.quantize.embedding.weight"],
    )
    ours = to_ours(model.table, theirs, shapes=model.shapes, where="test")
    assert set(ours) == {"unet", "first_stage", "ema", "scale_factor", "logvar"}
    back = to_theirs(model.table, ours)
    assert back.keys() == theirs.keys()
    assert all(back[name].tobytes() == a.tobytes() for name, a in theirs.items())

    without = {
        name: a
        for name, a in theirs.items()
        if not name.startswith("cond_stage_model.") and name != "betas"
    }
    to_ours(model.table, without, shapes=model.shapes, where="test")


@pytest.mark.parametrize("name", ["betas", "cond_stage_model.quantize.embedding.weight"])
def test_constants_and_duplicates_must_agree(name: str) -> None:
    model = latent_diffusion(SMALL)
    theirs = arrays(model)
    theirs[name] = theirs[name] + 1
    with pytest.raises(ConversionError) as error:
        to_ours(model.table, theirs, shapes=model.shapes, where="test")
    assert error.value.different == [name]
    assert name in str(error.value)


def test_losses_of_first_stages() -> None:
    loss = {
        "target": "ldm.modules.losses.LPIPSWithDiscriminator",
        "params": {"disc_start": 1, "kl_weight": 1e-6, "disc_weight": 0.5, "disc_num_layers": 1},
    }
    params = STAGE["params"] | {"lossconfig": loss}
    model = first_stage(STAGE["target"], params, vgg=NARROW)
    names = source_shapes(model.table, model.shapes)
    assert names["loss.logvar"] == ()
    assert names["loss.perceptual_loss.scaling_layer.shift"] == (1, 3, 1, 1)
    assert names["loss.discriminator.main.0.weight"] == (64, 3, 4, 4)
    assert set(model.modules) == {"first_stage", "lpips", "discriminator"}
    theirs = arrays(model)
    back = to_theirs(model.table, to_ours(model.table, theirs, shapes=model.shapes, where="test"))
    assert all(np.array_equal(back[name], a) for name, a in theirs.items())
    assert set(first_stage(STAGE["target"], params, losses=False).modules) == {"first_stage"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"no_such": 1}, "no_such"),
        ({"given_betas": [0.1]}, "given_betas"),
        ({"cond_stage_config": {"target": "no.such.Embedder"}}, r"no\.such\.Embedder"),
    ],
)
def test_unsupported_options_are_errors(change: dict[str, Any], match: str) -> None:
    with pytest.raises(TargetError, match=match):
        latent_diffusion(SMALL | change)
