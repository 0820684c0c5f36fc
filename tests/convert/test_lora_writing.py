"""LoRA that was trained here, under the names of kohya and of peft."""

import jax
import numpy as np
import pytest
from conftest import TINY, random_params
from safetensors import safe_open
from sdxl_models import sdxl_config

from ldm_jax.conditioning import make_conditioner
from ldm_jax.convert.conversion import export
from ldm_jax.convert.lora import merge_lora
from ldm_jax.convert.tables import flatten
from ldm_jax.errors import TargetError
from ldm_jax.io.checkpoint import save_model
from ldm_jax.models.build import build, init_params
from ldm_jax.train import adapters

pytestmark = pytest.mark.fast


def test_names_of_stable_diffusion_xl(tmp_path):
    config = sdxl_config()
    model = build(config, None, None)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    patterns = [r"attn2/to_k$", "out_conv$", "proj_in$", r"clip_l/layers_0/q$", "clip_g/.*fc2$"]
    targets = adapters.find_targets(shapes, patterns)
    factors = jax.eval_shape(lambda: adapters.init_factors(shapes, targets, 2, jax.random.key(0)))
    factors = random_params(factors, 0)
    factors = jax.tree.map(lambda a: a + np.float32(0.1), factors)
    sections = {name: config[name] for name in ("unet", "conditioner")}
    about = {"kind": "lora", "rank": 2, "alpha": 1.0, **sections}
    save_model(tmp_path / "lora", about, factors)
    expected = flatten(adapters.with_factors(params, factors, 0.5))
    prefixes = {
        "kohya": {"lora_unet_input", "lora_unet_middle", "lora_unet_output", "lora_unet_out"},
        "peft": {"unet", "text_encoder", "text_encoder_2"},
    }
    prefixes["kohya"] |= {"lora_te1_text", "lora_te2_text"}
    for to, known in prefixes.items():
        export(tmp_path / "lora", to, tmp_path / f"{to}.safetensors")
        with safe_open(tmp_path / f"{to}.safetensors", "np") as file:
            names = set(file.keys())
        parts = {n.split(".")[0] if to == "peft" else "_".join(n.split("_")[:3]) for n in names}
        assert {p.split(".")[0] for p in parts} <= known
        merged = flatten(merge_lora(config, params, tmp_path / f"{to}.safetensors"))
        changed = {path for path in merged if merged[path].any()}
        assert changed == set(targets)
        for path in targets:
            np.testing.assert_allclose(merged[path], expected[path], rtol=1e-5, atol=1e-6)


def test_a_plan_of_stable_diffusion_xl_needs_no_captions():
    conditioner = make_conditioner(sdxl_config()["conditioner"], np.float32)
    rows = conditioner.encode_rows(conditioner.example_rows((32, 32)))["encoded"]
    captions = conditioner.encode_rows({"caption": ["x"]})["encoded"]
    assert jax.tree.map(np.shape, rows) == jax.tree.map(np.shape, captions)


def test_layers_without_a_name_in_diffusers_are_for_kohya_alone(tmp_path):
    unet = {**TINY["unet"], "use_spatial_transformer": False, "context_dim": None}
    layer = {"down": np.ones((64, 1), np.float32), "up": np.ones((1, 192), np.float32)}
    about = {"kind": "lora", "rank": 1, "alpha": 1.0, "unet": unet}
    save_model(tmp_path / "lora", about, {"unet": {"middle_block_1": {"qkv": {"kernel": layer}}}})
    with pytest.raises(TargetError, match=r"middle_block\.1\.qkv has no name in diffusers"):
        export(tmp_path / "lora", "peft", tmp_path / "a.safetensors")
    export(tmp_path / "lora", "kohya", tmp_path / "a.safetensors")
    params = {"unet": {"middle_block_1": {"qkv": {"kernel": np.zeros((64, 192), np.float32)}}}}
    merged = merge_lora({"unet": unet}, params, tmp_path / "a.safetensors")
    assert (merged["unet"]["middle_block_1"]["qkv"]["kernel"] == 1).all()
