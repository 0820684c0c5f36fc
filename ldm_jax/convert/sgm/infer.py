"""Infers the configuration of a Stable Diffusion XL checkpoint from its names and shapes."""

import re
from collections.abc import Mapping
from typing import Any

from ldm_jax.convert.compvis.infer import Original, Shapes, clip_fields, first_stage, unet_params
from ldm_jax.convert.compvis.names import EMBEDDERS, FIRST_STAGE, UNET
from ldm_jax.convert.compvis.targets import module_from_config
from ldm_jax.convert.compvis.whole import IDENTITIES
from ldm_jax.convert.sgm.embedders import config_of_embedders, numbers_in
from ldm_jax.convert.sgm.engine import ENGINE, KL_TARGET, UNET_TARGET
from ldm_jax.errors import TargetError
from ldm_jax.models.clip import CLIPText

_SGM = "sgm.modules.diffusionmodules"
BASE, REFINER = (
    ("original_size", "crop", "target_size"),
    ("original_size", "crop", "aesthetic_score"),
)


def is_engine(names: Mapping[str, Any]) -> bool:
    """Whether a state dict is that of a DiffusionEngine, whole or its UNet alone."""
    vector = f"{UNET}label_emb.0.0.weight" in names
    return vector or any(name.startswith(EMBEDDERS) for name in names)


def infer_engine(names: Shapes, tensors: Mapping[str, Any]) -> Original:
    """Returns the DiffusionEngine of a state dict; TargetError if it is not that of SDXL."""
    unet, assumed = unet_params(names.under(UNET))
    unet = {k: v for k, v in unet.items() if k not in ("use_spatial_transformer", "legacy")}
    params: dict[str, Any] = {"scale_factor": 0.13025, "disable_first_stage_autocast": True}
    scaling = "VScaling" if "v_pred" in names else "EpsScaling"
    assumed += [
        f"{scaling}: what the network predicts"
        + (", as the file has the marker v_pred" if "v_pred" in names else ""),
        "scale_factor 0.13025: of the latents",
        "size 1024: the side of the pictures in pixels",
    ]
    params["denoiser_config"] = {
        "target": f"{_SGM}.denoiser.DiscreteDenoiser",
        "params": {
            "num_idx": 1000,
            "scaling_config": {"target": f"{_SGM}.denoiser_scaling.{scaling}"},
            "discretization_config": {"target": f"{_SGM}.discretizer.LegacyDDPMDiscretization"},
        },
    }
    params["network_config"] = {"target": UNET_TARGET, "params": unet}
    params["conditioner_config"] = _conditioner(names.under(EMBEDDERS), unet)
    if names.any(FIRST_STAGE):
        inner = {n.removeprefix(FIRST_STAGE): t for n, t in tensors.items()}
        stage = first_stage(names.under(FIRST_STAGE), inner)
        target = KL_TARGET if stage.target.endswith("AutoencoderKL") else stage.target
        params["first_stage_config"] = {"target": target, "params": stage.params}
        assumed += stage.assumed
    else:
        params["first_stage_config"] = {"target": IDENTITIES[-1]}
    module_from_config(UNET_TARGET, unet)  # names what does not fit
    return Original(ENGINE, params, tuple(assumed))


def _conditioner(names: Shapes, unet: Mapping[str, Any]) -> dict[str, Any]:
    if not names:
        return {"target": IDENTITIES[0]}
    towers: dict[str, CLIPText] = {}
    for i in sorted({int(m[1]) for name in names if (m := re.match(r"(\d+)\.", name))}):
        inner = names.under(f"{i}.")
        if inner.any("transformer.text_model."):
            towers["clip_l"] = CLIPText(**clip_fields(inner.under("transformer.text_model.")))
        elif inner.any("model.transformer.resblocks."):
            towers["clip_g"] = _open_clip(inner.under("model."))
        else:
            raise TargetError(f"conditioner.embedders.{i} is of no known kind")
    if "clip_g" not in towers:
        raise TargetError("its conditioner lacks the tower of OpenCLIP")
    vector = BASE if "clip_l" in towers else REFINER
    rest = unet["adm_in_channels"] - (towers["clip_g"].projection_dim or 0)
    dim, left = divmod(rest, numbers_in(vector))
    if left or dim < 1:
        raise TargetError(
            f"the vector of {unet['adm_in_channels']} numbers is not that of SDXL; give the"
            " original's YAML with --config"
        )
    return config_of_embedders(towers, dict.fromkeys(towers, -2), vector, dim)


def _open_clip(names: Shapes) -> CLIPText:
    vocabulary, width = names["token_embedding.weight"]
    return CLIPText(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=names["transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=names.count(r"transformer\.resblocks\.(\d+)\."),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=names["positional_embedding"][0],
        projection_dim=names["text_projection"][1],
    )
