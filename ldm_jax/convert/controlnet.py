"""ControlNet checkpoints (Zhang et al. 2023, arXiv:2302.05543) for a model that they control.

Read are the original's .pth and .safetensors ("control_model." before each name, none, or beside a
whole Stable Diffusion), and folders and files of diffusers (ControlNetModel).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.targets import pick_params
from ldm_jax.convert.diffusers.components import class_of, read_json
from ldm_jax.convert.diffusers.tables import TABLES, modern
from ldm_jax.convert.diffusers.unets import unet_condition_from
from ldm_jax.convert.reader.lazy import LazyTensor, shown
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import source_shapes, to_ours
from ldm_jax.errors import ConversionError, LdmJaxError, TargetError
from ldm_jax.models.build import construct
from ldm_jax.models.controlnet import ControlNet, encoder
from ldm_jax.models.unet import FIELDS, UNet

_PREFIX = "control_model."
_OURS, _DIFFUSERS = "input_hint_block.", "controlnet_cond_embedding."
# Fields of a ControlNetModel beside those of a UNet2DConditionModel.
_OWN = """
    controlnet_conditioning_channel_order global_pool_conditions conditioning_channels
    conditioning_embedding_out_channels
"""
# Fields of the vector condition, which the shapes of its embedding decide.
_VECTOR = (
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


def read_controlnet(path: str | Path, unet: UNet) -> tuple[ControlNet, dict[str, Any]]:
    """Reads a ControlNet that controls ``unet``.

    What names and shapes do not decide (the number of heads) is that of the UNet.

    Args:
      path: A file, or a folder of diffusers.
      unet: The UNet.

    Returns:
      (the network, its parameters with the dtypes of the file).

    Raises:
      ReaderError: The file cannot be read.
      TargetError: It is no ControlNet, or one for another base model.
      ConversionError: Its arrays hold NaN or infinity.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    options: dict[str, Any] = {}
    if path.is_dir() or (folder / "config.json").is_file():
        options = _options(folder, unet)
    with open_checkpoint(path) as checkpoint:
        tensors = _own(checkpoint.tensors, path)
        theirs = any(name.startswith(_DIFFUSERS) for name in tensors)
        first = "conv_in.weight" if theirs else "input_blocks.0.0.weight"
        hint = f"{_DIFFUSERS}conv_in.weight" if theirs else f"{_OURS}0.weight"
        for name in (first, hint):
            if name not in tensors or len(tensors[name].shape) != 4:
                raise TargetError(f"{path} is no whole ControlNet: it lacks {name}")
        if (channels := tensors[hint].shape[1]) != 3:
            raise TargetError(f"{path}: hints of {channels} channels are not supported, only 3")
        fields: dict[str, Any] = {name: getattr(unet, name) for name in FIELDS}
        fields |= {"in_channels": tensors[first].shape[1], **options}
        net = ControlNet(**fields)
        table = TABLES[ControlNet](net) if theirs else table_of(net, "")
        shapes = param_shapes(net)
        try:
            found = modern(tensors, source_shapes(table, shapes))
            params = to_ours(table, found, shapes=shapes, where=str(path))
        except ConversionError as error:
            reason = f"{path} is a ControlNet for another base model: {_odd(error)}"
            raise TargetError(reason) from None
        arrays = {name: tensor.numpy() for name, tensor in found}
    odd = [shown(n) for n, a in arrays.items() if not np.isfinite(a.astype(np.float32)).all()]
    ConversionError.check(str(path), not_finite=odd)
    return net, params


def _own(tensors: Mapping[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Returns the ControlNet's tensors under names without a prefix."""
    if any(name.startswith(_PREFIX) for name in tensors):
        tensors = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
    if any(name == "lora_controlnet" or name.endswith((".up", ".down")) for name in tensors):
        raise TargetError(f"{path} is a Control-LoRA, which is not supported")
    if not any(name.startswith((_OURS, _DIFFUSERS)) for name in tensors):
        raise TargetError(f"{path} is no ControlNet: it has no arrays such as {_OURS}0.weight")
    return dict(tensors)


def _options(folder: Path, unet: UNet) -> dict[str, Any]:
    """Returns the fields that a folder's config.json gives; its heads must be those of the UNet."""
    config = read_json(folder / "config.json")
    if class_of(config) != "ControlNetModel":
        raise TargetError(f"{folder} is a {shown(class_of(config))}, not a ControlNetModel")
    given = {name: config.pop(name) for name in _OWN.split() if name in config}
    pick_params(
        "ControlNetModel",
        given,
        same="controlnet_conditioning_channel_order global_pool_conditions conditioning_channels",
        fixed={"conditioning_embedding_out_channels": [16, 32, 96, 256]},
    )
    order = given.get("controlnet_conditioning_channel_order", "rgb")
    if order not in ("rgb", "bgr"):
        raise TargetError(f"{folder}: the channel order {shown(order)} is neither rgb nor bgr")
    own = _unet(folder, config)
    heads, expected = (
        [(b.kind, b.channels_out, b.heads, b.depth) for _, b in encoder(net).blocks()]
        for net in (own, unet)
    )
    if heads != expected:
        raise TargetError(
            f"{folder} is a ControlNet for another base model: its blocks or heads are not those of"
            " this model's UNet"
        )
    return {"bgr": order == "bgr", "global_pool": bool(given.get("global_pool_conditions", False))}


def _unet(folder: Path, config: dict[str, Any]) -> UNet:
    """Returns the UNet whose encoder a config.json describes, without a vector condition."""
    fields = {name: value for name, value in config.items() if name not in _VECTOR}
    try:
        down = fields.get("down_block_types")
        if down is not None:
            fields["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(down)]
        return construct(UNet, "ControlNetModel", unet_condition_from(fields))
    except LdmJaxError as error:
        raise TargetError(f"{folder}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise TargetError(f"{folder}/config.json is not understood: {error}") from error


def _odd(error: ConversionError) -> str:
    """Returns the first of an error's names, in one line."""
    for kind in error.any():
        first = getattr(error, kind)[0]
        if kind == "misshapen":
            name, found, expected = first
            return f"{shown(name)} has the shape {found}, not {expected}"
        return f"{kind} {shown(first)}"
    return "its names do not fit"
