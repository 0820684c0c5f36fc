"""Building models from plain configs, initialising their parameters and checking loaded ones.

A model config is the content of ``config.json`` in a model directory::

    {"kind": "latent_diffusion", "unet": {...}, "first_stage": {"kind": "kl", ...},
     "scale_factor": 0.18, "conditioner": {"kind": "bert", ...}, "schedule": {...},
     "objective": "eps"}

A first stage alone has {"kind": "first_stage", "first_stage": {...}}.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.conditioning import Conditioner, make_conditioner
from ldm_jax.diffusion.objective import get_objective
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.errors import ConfigError, did_you_mean
from ldm_jax.kernels import REFERENCE
from ldm_jax.models.autoencoder import AutoencoderKL, init_autoencoder
from ldm_jax.models.ldm import FirstStage, FirstStageModule, LatentDiffusion
from ldm_jax.models.unet import UNet
from ldm_jax.models.vqgan import VQModelInterface

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# The activations that the backward pass recomputes instead of keeping: the inside of each block.
REMATS = {"none": False, "blocks": True}
FIRST_STAGES: dict[str, Callable[..., FirstStageModule | None]] = {
    "kl": AutoencoderKL,
    "vq": VQModelInterface,
    "identity": lambda dtype, remat: None,
}


def construct(
    factory: Callable[..., Any], what: str, fields: Mapping[str, Any], **extra: Any
) -> Any:
    """``factory(**fields, **extra)`` with lists as tuples.

    Args:
      factory: A module, or another function of a config's fields.
      what: The section of the config, for error messages.
      fields: From the config.
      extra: Arguments that a config cannot set.

    Raises:
      ConfigError: A field does not exist, is missing or has a wrong value.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    signature = inspect.signature(factory)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        known = [p for p in signature.parameters if p not in (*_INTERNAL, *extra)]
        for field in fields:
            if field not in known:
                raise ConfigError(
                    f"{what}: field {field!r} does not exist{did_you_mean(field, known)}"
                )
    try:
        return factory(**fields, **extra)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from None


_INTERNAL = ("parent", "name", "kernels")  # fields of a module that no config has


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a section of a model config; raises ConfigError where there is none."""
    if name not in config:
        raise ConfigError(f"model config: the section {name!r} is missing")
    try:
        return dict(config[name])
    except (TypeError, ValueError):  # by use: a ConfigDict is no Mapping
        raise ConfigError(
            f"model config: {name!r} is {config[name]!r}, not a section of fields"
        ) from None


def build_first_stage(
    config: Mapping[str, Any], dtype: str = "float32", remat: str = "none"
) -> FirstStageModule | None:
    """The autoencoder of a config's "first_stage", None for the identity; ``remat`` of `REMATS`.

    With "force_upcast" it computes in float32 where the model has float16, which its activations
    exceed.
    """
    fields, options = section(config, "first_stage"), {"remat": REMATS[remat]}
    kind = fields.pop("kind", None)
    if fields.pop("force_upcast", False) and dtype == "float16":
        dtype = "float32"
    if kind == "missing":  # converted from a file without one
        raise ConfigError("the model has no first stage (VAE): give one with --vae PATH")
    if kind not in FIRST_STAGES:
        raise ConfigError(
            f"first_stage: kind {kind!r} does not exist{did_you_mean(str(kind), FIRST_STAGES)}"
        )
    return construct(FIRST_STAGES[kind], "first_stage", fields, dtype=DTYPES[dtype], **options)


def build_conditioner(config: Mapping[str, Any], dtype: str = "float32") -> Conditioner:
    """The conditioner of a config's "conditioner"."""
    return make_conditioner(section(config, "conditioner"), DTYPES[dtype])


def build(
    config: Mapping[str, Any],
    params: Any,
    first_stage_params: Any,
    dtype: str = "float32",
    remat: str = "none",
) -> LatentDiffusion:
    """A LatentDiffusion of a config and its parameters.

    Args:
      config: See the module.
      params: Parameters, their shapes, or None to fill in later.
      first_stage_params: The same of the first stage.
      dtype: Of `DTYPES`, that of the products.
      remat: Of `REMATS`, for the UNet.

    Raises:
      ConfigError: The config is incomplete, or a field has a wrong value.
    """
    conditioner = build_conditioner(config, dtype)
    if "objective" not in config:
        raise ConfigError("model config: 'objective' is missing")
    get_objective(config["objective"])
    stage = build_first_stage(config, dtype)
    options = {"dtype": DTYPES[dtype], "remat": REMATS[remat]}
    return LatentDiffusion(
        params=params,
        first_stage=FirstStage(first_stage_params, config.get("scale_factor", 1.0), stage),
        schedule=construct(make_schedule, "schedule", section(config, "schedule")),
        unet=construct(UNet, "unet", section(config, "unet"), **options),
        conditioner=conditioner,
        objective=config["objective"],
        config_json=json.dumps(config),
    )


def init_params(model: LatentDiffusion, key: jax.Array) -> dict:
    """Initial float32 parameters {"unet", "conditioner"}; jit it, or take its `jax.eval_shape`."""
    model = model.with_kernels(REFERENCE)
    key_unet, key_conditioner = jax.random.split(key)
    conditioner = model.conditioner.init(key_conditioner)
    cond = jax.eval_shape(model.conditioner, conditioner, model.conditioner.encode_null(1))
    side = 2 ** (len(model.unet.channel_mult) - 1)
    x = jnp.zeros((1, side, side, model.unet.in_channels))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), cond)
    unet = model.unet.init(key_unet, x, jnp.zeros(1), zeros.crossattn, zeros.vector)["params"]
    return {"unet": unet, "conditioner": conditioner}


def check_params(model: LatentDiffusion) -> None:
    """Compares the parameters of a model with its config.

    Raises:
      ConfigError: One is missing, or has another shape.
    """
    present = dict(model.params)
    if model.first_stage.module is not None:
        present["first_stage"] = model.first_stage.params
    check_shapes(_param_shapes(model.config_json), present)


def check_shapes(expected: Any, present: Any) -> None:
    """Raises ConfigError where one of the ``expected`` arrays is missing or has another shape."""
    shapes = {path: leaf.shape for path, leaf in _leaves(present)}
    for path, leaf in _leaves(expected):
        if shapes.get(path) != leaf.shape:
            found = (
                f"has the shape {shapes[path]}, not {leaf.shape}"
                if path in shapes
                else "is missing"
            )
            raise ConfigError(f"the parameters do not fit this config: {path} {found}")


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree.leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


@lru_cache(maxsize=4)
def _param_shapes(config_json: str) -> dict[str, Any]:
    """Shapes of a config's parameters; cached, since the same model is often loaded twice."""
    model, key = build(json.loads(config_json), None, None), jax.random.key(0)
    expected, module = jax.eval_shape(lambda: init_params(model, key)), model.first_stage.module
    if module is not None:
        expected["first_stage"] = jax.eval_shape(lambda: init_autoencoder(module, key))
    return expected
