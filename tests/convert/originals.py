"""A tiny model of every published kind under the original's names, shared by these tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from ldm_jax.convert.compvis.infer import LATENT_DIFFUSION
from ldm_jax.convert.compvis.whole import Whole, whole_from_config
from ldm_jax.convert.tables import flatten, to_theirs

EMBEDDERS = "ldm.modules.encoders.modules"
UNET: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_head_channels": 32,
}
CODER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [128],
    "dropout": 0.0,
}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": CODER},
}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 4,
        "n_embed": 9,
        "ddconfig": CODER | {"double_z": False, "attn_resolutions": []},
    },
}
BERT = {"n_embed": 16, "n_layer": 1, "max_seq_len": 6}


def model(stage: Any, conditioner: Any, unet: dict[str, Any] = {}, **params: Any) -> dict[str, Any]:  # noqa: B006
    """Parameters of a tiny LatentDiffusion."""
    unet_config = {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": UNET | unet,
    }
    return {
        "timesteps": 50,
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "image_size": 8,
        "unet_config": unet_config,
        "first_stage_config": stage,
        "cond_stage_config": conditioner,
    } | params


def crossattn(context: int) -> dict[str, Any]:
    return {"use_spatial_transformer": True, "context_dim": context}


# name -> (target, params): one of each kind that is published, in small.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (
        LATENT_DIFFUSION,
        model(
            KL,
            {"target": f"{EMBEDDERS}.BERTEmbedder", "params": BERT},
            crossattn(16),
            conditioning_key="crossattn",
            scale_factor=0.2,
        ),
    ),
    "class": (
        LATENT_DIFFUSION,
        model(
            VQ,
            {
                "target": f"{EMBEDDERS}.ClassEmbedder",
                "params": {"embed_dim": 12, "n_classes": 5, "key": "label"},
            },
            crossattn(12),
            conditioning_key="crossattn",
        ),
    ),
    "clip inpainting": (
        "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
        model(
            KL,
            {
                "target": f"{EMBEDDERS}.TinyCLIP",
                "params": {
                    "vocab_size": 20,
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 1,
                }
                | {"num_attention_heads": 1, "max_position_embeddings": 7},
            },
            crossattn(16) | {"in_channels": 9},
            conditioning_key="hybrid",
            scale_factor=1.0,
            finetune_keys=None,
        ),
    ),
    "rescale": (
        LATENT_DIFFUSION,
        model(
            VQ,
            {
                "target": f"{EMBEDDERS}.SpatialRescaler",
                "params": {"in_channels": 3, "out_channels": 2},
            },
            {"in_channels": 6, "resblock_updown": True, "use_scale_shift_norm": True},
            concat_mode=True,
            scale_by_std=True,
        ),
    ),
    "held twice": (
        LATENT_DIFFUSION,
        model(VQ, "__is_first_stage__", {"in_channels": 9}, concat_mode=True),
    ),
    "small picture": (
        LATENT_DIFFUSION,
        model(
            VQ,
            {"target": "torch.nn.Identity"},
            {"in_channels": 7},
            conditioning_key="concat",
            scale_factor=1.0,
        ),
    ),
    "unconditional": (
        LATENT_DIFFUSION,
        model(
            KL,
            "__is_unconditional__",
            {"conv_resample": False},
            learn_logvar=True,
            scale_by_std=True,
        ),
    ),
    "ready-made": (
        LATENT_DIFFUSION,
        model(
            KL,
            {"target": "torch.nn.Identity"},
            crossattn(12),
            conditioning_key="crossattn",
            scale_factor=1.0,
        ),
    ),
    "kl": (KL["target"], KL["params"]),
    "vqgan": (
        "taming.models.vqgan.VQModel",
        {**VQ["params"], "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"}},
    ),
    "gumbel": ("taming.models.vqgan.GumbelVQ", VQ["params"]),
}


def arrays_of(whole: Whole, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random arrays under the original's names, with consistent constants and duplicates."""
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {}
    for path, shape in flatten(whole.shapes).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        draw = (0.1 * rng.standard_normal(shape.shape)).astype(dtype)
        node[path[-1]] = np.int32(3) if path[-1] == "count" else draw + (path[-1] == "scale")
    return to_theirs(whole.table, {part: tree.get(part, {}) for part in whole.shapes})


Written = Callable[..., Path]


def writer(folder: Path) -> Written:
    """``written(name)`` writes one of MODELS as .safetensors and .yaml into ``folder``."""
    there: dict[tuple[Any, ...], Path] = {}

    def write(name: str, dtype: Any = np.float32, **options: Any) -> Path:
        key = name, np.dtype(dtype).name, *options
        if key not in there:
            target, params = MODELS[name]
            there[key] = path = folder / f"{len(there)}.safetensors"
            save_file(arrays_of(whole_from_config(target, params, **options), dtype), path)
            text = yaml.safe_dump({"model": {"target": target, "params": params}})
            path.with_suffix(".yaml").write_text(text)
        return there[key]

    return write


def stderr_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()
