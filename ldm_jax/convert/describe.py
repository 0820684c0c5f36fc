"""Describes a checkpoint from its names and shapes, for ``ldm-convert inspect``."""

from collections import Counter
from math import prod
from typing import Any

from ldm_jax.convert.compvis.names import EMA
from ldm_jax.convert.compvis.others import of_target
from ldm_jax.convert.originals import infer
from ldm_jax.convert.reader.reader import Checkpoint
from ldm_jax.errors import TargetError

# A name that only one family has; the first match wins.
FAMILIES = {
    "Stable Diffusion v1 (CompVis)": (
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    ),
    "latent diffusion (CompVis)": "model.diffusion_model.time_embed.0.weight",
    "transformer over codes (taming-transformers)": "transformer.tok_emb.weight",
    "VQGAN (taming-transformers) or VQ first stage": "quantize.embedding.weight",
    "KL first stage (CompVis)": "post_quant_conv.weight",
    "UNet (diffusers)": "time_embedding.linear_1.weight",
    "CLIP text tower (transformers)": "text_model.embeddings.position_embedding.weight",
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
        "family": next((family for family, name in FAMILIES.items() if name in names), "unknown"),
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


def _architecture(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the parts of a model of the original with their sizes, or {}."""
    try:
        original = infer(checkpoint.tensors)
    except TargetError:
        return {}
    params = original.params
    if (own := of_target(original.target)) is not None:
        return own.describe(original)
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
