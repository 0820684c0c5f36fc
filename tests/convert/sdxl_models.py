"""Small models of Stable Diffusion XL's shape for tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build, init_params

TOWER = {
    "kind": "clip",
    "vocab_size": 49408,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
}
CLIP_L = {**TOWER, "hidden_size": 8}
CLIP_G = {**TOWER, "hidden_size": 16, "hidden_act": "gelu", "projection_dim": 12, "pad_token_id": 0}


def sdxl_config(refiner: bool = False, **changes: Any) -> dict[str, Any]:
    """The config of a small base model or refiner."""
    numbers = 5 if refiner else 6
    last = "aesthetic_score" if refiner else "target_size"
    return {
        "kind": "latent_diffusion",
        "objective": "eps",
        "scale_factor": 0.13025,
        "schedule": {
            "beta_schedule": "linear",
            "timesteps": 1000,
            "linear_start": 0.00085,
            "linear_end": 0.012,
        },
        "first_stage": {
            "kind": "kl",
            "embed_dim": 4,
            "z_channels": 4,
            "ch": 32,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "resolution": 32,
            "in_channels": 3,
            "out_ch": 3,
            "force_upcast": True,
        },
        "conditioner": {
            "kind": "sdxl",
            **({} if refiner else {"clip_l": CLIP_L}),
            "clip_g": CLIP_G,
            "vector": ["original_size", "crop", last],
            "size_dim": 4,
            "zero_empty": not refiner,
        },
        "unet": {
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "channel_mult": [1, 2],
            "num_head_channels": 16,
            "num_classes": "sequential",
            "adm_in_channels": 12 + 4 * numbers,
            "use_spatial_transformer": True,
            "transformer_depth": 1 if refiner else [1, 2],
            "context_dim": 16 if refiner else 24,
            "use_linear_in_transformer": True,
            "legacy": False,
        },
        "sampling": {"size": [32, 32], "guidance": 5.0, "sampler": "euler", "grid": "trailing"},
    } | changes


def random_params(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Random parameters of a config, none of them zero."""
    model, key = build(config, None, None), jax.random.key(0)
    shapes: dict[str, Any] = dict(jax.eval_shape(lambda: init_params(model, key)))
    stage = model.first_stage.module
    shapes["first_stage"] = jax.eval_shape(lambda: init_autoencoder(stage, key))
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> np.ndarray:
        scale = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.1
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, shapes)


def model_of(config: dict[str, Any]) -> Any:
    """A model of a config with random parameters."""
    params = jax.tree.map(jnp.asarray, random_params(config))
    stage = params.pop("first_stage")
    return build(config, params, stage)


def second_config(kind: str, **beside: Any) -> dict[str, Any]:
    """The config of a small model of Stable Diffusion 2 with a condition beside its text."""
    config, extra = sdxl_config(), {"depth": 1, "upscale": 3}[kind]
    text = {k: v for k, v in CLIP_G.items() if k != "projection_dim"}
    config["first_stage"].pop("force_upcast")
    config["conditioner"] = {"kind": kind, "text": text, "size": [16, 16], **beside}
    unet = config["unet"]
    unet |= {"in_channels": 4 + extra, "context_dim": 16, "transformer_depth": 1}
    unet |= {"num_classes": None, "adm_in_channels": None}
    if kind == "upscale":
        unet |= {"num_classes": 40, "disable_self_attentions": [False, True]}
        unet |= {"num_heads": 2, "num_head_channels": -1}
    config["unet"] = {k: v for k, v in unet.items() if v is not None}
    objective = {"depth": "eps", "upscale": "v"}[kind]
    sampling = {"size": [32, 32], "guidance": 7.5}
    return config | {"objective": objective, "sampling": sampling}
