"""Names of the original's checkpoints as people share them: wrappers, prefixes, extra arrays."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ldm_jax.errors import ConversionError, TargetError

UNET, FIRST_STAGE, CONDITIONER, EMA = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "model_ema.",
)
EMBEDDERS = "conditioner.embedders."  # SDXL's conditioner
_ANCHORS = (UNET, FIRST_STAGE, CONDITIONER, EMBEDDERS, EMA, "encoder.", "decoder.", "quantize.")
# Wrappers that may stand anywhere in a name: of torch.compile and of data parallel training.
_SEGMENTS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")
# Wrappers that all names share.
_PREFIXES = ("model.", "net.", "network.", "ema.", "ema_model.", "params_ema.", "ldm.", "vae.")
# Text towers saved by transformers before 4.x and after 5 lack the name of the tower.
_BARE_TEXT = re.compile(
    r"^((?:cond_stage_model|conditioner\.embedders\.\d+)\.transformer\.)(?=embeddings\.|encoder\.|final_layer_)"
)

# Arrays that are no part of the network, and why. They are left out and reported.
HARMLESS: tuple[tuple[str, str], ...] = (
    (r"safety_checker\.", "of the checker of pictures, which is no part of the model"),
    (r"(.*\.)?position_ids$", "counts positions, which the network does itself"),
    (r"(.*\.)?(text_projection(\.weight)?|logit_scale)$", "of CLIP's contrastive loss"),
    (r"cond_stage_model\.(.*\.)?visual\.", "of CLIP's image tower"),
    (r"(v_pred|ztsnr|edm_vpred\..*)$", "a marker of the objective, which config.json records"),
    (r"model_ema\.", "of averages that are not there, or not of the UNet"),
    (r"((first|cond)_stage_model\.)?loss\.", "of the loss that the first stage was trained with"),
    (r"denoiser\.", "the table of noise levels, which follows from the schedule"),
    (r"(lvlb_weights|ddim_\w+|log_sigmas|sigmas|sqrt_\w+|posterior_\w+)$", "a table of constants"),
    (r"(.*\.)?(lora_\w+|lora)\.", "of a LoRA, which is no part of the model"),
    (r"control_model\.", "of a ControlNet, which is no part of the model"),
    (r"depth_model\.", "estimates depth maps, which are given instead"),
    (r"embedding_manager\.", "of textual inversion"),
    (r"(optimizer|lr_scheduler)\w*\.", "of the training"),
)
_HARMLESS = tuple((re.compile(pattern), why) for pattern, why in HARMLESS)

# Files that are not models: a pattern that a name must match, and what to do with the file.
_OTHERS: tuple[tuple[str, str], ...] = (
    (
        r"lora_(unet|te)|.*\.(lora_(A|B|up|down|mid)|lora\.(up|down)|lora_linear_layer|hada_w1_a"
        r"|lokr_w1\w*|dora_scale)\b",
        "a LoRA, not a model; give a model and this with --lora, or merge both with ldm-convert"
        " merge MODEL --lora FILE",
    ),
    (
        r"(\*|clip_[lg]|<[^>]+>|emb_params)$",
        "a textual inversion embedding, not a model; give a model and this with --embedding",
    ),
    (
        r"(control_model\.|input_hint_block\.|controlnet_cond_embedding\.)",
        "a ControlNet, not a model; give a model and this with --control",
    ),
    (r"(model\.)?(conv_first\.|RRDB|body\.\d+\.rdb1|model\.1\.sub\.)", "an upscaler (ESRGAN)"),
    (r"(ip_adapter|image_proj)\.", "an IP-Adapter, which is not supported"),
    (r"(adapter\.body|body\.\d+\.block1)\b", "a T2I-Adapter, which is not supported"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3, which is not supported"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "FLUX, which is not supported"),
    (r"motion_modules|.*\.motion_modules\.", "AnimateDiff motion modules, which are not supported"),
    (
        r"((down|up|mid)_blocks?|encoder\.down_blocks|encoder\.mid_block|text_model)\.",
        "one file of a diffusers folder; give the folder with its config.json",
    ),
)
_EMBEDDING = 2  # at most this many arrays without a dot in their names are a textual inversion


class Names(NamedTuple):
    """A state dict under the original's names.

    Attributes:
      tensors: {name: array}.
      notes: A line for each wrapper or prefix that was removed.
      stored: {name: the name in the file}, where they differ.
    """

    tensors: dict[str, Any]
    notes: tuple[str, ...]
    stored: dict[str, str]


def unwrap(tensors: Mapping[str, Any], where: str) -> Names:
    """Removes wrappers and prefixes around the original's names.

    Raises:
      ConversionError: Two names of the file become one.
    """
    stored, notes = {name: name for name in tensors}, []

    def rename(new: Mapping[str, str], note: str) -> None:
        nonlocal stored
        ConversionError.check(
            where, duplicate=(n for n, k in Counter(new.values()).items() if k > 1)
        )
        stored = {new[name]: of for name, of in stored.items()}
        notes.append(note)

    if any(_SEGMENTS.search(name) for name in stored):
        rename({n: _SEGMENTS.sub("", n) for n in stored}, "the wrappers module. or _orig_mod.")
    while not any(name.startswith(_ANCHORS) for name in stored):
        prefix = next((p for p in _PREFIXES if all(n.startswith(p) for n in stored)), None)
        if not stored or prefix is None:
            break
        rename({n: n.removeprefix(prefix) for n in stored}, f"the prefix {prefix}")
    core = [name for name in stored if not _why_harmless(name)]
    if core and all(name.startswith(FIRST_STAGE) for name in core):
        new = {name: name.removeprefix(FIRST_STAGE) for name in stored}
        rename(new, f"the prefix {FIRST_STAGE}")
    if any(_BARE_TEXT.match(name) for name in stored):
        new = {name: _BARE_TEXT.sub(r"\1text_model.", name) for name in stored}
        rename(new, "text tower names without text_model.")
    renamed = {name: of for name, of in stored.items() if name != of}
    return Names({name: tensors[of] for name, of in stored.items()}, tuple(notes), renamed)


def _why_harmless(name: str) -> str | None:
    return next((why for pattern, why in _HARMLESS if pattern.match(name)), None)


def harmless(names: Iterable[str], *, allow_unexpected: bool = False) -> dict[str, str]:
    """Returns {name: why it is left out} for the ``names`` that no model needs."""
    whys = {name: _why_harmless(name) for name in names}
    if allow_unexpected:
        whys = {name: why or "not expected; --allow_unexpected" for name, why in whys.items()}
    return {name: why for name, why in whys.items() if why}


def check_is_model(tensors: Mapping[str, Any], where: str) -> None:
    """Raises TargetError for a LoRA, an embedding, a ControlNet or other files."""
    models = (f"{UNET}input_blocks.", "encoder.mid.", "encoder.down.")
    if any(name.startswith(models) for name in tensors):
        return
    if meaning := other_file(tensors):
        raise TargetError(f"{where} is {meaning}")


def other_file(tensors: Mapping[str, Any]) -> str | None:
    """Returns what a file is that is no model, and what takes it; None where it is not known."""
    for pattern, meaning in _OTHERS:
        if any(re.match(pattern, name) for name in tensors):
            return meaning
    flat = [t for name, t in tensors.items() if "." not in name and name not in ("weight", "bias")]
    if 0 < len(flat) == len(tensors) <= _EMBEDDING and all(len(t.shape) in (1, 2) for t in flat):
        return "a textual inversion embedding, not a model; give a model and this with --embedding"
    return None
