"""The networks that a LoRA can change, and the tables that name their layers."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from ldm_jax.conditioning import make_conditioner
from ldm_jax.convert.compvis.networks import table_of
from ldm_jax.convert.diffusers.components import MODULES
from ldm_jax.convert.diffusers.tables import TABLES
from ldm_jax.convert.tables import Path, Table

# Name of a conditioner's tower -> the network; a sole tower has the name "".
_TOWERS = {"": "text", "clip_l": "text", "clip_g": "text 2"}


class Named(NamedTuple):
    """A table that names the layers of a network.

    Attributes:
      network: "unet", "text" or "text 2".
      path: The path of the network's parameters.
      table: The table.
      diffusers: Whether the names are those of diffusers and transformers, not the original's.
    """

    network: str
    path: Path
    table: Table
    diffusers: bool


def tables_of(config: Mapping[str, Any]) -> Iterator[Named]:
    """Yields the tables of a model's UNet and text towers."""
    if "unet" in config:
        unet = MODULES["unet"](dict(config))
        yield Named("unet", ("unet",), TABLES[type(unet)](unet), True)
        yield Named("unet", ("unet",), table_of(unet, ""), False)
    if "conditioner" in config:
        for name, text in make_conditioner(config["conditioner"], jnp.float32).towers.items():
            if (tower := type(text.module)) in TABLES:
                path = ("conditioner", name) if name else ("conditioner",)
                yield Named(_TOWERS.get(name, name), path, TABLES[tower](text.module), True)
