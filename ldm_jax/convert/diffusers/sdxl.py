"""The two text towers of a Stable Diffusion XL pipeline folder, and the section of our config."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.convert.sgm.embedders import numbers_in
from ldm_jax.convert.sgm.infer import BASE, REFINER
from ldm_jax.errors import TargetError

# Tower -> its folder and that of its tokenizer.
FOLDERS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
TEXT, IMAGE = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
PIPELINES = (TEXT, IMAGE)


def section_of(index: Mapping[str, Any], unet: Mapping[str, Any], towers: Config) -> Config:
    """Returns the "conditioner" section.

    Args:
      index: The content of model_index.json.
      unet: The config.json of the UNet.
      towers: {"clip_l", "clip_g"} -> the sections of the towers.

    Raises:
      TargetError: The UNet's vector is not made of these towers and numbers.
    """
    vector = REFINER if index.get("requires_aesthetics_score") else BASE
    dim, width = unet.get("addition_time_embed_dim"), towers["clip_g"].get("projection_dim")
    found = unet.get("projection_class_embeddings_input_dim")
    if dim is None or found != (width or 0) + numbers_in(vector) * dim:
        raise TargetError(
            f"its UNet takes a vector of {found} numbers, not the {width} of the second text"
            f" encoder and {dim} for each of {', '.join(vector)}"
        )
    return {
        "kind": "sdxl",
        **towers,
        "vector": list(vector),
        "size_dim": dim,
        "zero_empty": bool(index.get("force_zeros_for_empty_prompt", True)),
    }


def index_of(conditioner: Any) -> tuple[str, Config]:
    """Returns (pipeline, further entries of its model_index.json) of a conditioner "sdxl"."""
    if conditioner.vector not in (BASE, REFINER):
        raise TargetError(f"{TEXT} cannot hold a vector of {', '.join(conditioner.vector)}")
    layers = {getattr(conditioner, f"{name}_layer") for name in conditioner.towers}
    if layers != {-2}:
        raise TargetError(f"{TEXT} reads the last hidden state but one, not {sorted(layers)}")
    refiner = conditioner.vector == REFINER
    if conditioner.clip_l is None and not refiner:
        raise TargetError(f"{TEXT} cannot hold a model without clip_l")
    entries: Config = {"force_zeros_for_empty_prompt": conditioner.zero_empty}
    for name, (encoder, tokenizer) in FOLDERS.items():
        there = name in conditioner.towers
        cls = "CLIPTextModel" if name == "clip_l" else "CLIPTextModelWithProjection"
        entries[encoder] = ["transformers", cls] if there else [None, None]
        entries[tokenizer] = ["transformers", "CLIPTokenizer"] if there else [None, None]
    entries |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    return (IMAGE, entries | {"requires_aesthetics_score": True}) if refiner else (TEXT, entries)
