"""CLIP models: names of OpenAI and of transformers, both towers, resizing with aligned corners."""

import json

import jax
import numpy as np
import pytest
from conftest import random_params
from safetensors.numpy import load_file, save_file

from ldm_jax.conditioning.clip_vector import ClipVector
from ldm_jax.convert.clip import from_clip, is_clip
from ldm_jax.convert.clip.reading import clip_from_shapes, config_of
from ldm_jax.convert.clip.tables import openai_table, transformers_table
from ldm_jax.convert.conversion import convert, export, read_any
from ldm_jax.convert.tables import to_theirs
from ldm_jax.errors import ConfigError, ConversionError, TargetError
from ldm_jax.models.clip import CLIP, CLIPText, CLIPVision, clip_from_config, fit_pixels
from ldm_jax.models.clip_resnet import CLIPResNet
from ldm_jax.nn.resize import resize_corners

RNG = np.random.default_rng(0)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
TEXT = CLIPText(
    **SIZES, intermediate_size=96, vocab_size=300, max_position_embeddings=9, projection_dim=24
)
VISION = {
    "vit": CLIPVision(
        **SIZES, intermediate_size=96, image_size=32, patch_size=16, projection_dim=24
    ),
    "resnet": CLIPResNet(
        layers=(1, 2, 1, 1), width=8, num_attention_heads=4, image_size=64, projection_dim=24
    ),
}


def model_of(kind):
    """A tiny CLIP with random parameters."""
    model = CLIP(TEXT, VISION[kind])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = random_params(shapes, 0)
    params = jax.tree.map_with_path(
        lambda path, a: np.abs(a) + 0.5 if path[-1].key == "var" else a, params
    )
    return model, params


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_file_of_openai_becomes_a_model_directory_and_a_file_again(kind, tmp_path):
    model, params = model_of(kind)
    arrays = to_theirs(openai_table(model), params)
    assert clip_from_shapes({name: a.shape for name, a in arrays.items()}) == model
    file = tmp_path / "clip.safetensors"
    save_file(arrays, file)
    assert is_clip(file)
    convert(file, tmp_path / "model")
    config, found = read_any(tmp_path / "model")
    assert clip_from_config(config) == model
    same(found, params)
    export(tmp_path / "model", "clip", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    # The sizes that old files hold as arrays, and counters of batches, are not needed.
    assert {name for name in arrays if name not in again} <= {
        "input_resolution",
        "context_length",
        "vocab_size",
    }
    same({name: arrays[name] for name in again}, again)


def test_a_folder_of_transformers_is_the_same_model(tmp_path):
    model, params = model_of("vit")
    save_file(to_theirs(transformers_table(model), params), tmp_path / "model.safetensors")
    tower = {"num_hidden_layers": 2, "num_attention_heads": 1, "hidden_size": 64}
    tower |= {"intermediate_size": 96, "min_length": 0, "model_type": "clip_text_model"}
    text = {**tower, "vocab_size": 300, "max_position_embeddings": 9, "eos_token_id": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    config = {"projection_dim": 24, "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = from_clip(tmp_path)
    assert clip_from_config(found.config) == model
    same(found.params, params)
    config["vision_config"]["attention_dropout"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TargetError, match="attention_dropout"):
        from_clip(tmp_path)


def test_what_is_no_clip_model_is_named(tmp_path):
    model, params = model_of("vit")
    arrays = to_theirs(openai_table(model), params)
    del arrays["ln_final.bias"]
    save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match=r"missing \(1\):\n    ln_final.bias"):
        from_clip(tmp_path / "a.safetensors")
    save_file({"x": np.ones(1)}, tmp_path / "b.safetensors")
    assert not is_clip(tmp_path / "b.safetensors")
    with pytest.raises(TargetError, match="names and shapes of no CLIP model"):
        from_clip(tmp_path / "b.safetensors")
    config = config_of(model)
    for changed, message in (
        ({**config, "kind": "first_stage"}, "a first_stage is no CLIP model"),
        ({**config, "vision": {"kind": "vitt"}}, "kind 'vitt' does not exist"),
        ({**config, "conditioner": {"kind": "clip", "width": 3}}, "field 'width' does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            clip_from_config(changed)


@pytest.mark.fast
def test_arguments_that_a_vector_cannot_have_are_refused():
    assert ClipVector(TEXT, n_repeat=2).module == TEXT
    for options, message in (
        ({"n_repeat": 0}, "n_repeat 0 must be at least 1"),
        ({"weighted": True}, "weighted is for contexts of tokens"),
        ({"clip_skip": 2}, "clip_skip is for contexts of tokens"),
        ({"module": TEXT.clone(projection_dim=None)}, "projection_dim is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            ClipVector(**{"module": TEXT, **options})


@pytest.mark.fast
def test_corners_stay_and_a_blur_goes_before_shrinking():
    x = RNG.standard_normal((1, 30, 20, 2)).astype(np.float32)
    larger = np.asarray(resize_corners(x, (59, 20)))
    np.testing.assert_allclose(larger[:, ::2], x, atol=1e-5)  # every second pixel is one of x
    np.testing.assert_array_equal(resize_corners(x, (30, 20), antialias=True), x)
    same(resize_corners(x, (59, 39), antialias=True), resize_corners(x, (59, 39)))

    # Shrinking the height by three: a Gaussian of standard deviation 1 over five pixels.
    shrunk = np.asarray(resize_corners(x, (10, 20), antialias=True))
    offsets = np.arange(-2, 3)
    weights = np.exp(-(offsets**2) / 2)
    padded = np.pad(x, ((0, 0), (2, 2), (0, 0), (0, 0)), mode="reflect")
    blurred = sum(w * padded[:, 2 + i : 32 + i] for i, w in zip(offsets, weights, strict=True))
    blurred = (blurred / weights.sum()).astype(np.float32)
    np.testing.assert_allclose(shrunk, resize_corners(blurred, (10, 20)), atol=1e-5)
    assert fit_pixels(x[..., :1].repeat(3, -1), 8).shape == (1, 8, 8, 3)
