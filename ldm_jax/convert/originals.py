"""The families of checkpoints whose YAML names a class: latent-diffusion and sgm.

Each function chooses the family, of a state dict by its names, of a YAML by its class and of a
config by its conditioner.
"""

from collections.abc import Mapping
from typing import Any

from ldm_jax.convert.compvis import infer as ldm_infer
from ldm_jax.convert.compvis import original as ldm_original
from ldm_jax.convert.compvis import whole as ldm_whole
from ldm_jax.convert.compvis.infer import Original, Shapes
from ldm_jax.convert.compvis.others import of_target
from ldm_jax.convert.compvis.whole import Whole
from ldm_jax.convert.sgm.engine import (
    ENGINE,
    config_of_engine,
    describe_engine,
    diffusion_engine,
    original_of_engine,
)
from ldm_jax.convert.sgm.infer import infer_engine, is_engine


def infer(tensors: Mapping[str, Any]) -> Original:
    """Returns the configuration of a state dict; see `compvis.infer.infer`.

    Raises:
      TargetError: It is of no known family.
    """
    if is_engine(tensors):
        return ldm_infer.infer(tensors, infer_engine)
    return ldm_infer.infer(tensors)


def whole_from_config(target: str, params: Mapping[str, Any], **options: Any) -> Whole:
    """Returns the checkpoint of a YAML's ``target`` and ``params``."""
    if target == ENGINE:
        return diffusion_engine(params, **options)
    return ldm_whole.whole_from_config(target, params, **options)


def config_of(
    original: Original, modules: Mapping[str, Any], scale_factor: float | None = None
) -> dict[str, Any]:
    """Returns the config of the model that ``original`` describes."""
    if original.target == ENGINE:
        return config_of_engine(original, modules)
    return ldm_original.config_of(original, modules, scale_factor)


def original_of(config: Mapping[str, Any]) -> Original:
    """Returns the original's description of a model; TargetError names what it cannot hold."""
    if config.get("conditioner", {}).get("kind") == "sdxl":
        return original_of_engine(config)
    return ldm_original.original_of(config)


def described(original: Original) -> dict[str, str] | None:
    """Returns {label: text} of a model that says itself what it consists of, else None."""
    if original.target == ENGINE:
        return describe_engine(original)
    own = of_target(original.target)
    return None if own is None else own.describe(original)


__all__ = ["Shapes", "config_of", "described", "infer", "original_of", "whole_from_config"]
