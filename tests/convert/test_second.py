"""Stable Diffusion 2's depth model and x4 upscaler: conditions, files and sampling."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sdxl_models import model_of, random_params, second_config

from ldm_jax.conditioning import make_conditioner
from ldm_jax.conditioning.depth import read_depth
from ldm_jax.convert.conversion import export, read_model
from ldm_jax.convert.tables import flatten
from ldm_jax.data.transforms import Crop, ImageTransform, View
from ldm_jax.errors import RequestError
from ldm_jax.io.checkpoint import save_model
from ldm_jax.models.build import build
from ldm_jax.sampling.pipeline import Pipeline

CONFIGS = {
    "depth": second_config("depth", factor=2),
    "upscale": second_config("upscale", max_noise_level=30),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_both_layouts_hold_the_model_to_the_bit(tmp_path, kind, layout):
    config = CONFIGS[kind]
    params = random_params(config)
    save_model(tmp_path / "model", config, params, dtype=None)
    out = tmp_path / ("x.safetensors" if layout == "compvis" else "folder")
    export(tmp_path / "model", layout, out)
    found = read_model(out, config=out.with_suffix(".yaml") if layout == "compvis" else None)
    a, b = flatten(found.params), flatten(params)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[path], b[path]) for path in a)
    ours, theirs = build(config, None, None), build(found.config, None, None)
    assert theirs.objective == ours.objective
    assert theirs.unet.disable_self_attentions == ours.unet.disable_self_attentions
    assert theirs.unet.num_classes == ours.unet.num_classes
    for name in ("factor", "size", "max_noise_level", "linear_start"):
        assert getattr(theirs.conditioner, name, 0) == getattr(ours.conditioner, name, 0)
    assert found.config["conditioner"]["kind"] == kind
    assert found.config["sampling"]["size"] == [32, 32]


def test_depth_is_given_and_changes_the_picture():
    pipe = Pipeline(model_of(CONFIGS["depth"]))
    depth = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    plain = pipe("a house", depth=depth, steps=2)
    assert plain.shape == (1, 32, 32, 3)
    assert (pipe("a house", depth=depth.T, steps=2) != plain).any()
    # Its range does not matter.
    assert np.abs(pipe("a house", depth=900 * depth, steps=2).astype(int) - plain).max() <= 2
    picture = np.zeros((32, 32, 3), np.uint8)
    assert pipe("a house", depth=depth, image=picture, strength=0.5, steps=2).shape == plain.shape
    with pytest.raises(RequestError, match="needs a depth map"):
        pipe("a house")


@pytest.mark.fast
def test_depth_maps_are_read_in_any_depth(tmp_path):
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4) * 1000
    Image.fromarray(grey).save(tmp_path / "d.png")
    assert np.array_equal(read_depth(tmp_path / "d.png"), grey)
    assert read_depth(Image.fromarray(np.zeros((3, 4, 3), np.uint8))).shape == (3, 4)
    with pytest.raises(RequestError, match="finite numbers"):
        read_depth(np.full((2, 2), np.nan))
    with pytest.raises(RequestError, match="cannot be read"):
        read_depth(tmp_path / "none.png")


def test_an_upscaler_adds_noise_of_a_level():
    model = model_of(CONFIGS["upscale"])
    pipe = Pipeline(model)
    small = np.full((16, 16, 3), 200, np.uint8)
    plain = pipe("a house", image=small, steps=2, seeds=[1, 2])
    assert plain.shape == (2, 32, 32, 3)
    assert np.array_equal(pipe("a house", image=small, steps=2, seeds=2)[0], plain[1])
    assert (pipe("a house", image=small, steps=2, seeds=[1, 2], noise_level=3) != plain).any()
    with pytest.raises(RequestError, match="noise_level must be from 0 to 29"):
        pipe("a house", image=small, noise_level=30)
    with pytest.raises(RequestError, match="enlarges an image"):
        pipe("a house")


@pytest.mark.fast
@pytest.mark.parametrize("kind", CONFIGS)
def test_training_rows_keep_their_picture_where_the_caption_is_dropped(kind):
    fields = CONFIGS[kind]["conditioner"]
    conditioner: Any = make_conditioner(fields, jnp.float32)
    settings = {"column": "depth"} if kind == "depth" else {}
    row_condition: Any = type(conditioner).row_condition(fields, settings, lambda: ())
    view = View(ImageTransform((32, 32)), Crop(0, 8, 32, 32, True), (32, 48))
    row = {"depth": np.arange(32 * 48, dtype=np.float32).reshape(32, 48)}
    picture = np.full((32, 32, 3), 90, np.uint8)
    value = row_condition(row, picture, view, np.random.default_rng(0))
    raw = {"caption": ["a", "b"], "condition": np.stack([value, value])}
    encoded = conditioner.encode_rows(raw)["encoded"]
    drop = jnp.array([True, False])
    dropped = conditioner.drop(encoded, conditioner.null_row(), drop)
    beside = "depth" if kind == "depth" else "picture"
    assert np.array_equal(dropped[beside], encoded[beside])
    assert encoded[beside].shape == (2, 16, 16, 1 if kind == "depth" else 3)
    assert (dropped["text"][0] != encoded["text"][0]).any()
    assert np.array_equal(dropped["text"][1], encoded["text"][1])
    assert row_condition.draw(np.stack([picture] * 2), raw["condition"]).shape == (2, 32, 32, 3)
