"""Eight simulated devices on a CPU, programs compiled once per session, and a tiny model that answers to all of its inputs."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jax
import numpy as np
import pytest
from absl import flags

from ldm_jax import cli
from ldm_jax.checkpoint import load_model, save_model
from ldm_jax.latent import build, init_params
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.pipeline import Pipeline, load

ROOT = Path(__file__).parent.parent

KL = {
    "kind": "kl",
    "embed_dim": 4,
    "z_channels": 4,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "attn_type": "none",
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
}

# GroupNorm(32) of 32 channels is instance norm, in which an added time embedding cancels: the level of 64 channels sees the time.
TINY = {
    "kind": "latent_diffusion",
    "objective": "eps",
    "scale_factor": 0.5,
    "schedule": {"beta_schedule": "linear", "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 100},
    "first_stage": KL,
    "conditioner": {"kind": "bert", "dim": 16, "depth": 1, "max_seq_len": 12, "heads": 2, "head_dim": 8},
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "context_dim": 16,
    },
    "sampling": {"size": [16, 16], "steps": 4, "guidance": 3.0},
}


def pytest_configure() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # many tests, and their child processes, build the same programs
        cache = tempfile.mkdtemp(prefix="ldm_jax_xla_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        jax.config.update("jax_compilation_cache_dir", cache)


def pytest_unconfigure() -> None:
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if Path(cache).name.startswith("ldm_jax_xla_"):
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="session")
def quick_compiling() -> Iterator[None]:
    """On a CPU nearly all the time goes into compiling programs that run for an instant; unoptimised ones are no less exact."""
    old = {
        name: getattr(jax.config, name)
        for name in ("jax_disable_most_optimizations", "jax_persistent_cache_min_compile_time_secs")
    }
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    for name, value in old.items():
        jax.config.update(name, value)


def noisy(params: Any, seed: int, scale: float = 0.1) -> Any:
    """Parameters moved by noise, so that layers which start at zero do something."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [np.asarray(a) + scale * rng.standard_normal(a.shape).astype(np.float32) for a in leaves]
    )


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of a few thousand parameters; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = build(TINY, None, None)
    params = noisy(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)), 0)
    module = model.first_stage.module
    first_stage = noisy(jax.jit(lambda key: init_autoencoder(module, key))(jax.random.key(1)), 1)
    save_model(path, TINY, {**params, "first_stage": first_stage})
    return path
