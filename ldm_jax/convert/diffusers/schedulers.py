"""scheduler_config.json of diffusers, and what a model config here says of schedule, objective and sampling.

A scheduler there is both: the noise that the model was trained with, which has to be understood whole, and a sampler, which a request may change.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.convert.compvis.targets import pick_params
from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.errors import TargetError

BETA_SCHEDULES = {
    "scaled_linear": "linear",
    "linear": "sqrt_linear",
    "squaredcos_cap_v2": "cosine",
}  # theirs -> ours
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# (timestep_spacing, steps_offset) -> our grid. The first is the original's, whose steps are +1.
GRIDS = {
    ("leading", 1): "uniform",
    ("leading", 0): "leading",
    ("trailing", 0): "trailing",
    ("trailing", 1): "trailing",
}

_SAME = "num_train_timesteps beta_start beta_end beta_schedule prediction_type rescale_betas_zero_snr timestep_spacing steps_offset"
_FIXED = {"trained_betas": None, "timestep_values": None, "thresholding": False}
# What says something only with an option that is fixed to be off.
_IDLE = "_class_name _diffusers_version dynamic_thresholding_ratio sample_max_value clip_sample_range format"
_SIGMAS = {"use_exponential_sigmas": False, "use_beta_sigmas": False}


class Kind(NamedTuple):
    """A class of diffusers: our sampler, its fields beside those of all, and the spacing that it takes where none is given."""

    sampler: str
    same: str = ""
    ignored: str = ""
    fixed: Mapping[str, Any] = {}
    spacing: str = "linspace"


SCHEDULERS = {
    "DDIMScheduler": Kind("ddim", "clip_sample set_alpha_to_one", spacing="leading"),
    "PNDMScheduler": Kind(
        "plms", "set_alpha_to_one", fixed={"skip_prk_steps": True}, spacing="leading"
    ),
    "DDPMScheduler": Kind(
        "ddpm", "clip_sample", fixed={"variance_type": "fixed_small"}, spacing="leading"
    ),
    "LMSDiscreteScheduler": Kind("lms", "use_karras_sigmas", fixed=_SIGMAS),
    "EulerDiscreteScheduler": Kind(
        "euler",
        "use_karras_sigmas",
        "interpolation_type final_sigmas_type timestep_type sigma_min sigma_max",
        _SIGMAS,
    ),
    "EulerAncestralDiscreteScheduler": Kind("euler_ancestral"),
    "DPMSolverMultistepScheduler": Kind(
        "dpmpp_2m",
        "use_karras_sigmas",
        "lower_order_final euler_at_final final_sigmas_type lambda_min_clipped flow_shift time_shift_type",
        _SIGMAS
        | {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "variance_type": None,
        }
        | {"use_lu_lambdas": False, "use_flow_sigmas": False, "use_dynamic_shifting": False},
    ),
}
_CLIPS = ("DDIMScheduler", "DDPMScheduler")  # unless told otherwise


def schedule_from(config: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """scheduler_config.json -> ({"schedule", "objective", "sampling"} of a model config, what differs here)."""
    name = str(config.get("_class_name"))
    if name not in SCHEDULERS:
        raise TargetError(f"the scheduler {name} is not supported (have {', '.join(SCHEDULERS)})")
    kind = SCHEDULERS[name]
    given = pick_params(
        name,
        config,
        same=f"{_SAME} {kind.same}",
        ignored=f"{_IDLE} {kind.ignored}",
        fixed={**_FIXED, **kind.fixed},
    )
    if kind.fixed.get("skip_prk_steps") and not config.get("skip_prk_steps"):
        raise TargetError(f"{name}: skip_prk_steps=False is not supported, only True")
    if given.get("clip_sample", name in _CLIPS):
        raise TargetError(
            f"{name}: clip_sample=True would clip latents to [-1, 1], which no latent diffusion model wants; set it to false"
        )
    betas, prediction = (
        given.get("beta_schedule", "linear"),
        given.get("prediction_type", "epsilon"),
    )
    for what, value, known in (
        ("beta_schedule", betas, BETA_SCHEDULES),
        ("prediction_type", prediction, PREDICTIONS),
    ):
        if value not in known:
            raise TargetError(
                f"{name}: {what}={value!r} is not supported (have {', '.join(known)})"
            )
    to_one = given.get("set_alpha_to_one", name == "DDIMScheduler")
    if to_one and name == "PNDMScheduler":
        raise TargetError(f"{name}: set_alpha_to_one=True is not supported, only False")

    notes = []
    spacing = (given.get("timestep_spacing", kind.spacing), given.get("steps_offset", 0))
    grid = "karras" if given.get("use_karras_sigmas") else GRIDS.get(spacing, "uniform")
    if spacing not in GRIDS and grid == "uniform":
        notes.append(
            f"timestep_spacing={spacing[0]!r} with steps_offset={spacing[1]}: the steps are those of the grid 'uniform' here"
        )
    schedule: Config = {
        "beta_schedule": BETA_SCHEDULES[betas],
        "timesteps": given.get("num_train_timesteps", 1000),
        "linear_start": given.get("beta_start", 1e-4),
        "linear_end": given.get("beta_end", 2e-2),
    }
    if given.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
    sampler = "ddim_x0" if to_one else kind.sampler
    return {
        "schedule": schedule,
        "objective": PREDICTIONS[prediction],
        "sampling": {"sampler": sampler, "grid": grid},
    }, notes


def schedule_to(config: Mapping[str, Any]) -> Config:
    """A model config here -> the scheduler_config.json of DDIMScheduler with its noise, prediction and steps."""
    ours, sampling = config["schedule"], config.get("sampling", {})
    betas = {theirs_of: theirs for theirs, theirs_of in BETA_SCHEDULES.items()}
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
