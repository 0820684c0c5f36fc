"""LoRA files merged into a model equal recorded results of kohya, LyCORIS and peft."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ldm_jax.convert.compvis.networks import table_of
from ldm_jax.convert.compvis.targets import clip_text_from_params, unet_from_params
from ldm_jax.convert.lora import merge_lora
from ldm_jax.convert.lora.deltas import delta
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Entry, as_ours, flatten, nest, to_theirs
from ldm_jax.errors import ConversionError, TargetError

FOLDER = Path(os.environ.get("LDM_JAX_GOLDEN2", Path(__file__).parents[3] / "shared" / "golden2"))
CASES = ["lora_kohya", "lora_peft", "lora_locon", "lora_loha", "lora_lokr", "lora_dora"]
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."

needs_data = pytest.mark.skipif(
    not (FOLDER / "manifest.json").is_file(), reason="no reference data"
)


@pytest.fixture(scope="module")
def base():
    """(config, params, table) of the recorded base model, from the tensors of its case."""
    manifest = json.loads((FOLDER / "manifest.json").read_text())["cases"]
    kwargs = manifest["sd1_base"]["kwargs"]
    unet = unet_from_params(kwargs["unet_config"]["params"])
    text = clip_text_from_params(
        kwargs["clip_text"] | {"vocab_size": kwargs["vocab_size"], "max_position_embeddings": 77}
    )
    weights = load_file(FOLDER / "sd1_base.safetensors")
    weights = {n.removeprefix("param/"): a for n, a in weights.items() if n.startswith("param/")}
    with open_checkpoint(FOLDER / "ckpt_sd2.ckpt") as checkpoint:
        stored = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
    stored = {n: a for n, a in stored.items() if not n.startswith("cond_stage_model.model.")}
    weights = {n: a.astype(np.float32) for n, a in (stored | weights).items()}
    rows = [("unet", e) for e in table_of(unet, UNET)] + [
        ("conditioner", e) for e in table_of(text, TEXT)
    ]
    flat = {
        (part, *e.path): as_ours(e, weights[e.source]) for part, e in rows if isinstance(e, Entry)
    }
    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    params = kwargs["unet_config"]["params"]
    drop = ("image_size", "use_checkpoint")
    config = {
        "kind": "latent_diffusion",
        "unet": {name: value for name, value in params.items() if name not in drop},
        "conditioner": {"kind": "clip", **fields},
    }
    return config, nest(flat), (unet, text), manifest


def stored_names(params, modules):
    unet, text = modules
    return to_theirs(table_of(unet, UNET), params["unet"]) | to_theirs(
        table_of(text, TEXT), params["conditioner"]
    )


@needs_data
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_merged_weights_are_the_originals(base, name, strength):
    config, params, modules, manifest = base
    spec, recorded = manifest[name], load_file(FOLDER / f"{name}.safetensors")
    merged = stored_names(merge_lora(config, params, FOLDER / spec["lora_file"], strength), modules)
    before = stored_names(params, modules)

    def close(key, ours):
        theirs = recorded[f"out/{key}"]
        allowed = spec["atol"][key] + spec["rtol"] * np.abs(theirs)
        assert (np.abs(ours - theirs) <= allowed).all(), (key, np.abs(ours - theirs).max())

    touched = spec["touched_keys"]
    assert {k for k in merged if not np.array_equal(merged[k], before[k])} == set(touched)
    if strength == 1.0:
        for key in (k for k in spec["atol"] if k.startswith("merged/")):
            close(key, merged[key.removeprefix("merged/")])
    deltas = [(merged[k].astype(np.float64) - before[k]).reshape(-1) for k in touched]
    tag = f"{strength * 10:02.0f}"
    close(f"delta_l1_{tag}", np.array([np.abs(d).sum() for d in deltas]))
    close(f"delta_dot_{tag}", np.array([(d * np.cos(np.arange(d.size))).sum() for d in deltas]))


@needs_data
def test_names_without_a_layer_and_other_bases_are_refused(base, tmp_path):
    config, params, _, _ = base
    arrays = load_file(FOLDER / "lora_kohya.weights.safetensors")
    odd = "lora_unet_no_such_layer.lora_down.weight"
    save_file(arrays | {odd: np.zeros((4, 32), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match="lora_unet_no_such_layer"):
        merge_lora(config, params, tmp_path / "a.safetensors")
    with pytest.raises(TargetError, match="another base model"):
        merge_lora(config, params, FOLDER / "lora_sdxl_kohya.weights.safetensors")
    wide = {
        n: np.concatenate([a, a], -1) if "to_k.lora_down" in n else a for n, a in arrays.items()
    }
    wide |= {
        n: np.concatenate([a] * 2, 1)
        for n, a in arrays.items()
        if n.endswith("attn2_to_k.lora_down.weight")
    }
    save_file(wide, tmp_path / "b.safetensors")
    with pytest.raises(TargetError, match=r"another base model: .* other shapes"):
        merge_lora(config, params, tmp_path / "b.safetensors")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "c.safetensors")
    with pytest.raises(TargetError, match="no LoRA"):
        merge_lora(config, params, tmp_path / "c.safetensors")


def test_without_alpha_the_scale_is_one_and_above_the_rank_it_exceeds_one():
    rng = np.random.default_rng(0)
    up, down = rng.normal(size=(6, 2)), rng.normal(size=(2, 5))
    arrays = {"up": up.astype(np.float32), "down": down.astype(np.float32)}
    np.testing.assert_allclose(delta("x", arrays, (6, 5), None), up @ down, rtol=1e-5)
    np.testing.assert_allclose(delta("x", arrays, (6, 5), 8.0), 4 * up @ down, rtol=1e-5)
    own = arrays | {"alpha": np.float32(1)}
    np.testing.assert_allclose(delta("x", own, (6, 5), 8.0), up @ down / 2, rtol=1e-5)
    with pytest.raises(ConversionError, match="found"):
        delta("x", arrays, (6, 6), None)
    with pytest.raises(ConversionError, match="missing"):
        delta("x", {"up": arrays["up"]}, (6, 5), None)


def test_flatten_keeps_the_tree():
    tree = {"a": {"b": np.zeros(1)}, "c": np.ones(1)}
    assert nest(flatten(tree)) == tree
