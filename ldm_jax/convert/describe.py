"""Describes a checkpoint from its names and shapes, for ``ldm-convert inspect``."""

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

from ldm_jax.convert.compvis.names import EMA, other_file
from ldm_jax.convert.originals import described, infer
from ldm_jax.convert.reader.reader import Checkpoint
from ldm_jax.errors import TargetError

_OPEN_CLIP = "cond_stage_model.model.positional_embedding"
# Names that only one family has; the first match wins.
FAMILIES: dict[str, tuple[str, ...]] = {
    "Stable Diffusion XL base (sgm)": (
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    ),
    "Stable Diffusion XL refiner (sgm)": ("conditioner.embedders.0.model.positional_embedding",),
    "Stable Diffusion XL, the UNet alone (sgm)": ("model.diffusion_model.label_emb.0.0.weight",),
    "Stable Diffusion x4 upscaler (CompVis)": (
        _OPEN_CLIP,
        "model.diffusion_model.label_emb.weight",
    ),
    "Stable Diffusion 2 (CompVis)": (_OPEN_CLIP,),
    "Stable Diffusion v1 (CompVis)": (
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    ),
    "latent diffusion (CompVis)": ("model.diffusion_model.time_embed.0.weight",),
    "transformer over codes (taming-transformers)": ("transformer.tok_emb.weight",),
    "VQGAN (taming-transformers) or VQ first stage": ("quantize.embedding.weight",),
    "KL first stage (CompVis)": ("post_quant_conv.weight",),
    "ControlNet (diffusers)": ("controlnet_cond_embedding.conv_in.weight",),
    "UNet of Stable Diffusion XL (diffusers)": ("add_embedding.linear_1.weight",),
    "UNet (diffusers)": ("time_embedding.linear_1.weight",),
    "CLIP text tower (transformers)": ("text_model.embeddings.position_embedding.weight",),
}


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns {label: text}, the lines of ``inspect``."""
    names, tree = checkpoint.tensors, checkpoint.tree if isinstance(checkpoint.tree, dict) else {}
    shadows = sum(name.startswith(EMA) for name in names)
    values = Counter[str]()
    for name, tensor in names.items():
        if not name.startswith(EMA):
            values[str(tensor.dtype)] += prod(tensor.shape)
    lines = {
        "file": f"{checkpoint.path.name} ({checkpoint.format})",
        "family": _family(names),
        **_architecture(checkpoint),
        "values": f"{sum(values.values()):,} in {len(names) - shadows} tensors without EMA",
        "dtype": ", ".join(f"{dtype} {n:,}" for dtype, n in values.most_common()),
        "EMA": f"{shadows} tensors" if shadows else "none",
        "step": ", ".join(
            f"{key} {tree[key]}"
            for key in ("epoch", "global_step")
            if isinstance(tree.get(key), int)
        )
        or "-",
    }
    if checkpoint.standins:
        lines["not loaded"] = ", ".join(
            f"{name} ({n})" for name, n in sorted(checkpoint.standins.items())
        )
    return lines


def _family(names: Mapping[str, Any]) -> str:
    for family, marks in FAMILIES.items():
        if all(mark in names for mark in marks):
            return family
    return other_file(names) or "unknown"


def _architecture(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the parts of a model of the original with their sizes, or {}."""
    try:
        original = infer(checkpoint.tensors)
    except TargetError:
        return {}
    if (own := described(original)) is not None:
        return own
    params = original.params
    if "unet_config" not in params:
        return {"first stage": _autoencoder(original.target, params)}
    unet, stage, conditioner = (
        params[f"{part}_config"] for part in ("unet", "first_stage", "cond_stage")
    )
    shown = (
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "attention_resolutions",
        "in_channels",
        "context_dim",
    )
    lines = {
        "UNet": ", ".join(
            f"{name} {unet['params'][name]}" for name in shown if name in unet["params"]
        ),
        "condition": _named(conditioner),
        "schedule": f"{params['beta_schedule']}, {params['timesteps']} steps",
    }
    return lines | (
        {"first stage": _autoencoder(stage["target"], stage["params"])}
        if stage.get("params")
        else {}
    )


def _autoencoder(target: str, params: dict[str, Any]) -> str:
    shown = {name: params[name] for name in ("embed_dim", "n_embed") if name in params}
    shown |= {
        name: params["ddconfig"][name] for name in ("ch", "ch_mult", "num_res_blocks", "z_channels")
    }
    return ", ".join((target.split(".")[-1], *(f"{name} {value}" for name, value in shown.items())))


def _named(section: Any) -> str:
    if not isinstance(section, dict):
        return str(section).strip("_").replace("_", " ")
    params = section.get("params", {})
    return ", ".join(
        (section["target"].split(".")[-1], *(f"{name} {value}" for name, value in params.items()))
    )
