"""scheduler_config.json of diffusers, and the schedule, objective and sampling of a model config.

A scheduler there is both the noise that the model was trained with, which has to be understood
whole, and a sampler, which a request may change. What is not known of the sampler costs only the
default sampler and is noted.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.errors import TargetError

BETA_SCHEDULES = {  # theirs -> ours
    "scaled_linear": "linear",
    "linear": "sqrt_linear",
    "squaredcos_cap_v2": "cosine",
}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# (timestep_spacing, steps_offset) -> grid. The first is the original's, whose steps are +1.
GRIDS = {
    ("leading", 1): "uniform",
    ("leading", 0): "leading",
    ("trailing", 0): "trailing",
    ("trailing", 1): "trailing",
}
# Options that change what the model computes and that nothing here does.
_UNSUPPORTED = ("trained_betas", "thresholding", "use_flow_sigmas", "use_dynamic_shifting")


class Kind(NamedTuple):
    """A scheduler class: the sampler, its default spacing, and the options that sampler assumes."""

    sampler: str
    spacing: str = "linspace"
    assumes: Mapping[str, Any] = {}


_MULTISTEP = {"solver_order": 2, "solver_type": "midpoint", "use_lu_lambdas": False}
SCHEDULERS = {
    "DDIMScheduler": Kind("ddim", "leading"),
    "PNDMScheduler": Kind("plms", "leading", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "DDPMScheduler": Kind("ddpm", "leading", {"variance_type": "fixed_small"}),
    "LMSDiscreteScheduler": Kind("lms"),
    "EulerDiscreteScheduler": Kind("euler"),
    "EulerAncestralDiscreteScheduler": Kind("euler_ancestral"),
    "HeunDiscreteScheduler": Kind("heun"),
    "KDPM2DiscreteScheduler": Kind("dpm_2"),
    "KDPM2AncestralDiscreteScheduler": Kind("dpm_2_ancestral"),
    "DPMSolverMultistepScheduler": Kind("dpmpp_2m", assumes=_MULTISTEP),
    "DPMSolverSinglestepScheduler": Kind("dpmpp_2s", assumes=_MULTISTEP),
    "DPMSolverSDEScheduler": Kind("dpmpp_sde"),
    "UniPCMultistepScheduler": Kind("unipc", assumes={"solver_order": 2, "predict_x0": True}),
    "DEISMultistepScheduler": Kind("deis", assumes={"solver_order": 2}),
    "IPNDMScheduler": Kind("ipndm"),
    "LCMScheduler": Kind("lcm", "leading"),
    "TCDScheduler": Kind("tcd", "leading"),
}
# algorithm_type of the DPM-Solver classes -> the sampler of order 2 in place of DPM-Solver++'s.
_ALGORITHMS = {
    ("dpmpp_2m", "sde-dpmsolver++"): "dpmpp_2m_sde",
    ("dpmpp_2m", "dpmsolver"): "dpm_solver_2m",
    ("dpmpp_2s", "dpmsolver"): "dpm_solver_2",
}
_CLIPS = ("DDIMScheduler", "DDPMScheduler")  # their clip_sample is True where it is absent


def schedule_from(config: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """Returns ({"schedule", "objective", "sampling"}, notes on what differs here).

    Raises:
      TargetError: The noise, the prediction or an option that changes the model is not supported.
    """
    name = str(config.get("_class_name"))
    for option in _UNSUPPORTED:
        if config.get(option):
            raise TargetError(f"{name}: {option}={config[option]!r} is not supported")
    if name in _CLIPS and config.get("clip_sample", True):
        raise TargetError(
            f"{name}: clip_sample=True would clip latents to [-1, 1], which no latent diffusion"
            " model wants; set it to false"
        )
    betas = config.get("beta_schedule", "linear")
    prediction = config.get("prediction_type", "epsilon")
    for what, value, known in (
        ("beta_schedule", betas, BETA_SCHEDULES),
        ("prediction_type", prediction, PREDICTIONS),
    ):
        if value not in known:
            raise TargetError(
                f"{name}: {what}={value!r} is not supported (have {', '.join(known)})"
            )
    schedule: Config = {
        "beta_schedule": BETA_SCHEDULES[betas],
        "timesteps": config.get("num_train_timesteps", 1000),
        "linear_start": config.get("beta_start", 1e-4),
        "linear_end": config.get("beta_end", 2e-2),
    }
    if config.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
    sampling, notes = _sampling(name, config)
    return {
        "schedule": schedule,
        "objective": PREDICTIONS[prediction],
        "sampling": sampling,
    }, notes


def _sampling(name: str, config: Mapping[str, Any]) -> tuple[Config, list[str]]:
    kind, notes = SCHEDULERS.get(name, Kind("")), []
    sampler = _ALGORITHMS.get((kind.sampler, str(config.get("algorithm_type"))), kind.sampler)
    if name == "DDIMScheduler" and config.get("set_alpha_to_one", True):
        sampler = "ddim_x0"
    if sampler not in SAMPLERS:
        notes.append(f"sampler ddim: {name} has no counterpart here, or none yet")
        sampler = "ddim"
    for option, value in kind.assumes.items():
        if config.get(option, value) != value:
            notes.append(f"{option} {value!r} with sampler {sampler}: not {config[option]!r}")
    if name == "PNDMScheduler" and not config.get("skip_prk_steps", False):
        notes.append("skip_prk_steps True with sampler plms: the first steps differ")
    spacing = (config.get("timestep_spacing", kind.spacing), config.get("steps_offset", 0))
    grid = "karras" if config.get("use_karras_sigmas") else GRIDS.get(spacing)
    if grid is None:
        grid = "uniform"
        notes.append(
            f"grid uniform: timestep_spacing={spacing[0]!r} with steps_offset={spacing[1]} has no"
            " counterpart here"
        )
    return {"sampler": sampler, "grid": grid}, notes


def schedule_to(config: Mapping[str, Any]) -> Config:
    """Returns the scheduler_config.json of a DDIMScheduler with the noise of a model config."""
    ours, sampling = config["schedule"], config.get("sampling", {})
    betas = {ours_name: theirs for theirs, ours_name in BETA_SCHEDULES.items()}
    kind = ours.get("beta_schedule", "linear")
    if kind not in betas:
        raise TargetError(
            f"DDIMScheduler has no beta_schedule for {kind!r} (only for {', '.join(betas)})"
        )
    if kind == "cosine" and ours.get("cosine_s", 8e-3) != 8e-3:
        raise TargetError(f"DDIMScheduler cannot hold cosine_s={ours['cosine_s']!r}, only 0.008")
    grids = {grid: spacing for spacing, grid in reversed(GRIDS.items())}
    spacing, offset = grids.get(sampling.get("grid", "uniform"), ("leading", 1))
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": betas[kind],
        "beta_start": ours.get("linear_start", 1e-4),
        "beta_end": ours.get("linear_end", 2e-2),
        "num_train_timesteps": ours.get("timesteps", 1000),
        "prediction_type": {v: k for k, v in PREDICTIONS.items()}[config["objective"]],
        "rescale_betas_zero_snr": bool(ours.get("zero_terminal_snr", False)),
        "clip_sample": False,
        "set_alpha_to_one": sampling.get("sampler") == "ddim_x0",
        "steps_offset": offset,
        "timestep_spacing": spacing,
    }
