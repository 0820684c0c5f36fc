"""The models that the benchmarks time: the demo and Stable Diffusion v1's shapes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ldm_jax
from ldm_jax.kernels import cores
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build, init_params
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.sampling.pipeline import Pipeline, load

SD = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attention_resolutions": (1, 2, 4),
    "num_heads": 8,
    "use_spatial_transformer": True,
    "context_dim": 768,
}
F8 = {
    "embed_dim": 4,
    "z_channels": 4,
    "ch": 128,
    "ch_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_type": "vanilla",
}
SD_V1: dict[str, Any] = {
    "kind": "latent_diffusion",
    "objective": "eps",
    "schedule": {
        "beta_schedule": "linear",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": 1000,
    },
    "first_stage": {
        "kind": "kl",
        **F8,
        "attn_resolutions": (),
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
    },
    "scale_factor": 0.18215,
    "conditioner": {"kind": "embeddings", "dim": 768, "count": 77},  # what its text tower gives
    "unet": SD,
    "sampling": {"size": (512, 512), "steps": 50, "guidance": 7.5},
}


def config_of(case: str) -> dict[str, Any]:
    """A model's config."""
    if case == "emoji":
        return json.loads((Path(ldm_jax.__file__).parent / "assets/emoji/config.json").read_text())
    return json.loads(json.dumps(SD_V1))


def bare(case: str, dtype: str) -> tuple[LatentDiffusion, tuple[int, int]]:
    """A model whose parameters are shapes, and the size of its pictures."""
    model, key = build(config_of(case), None, None, dtype), jax.random.key(0)
    params = _cast(jax.eval_shape(lambda key: init_params(model, key), key), dtype)
    module: Any = model.first_stage.module
    stage = _cast(jax.eval_shape(lambda key: init_autoencoder(module, key), key), dtype)
    height, width = config_of(case)["sampling"]["size"]
    first_stage = dataclasses.replace(model.first_stage, params=stage)
    return dataclasses.replace(model, params=params, first_stage=first_stage), (height, width)


def pipeline(case: str, dtype: str) -> Pipeline:
    """Returns the demo with its weights, another model with random ones; on all CPU cores."""
    devices = None if cores.devices() else 1
    if case == "emoji":
        return load("emoji", dtype=dtype, devices=devices)  # type: ignore[arg-type]
    model, _ = bare(case, dtype)
    params, stage = random_like(model.params, dtype), random_like(model.first_stage.params, dtype)
    return Pipeline(build(config_of(case), params, stage, dtype), dtype=dtype, devices=devices)


def _cast(shapes: Any, dtype: str) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), shapes)


def random_like(shapes: Any, dtype: str) -> Any:
    """Returns non-zero parameters of these shapes, so that zero-initialised layers count."""
    rng = np.random.default_rng(0)

    def some(path: Any, leaf: Any) -> np.ndarray:
        fan_in = max(int(np.prod(leaf.shape[:-1])), 1)
        centre = 1.0 if path[-1].key == "scale" else 0.0
        value = centre + 0.5 * rng.standard_normal(leaf.shape, np.float32) / np.float32(
            np.sqrt(fan_in)
        )
        return value.astype(jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(some, shapes)
