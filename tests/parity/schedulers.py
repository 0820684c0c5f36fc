"""Maps diffusers' scheduler configs to samplers, grids and options; replays recorded steps."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.discrete import DDIM, LCM, PLMS, TCD
from ldm_jax.diffusion.grids import SIGMA_GRIDS, step_grid
from ldm_jax.diffusion.guidance import predictor
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.diffusion.schedule import Schedule, make_schedule, sigma_to_t, t_to_sigma
from ldm_jax.diffusion.solvers import Multistep, UniPC
from ldm_jax.diffusion.stochastic import MultistepSDE
from ldm_jax.diffusion.tableau import Tableau

from .golden import Case, NotYet, nchw, nhwc

Results = dict[str, Any]
BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
OFF = (
    "thresholding clip_sample use_exponential_sigmas use_beta_sigmas use_flow_sigmas "
    "use_lu_lambdas use_dynamic_shifting euler_at_final disable_corrector solver_p trained_betas "
    "sigma_min sigma_max shift_terminal variance_type"
)


def schedule_of(kwargs: Mapping[str, Any]) -> Schedule:
    return make_schedule(
        BETAS[kwargs.get("beta_schedule", "linear")],
        kwargs.get("num_train_timesteps", 1000),
        kwargs.get("beta_start", 1e-4),
        kwargs.get("beta_end", 0.02),
        zero_terminal_snr=kwargs.get("rescale_betas_zero_snr", False),
    )


def grid_of(kwargs: Mapping[str, Any], steps: int, total: int, *, ends: bool) -> np.ndarray:
    """Ascending timesteps. With `ends` both ends of linspace are steps, else the last alone."""
    spacing, offset = kwargs["timestep_spacing"], kwargs["steps_offset"]
    if spacing == "trailing":
        return step_grid("trailing", steps, total)
    if spacing == "leading":
        if ends:
            return np.arange(steps) * (total // steps) + offset
        return np.arange(1, steps + 1) * (total // (steps + 1)) + offset
    return np.linspace(0, total - 1, steps) if ends else step_grid("linspace", steps, total)


def discrete(case: Case, schedule: Schedule, steps: int) -> tuple[Any, Any, np.ndarray]:
    kwargs, options = case.kwargs, case.spec.get("step_kwargs") or {}
    total = schedule.timesteps
    if case.cls.endswith("DDIMScheduler"):
        sampler = DDIM(to_x0=kwargs["set_alpha_to_one"])
        grid = grid_of(kwargs, steps, total, ends=True)
        grid = np.round(grid).astype(int)
        return sampler, sampler.nodes(schedule, grid, **options), grid
    grid = step_grid("distilled", steps, total)
    if kwargs["original_inference_steps"] != 50:
        raise NotYet("other distillation steps than 50")
    if case.cls.endswith("TCDScheduler"):
        return TCD(), TCD().nodes(schedule, grid, **options), grid
    scaling = kwargs["timestep_scaling"]
    return LCM(), LCM().nodes(schedule, grid, timestep_scaling=scaling), grid


def multistep(case: Case) -> tuple[Any, int]:
    """The sampler, and its order."""
    kwargs, order = case.kwargs, case.kwargs["solver_order"]
    lower = None if kwargs["lower_order_final"] else False
    if case.cls.endswith("DEISMultistepScheduler"):
        algorithm = Multistep(order, "eps", "exact", "exact", lower)
        return Tableau(algorithm, order, "eps", history=order - 1), order
    if case.cls.endswith("UniPCMultistepScheduler"):
        rule = {"bh1": "linear", "bh2": "half"}[kwargs["solver_type"]]
        if not kwargs["predict_x0"]:
            raise NotYet("UniPC in eps")
        algorithm = UniPC(order, rule, kwargs["lower_order_final"])
        return Tableau(algorithm, order, history=order, corrects=True), order
    second = {"midpoint": "half", "heun": "exact"}[kwargs["solver_type"]]
    kind = kwargs["algorithm_type"]
    form = "eps" if kind in ("dpmsolver", "sde-dpmsolver") else "x0"
    if kind in ("dpmsolver", "dpmsolver++"):
        algorithm = Multistep(order, form, second, "released", lower)
        return Tableau(algorithm, order, form, history=order - 1), order
    if kind != "sde-dpmsolver++":
        raise NotYet(f"algorithm_type {kind!r}")
    algorithm = MultistepSDE(order, form, second, "released", lower)
    return Tableau(algorithm, order, history=order - 1, draws=1), order


def continuous(case: Case, schedule: Schedule, steps: int) -> tuple[Any, Any, np.ndarray]:
    """Samplers in sigma: (sampler, nodes, sigmas)."""
    kwargs, total = case.kwargs, schedule.timesteps
    euler = "Euler" in case.cls
    grid = grid_of(kwargs, steps, total, ends=euler)
    every = t_to_sigma(schedule, np.arange(total))
    sigmas = np.interp(grid, np.arange(total), every)[::-1]  # linear in sigma between timesteps
    times = grid[::-1].astype(np.float64)
    if kwargs.get("use_karras_sigmas"):
        low, high = (every[0], every[-1]) if not euler else (sigmas[-1], sigmas[0])
        sigmas = SIGMA_GRIDS["karras"](steps, low, high)
        times = sigma_to_t(schedule, sigmas)
        times = times if euler else np.round(times)
    to_zero = kwargs.get("final_sigmas_type", "zero") == "zero"
    to_zero = to_zero and not case.cls.endswith("DEISMultistepScheduler")
    sigmas = np.append(sigmas, 0.0 if to_zero else every[0]).astype(np.float32).astype(np.float64)
    if euler:
        name = "euler_ancestral" if "Ancestral" in case.cls else "euler"
        sampler, options = SAMPLERS[name], case.spec.get("step_kwargs") or {}
    else:
        (sampler, _), options = multistep(case), {}
    node = sampler.table(sigmas, lambda called: times[: len(called)], **options)
    return sampler, node, sigmas


def ipndm(case: Case, steps: int) -> tuple[Any, Any, np.ndarray]:
    """Noise levels sin(t pi / 2)^2 at even t, with their angle as the time."""
    noise = np.sin(np.linspace(1, 0, steps + 1) * np.pi / 2) ** 2
    signal = np.sqrt(1 - noise**2)
    sampler, sigmas = PLMS(improved=False, end=None), noise / np.maximum(signal, 1e-9)
    node = sampler.table(sigmas, lambda sigma: np.arctan(sigma) / np.pi * 2)
    return sampler, node, sigmas


def scheduler(case: Case) -> Results:
    """Replays every step with recorded model outputs; recorded states may be x / sqrt(abar)."""
    kwargs, steps = case.kwargs, case.spec["set_timesteps"]["num_inference_steps"]
    if wrong := [name for name in OFF.split() if kwargs.get(name)]:
        raise NotYet(", ".join(wrong))
    name = case.cls.rsplit(".", 1)[1]
    schedule = schedule_of(kwargs)
    objective = PREDICTIONS[kwargs.get("prediction_type", "epsilon")]
    results: Results = {"init_noise_sigma": 1.0}
    if name in ("DDIMScheduler", "LCMScheduler", "TCDScheduler"):
        sampler, nodes, grid = discrete(case, schedule, steps)
        abar = schedule.alphas_cumprod
        results["timesteps"] = grid[::-1]
        results["alphas_cumprod_first_last"] = abar[[0, 1, -2, -1]]
        scale = np.ones(steps + 1)
    else:
        if name == "IPNDMScheduler":
            sampler, nodes, sigmas = ipndm(case, steps)
            objective = "v"
        else:
            sampler, nodes, sigmas = continuous(case, schedule, steps)
        results |= {"timesteps": nodes.t, "sigmas": sigmas}
        y = "Euler" in name  # x / sqrt(abar) instead of x
        scale = np.hypot(1, sigmas) if y else np.ones(steps + 1)
        if y:
            leading = kwargs["timestep_spacing"] == "leading"
            results["init_noise_sigma"] = scale[0] if leading else sigmas[0]
    recorded = list(case.inputs.get("noise", []))  # of every step, or of all but the last
    x = jnp.asarray(case.image("x_T") * results["init_noise_sigma"] / scale[0], jnp.float32)
    carry, states, inputs, predicted = sampler.init(x), [], [], []
    for i in range(steps):
        node = jax.tree.map(lambda a, i=i: a[i], nodes)
        out = jnp.asarray(nhwc(case.inputs["model_output"][i]))
        noise = jnp.zeros_like(x)
        if sampler.draws and recorded:
            noise = jnp.asarray(nhwc(recorded.pop(0)))
        predict = predictor(lambda x, t, out=out: out, schedule, objective)
        inputs.append(x)
        carry, x, x0 = sampler.step(carry, node, x, predict, noise[None])
        states.append(x * scale[i + 1])
        if name == "LCMScheduler":  # it reports what leads to the next state
            a = 1.0 if i == steps - 1 else np.sqrt(abar[grid[::-1][i + 1]])
            x0 = (node.x0 * x0 + node.xt * inputs[-1]) / a
        predicted.append(x0)
    stacked = {"scaled_model_input": inputs, "prev_sample": states, "pred_x0": predicted}
    return results | {key: nchw(jnp.stack(value)) for key, value in stacked.items()}


CASES: Mapping[str, Callable[[Case], Results]] = {
    f"diffusers.{name}Scheduler": scheduler
    for name in (
        "DDIM",
        "LCM",
        "TCD",
        "IPNDM",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "DPMSolverMultistep",
        "DEISMultistep",
        "UniPCMultistep",
    )
}
