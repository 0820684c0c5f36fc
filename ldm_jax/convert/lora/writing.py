"""LoRA that was trained here, under the names of kohya and of peft."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from ldm_jax.convert.lora.names import tables_of
from ldm_jax.convert.tables import CONV, Entry, flatten
from ldm_jax.convert.tables import Path as ParamPath
from ldm_jax.errors import TargetError
from ldm_jax.io.atomic import atomic_path

KIND = "lora"  # of a model directory's config
# Network -> the prefix of its layers. With two text towers kohya counts them from 1.
_KOHYA = {"unet": "lora_unet_", "text": "lora_te_", "text 2": "lora_te2_"}
_PEFT = {"unet": "unet.", "text": "text_encoder.", "text 2": "text_encoder_2."}


class Source(NamedTuple):
    """The layer of a kernel: its network, its name with dots, and how its axes move."""

    network: str
    name: str
    entry: Entry
    diffusers: bool


def to_kohya(config: Mapping[str, Any], params: Mapping[str, Any], out: Path) -> None:
    """Writes a LoRA with the names of kohya's sd-scripts, which A1111's and other programs read.

    Raises:
      TargetError: The model is no LoRA.
    """
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.get("rank")),
        "ss_network_alpha": str(config.get("alpha")),
    }
    _save(kohya_arrays(config, params), out, about)


def to_peft(config: Mapping[str, Any], params: Mapping[str, Any], out: Path) -> None:
    """Writes a LoRA with the names of peft, which diffusers' ``load_lora_weights`` reads.

    alpha / rank is multiplied into the factors, since readers take alpha to be the rank.

    Raises:
      TargetError: The model is no LoRA, or has layers without a name in diffusers.
    """
    scale, arrays = np.float32(_scale(config)), {}
    for source, down, up in _layers(config, params, diffusers=True):
        if not source.diffusers:
            raise TargetError(
                f"{source.name} has no name in diffusers: export this LoRA with --to kohya"
            )
        base = _PEFT[source.network] + source.name
        arrays |= {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": scale * up}
    _save(arrays, out, {"format": "pt"})


def kohya_arrays(config: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of a LoRA by kohya's names."""
    _scale(config)
    # kohya names the layers of Stable Diffusion XL's UNet as its authors do.
    xl = config["unet"].get("num_classes") == "sequential"
    prefixes = _KOHYA | ({"text": "lora_te1_"} if xl else {})
    alpha, arrays = np.full((), config["alpha"], np.float32), {}
    for source, down, up in _layers(config, params, diffusers=not xl):
        base = prefixes[source.network] + source.name.replace(".", "_")
        arrays |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
        arrays[f"{base}.alpha"] = alpha
    return arrays


def _scale(config: Mapping[str, Any]) -> float:
    """Returns alpha / rank."""
    if config.get("kind") != KIND:
        raise TargetError(f"a {config.get('kind')} is no LoRA: give the model directory of one")
    return config["alpha"] / config["rank"]


def _layers(
    config: Mapping[str, Any], params: Mapping[str, Any], *, diffusers: bool
) -> list[tuple[Source, np.ndarray, np.ndarray]]:
    """Returns (source, down, up) of each layer, the arrays float32 in PyTorch's layout.

    Args:
      config: The config of a LoRA.
      params: Its factors.
      diffusers: Prefer the names of diffusers to those of the original for the UNet.
    """
    sources, layers = _sources(config, diffusers), []
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}
    for path in sorted({path[:-1] for path in leaves}):
        if path not in sources:
            raise TargetError(f"{'/'.join(path)} has no name in other programs' files")
        source, down, up = sources[path], leaves[*path, "down"], leaves[*path, "up"]
        op = source.entry.op
        if op is CONV:  # the kernel's window is in "down"
            up = up[None, None]
        down, up = (np.ascontiguousarray(op.to_theirs(a)) for a in (down, up))
        layers.append((source, down, up))
    return layers


def _sources(config: Mapping[str, Any], diffusers: bool) -> dict[ParamPath, Source]:
    """Returns {path of a kernel: its layer}."""
    found: dict[ParamPath, Source] = {}
    tables = list(tables_of(config))
    for named in sorted(tables, key=lambda t: t.diffusers != diffusers):
        for entry in named.table:
            if isinstance(entry, Entry) and entry.path[-1] == "kernel" and entry.part[1] == 1:
                name = entry.source.removesuffix(".weight")
                source = Source(named.network, name, entry, named.diffusers)
                found.setdefault((*named.path, *entry.path), source)
    return found


def _save(arrays: dict[str, np.ndarray], out: Path, metadata: dict[str, str]) -> None:
    with atomic_path(out) as partial:
        save_file(arrays, partial, metadata=metadata)
