"""Pipeline folders of Stable Diffusion 2 with a condition beside the text: depth and upscaling."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.convert.diffusers.schedulers import BETA_SCHEDULES
from ldm_jax.errors import TargetError

DEPTH, UPSCALE = "StableDiffusionDepth2ImgPipeline", "StableDiffusionUpscalePipeline"
LOW_RES = "low_res_scheduler"


class Beside(NamedTuple):
    """A pipeline's channels beside the latents, and its section and files.

    Attributes:
      channels: The number of channels.
      read: (model_index.json, low-resolution scheduler or None) -> the section without text.
      write: conditioner -> (entries of model_index.json, low-resolution scheduler or None).
    """

    channels: int
    read: Callable[[Mapping[str, Any], Config | None], Config]
    write: Callable[[Any], tuple[Config, Config | None]]


def _depth_to(conditioner: Any) -> tuple[Config, None]:
    return {"depth_estimator": [None, None], "feature_extractor": [None, None]}, None


def _upscale_from(index: Mapping[str, Any], scheduler: Config | None) -> Config:
    given = scheduler or {}
    betas = given.get("beta_schedule", "linear")
    if betas not in BETA_SCHEDULES or given.get("trained_betas") is not None:
        raise TargetError(
            f"{LOW_RES}: beta_schedule={betas!r} is not supported, only "
            + ", ".join(BETA_SCHEDULES)
        )
    return {
        "kind": "upscale",
        "max_noise_level": index.get("max_noise_level", 350),
        "beta_schedule": BETA_SCHEDULES[betas],
        "timesteps": given.get("num_train_timesteps", 1000),
        "linear_start": given.get("beta_start", 1e-4),
        "linear_end": given.get("beta_end", 2e-2),
    }


def _upscale_to(conditioner: Any) -> tuple[Config, Config]:
    betas = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    kind = conditioner.beta_schedule
    if kind not in betas:
        raise TargetError(f"DDPMScheduler has no beta_schedule for {kind!r}")
    scheduler = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": betas[kind],
        "beta_start": conditioner.linear_start,
        "beta_end": conditioner.linear_end,
        "num_train_timesteps": conditioner.timesteps,
    }
    empty = ("watermarker", "safety_checker", "feature_extractor")
    entries: Config = {name: [None, None] for name in empty}
    entries |= {LOW_RES: ["diffusers", "DDPMScheduler"]}
    return entries | {"max_noise_level": conditioner.max_noise_level}, scheduler


BESIDE = {
    DEPTH: Beside(1, lambda index, scheduler: {"kind": "depth"}, _depth_to),
    UPSCALE: Beside(3, _upscale_from, _upscale_to),
}
KINDS = {"depth": DEPTH, "upscale": UPSCALE}


def section_of(
    name: str,
    index: Mapping[str, Any],
    text: Config,
    sides: tuple[int, int],
    factor: int,
    scheduler: Config | None,
) -> Config:
    """Returns the "conditioner" section of a pipeline of BESIDE.

    Args:
      name: The pipeline.
      index: The content of model_index.json.
      text: The section of the text.
      sides: (height, width) of the latents.
      factor: Pixels along a side of a latent's cell.
      scheduler: The content of the low-resolution scheduler's file; None: there is none.
    """
    section = BESIDE[name].read(index, scheduler)
    more = {"factor": factor} if section["kind"] == "depth" else {}
    return section | {"text": text, "size": list(sides)} | more


def scheduler_file(path: Path) -> Path:
    """Returns the file of a pipeline's low-resolution scheduler."""
    return path / LOW_RES / "scheduler_config.json"
