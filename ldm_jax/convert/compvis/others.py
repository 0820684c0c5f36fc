"""Models of the original that are neither a latent diffusion model nor a first stage.

Each is a module with five functions, which the general ones here call:

    whole(params, *, vgg, **options) -> Whole
    infer(names, tensors) -> Original
    config_of(original, modules) -> config
    original_of(config) -> Original
    describe(original) -> {label: text}
"""

import importlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Other(NamedTuple):
    """A kind of model.

    Attributes:
      target: Its class in the original.
      kind: That of its config here.
      mark: The name of an array that no other model has.
      module: The module that describes it.
    """

    target: str
    kind: str
    mark: str
    module: str


OTHERS = (
    Other(
        "taming.models.cond_transformer.Net2NetTransformer",
        "transformer",
        "transformer.tok_emb.weight",
        "ldm_jax.convert.compvis.net2net",
    ),
)


def of_target(target: str) -> Any:
    """Returns the module of an original's class; None if it is none of these."""
    return _module(other for other in OTHERS if other.target == target)


def of_config(config: Mapping[str, Any]) -> Any:
    """Returns the module of a config here; None if it is none of these."""
    return _module(other for other in OTHERS if other.kind == config.get("kind"))


def of_names(names: Collection[str]) -> Any:
    """Returns the module of a checkpoint with these names; None if it is none of these."""
    return _module(other for other in OTHERS if other.mark in names)


def _module(found: Any) -> Any:
    other = next(found, None)
    return None if other is None else importlib.import_module(other.module)
