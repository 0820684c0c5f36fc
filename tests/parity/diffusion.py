"""Schedules, losses and samplers of the original's LatentDiffusion and DDPM, on recorded noise."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.base import Cond
from ldm_jax.conditioning.unconditional import Unconditional
from ldm_jax.convert.compvis.networks import unet_table
from ldm_jax.convert.compvis.targets import module_from_config
from ldm_jax.convert.compvis.whole import latent_diffusion as latent_diffusion_of
from ldm_jax.convert.compvis.whole import schedule_buffers
from ldm_jax.convert.tables import Entry, Table, to_ours, to_theirs, under
from ldm_jax.diffusion import objective as obj
from ldm_jax.diffusion.adaptive import DPMAdaptive
from ldm_jax.diffusion.discrete import PLMS
from ldm_jax.diffusion.grids import SIGMA_GRIDS, vp_sigma
from ldm_jax.diffusion.guidance import (
    Correct,
    Denoiser,
    classifier_free,
    dynamic_threshold,
    predictor,
    unguided,
)
from ldm_jax.diffusion.likelihood import angle_to_sigma, log_likelihood, sigma_to_angle
from ldm_jax.diffusion.samplers import (
    DDIM,
    DDPM,
    SAMPLERS,
    Known,
    Trace,
    drop_noise,
    sample,
    step_grid,
)
from ldm_jax.diffusion.schedule import (
    Schedule,
    level,
    log_sigmas,
    make_betas,
    make_schedule,
    posterior,
    predict_x0,
    q_mean_variance,
    q_sample,
    sigma_to_t,
    t_to_sigma,
)
from ldm_jax.diffusion.solvers import Multistep, Singlestep, split
from ldm_jax.diffusion.stochastic import DPMppSDE, MultistepSDE
from ldm_jax.diffusion.tableau import Basis, Form, Row, Tableau, exponential
from ldm_jax.errors import TargetError
from ldm_jax.models.ldm import FirstStage, LatentDiffusion
from ldm_jax.models.unet import UNet

from . import checkpoints
from .golden import Case, NotYet, nchw, nhwc, shapes_of

Results = dict[str, Any]
UNET = "model.diffusion_model."

# ---------------------------------------------------------------------------------------- the model


def pick(kwargs: Mapping[str, Any], names: str) -> dict[str, Any]:
    """The given ones of the named arguments, a string separated by spaces."""
    return {name: kwargs[name] for name in names.split() if name in kwargs}


def schedule_of(kwargs: Mapping[str, Any]) -> Schedule:
    """The schedule that DDPM's arguments describe."""
    names = "beta_schedule timesteps linear_start linear_end cosine_s v_posterior given_betas"
    return make_schedule(**pick(kwargs, names))


def objective_of(kwargs: Mapping[str, Any]) -> str:
    return kwargs.get("parameterization", "eps")


def network(config: Mapping[str, Any]) -> Any:
    """The module of a {"target", "params"} section."""
    try:
        return module_from_config(config["target"], config.get("params"))
    except TargetError as error:
        raise NotYet(str(error)) from None


def model_of(case: Case) -> tuple[LatentDiffusion, Table]:
    """The case's diffusion model, and the table of what ``params`` of it holds.

    Recorded conditions are already encoded, hence no conditioner. A sampler's case takes its model
    from the case that holds the weights.
    """
    owner: Case | None = case
    while owner is not None and "unet_config" not in owner.kwargs:
        owner = owner.base
    if owner is None:
        raise NotYet("neither the case nor its params_from has a unet_config")
    kwargs = owner.kwargs
    unet = network(kwargs["unet_config"])
    assert isinstance(unet, UNet)
    table, shapes = under(("unet",), unet_table(unet, UNET)), {"unet": shapes_of(unet)}
    schedule = schedule_of(kwargs)
    if kwargs.get("learn_logvar"):
        table.append(Entry("logvar", ("logvar",)))
        shapes["logvar"] = jax.ShapeDtypeStruct((schedule.timesteps,), jnp.float32)
    params = case.params(table, shapes, only=(UNET, "logvar"))
    first_stage = FirstStage(None, 1.0, None)
    return LatentDiffusion(
        params, first_stage, schedule, unet, Unconditional(), objective_of(kwargs)
    ), table


def condition_of(case: Case, name: str = "c") -> Cond:
    """The condition of input ``name`` (or <name>_concat, <name>_crossattn), if there is one.

    The model's conditioning key decides how it enters.
    """
    owner: Case | None = case
    while owner is not None and "conditioning_key" not in owner.kwargs:
        owner = owner.base
    key = None if owner is None else owner.kwargs["conditioning_key"]
    given = case.inputs

    def of(kind: str) -> str | None:
        return (
            f"{name}_{kind}"
            if f"{name}_{kind}" in given
            else name
            if key == kind and name in given
            else None
        )

    concat, crossattn, vector = of("concat"), of("crossattn"), of("adm")
    if key == "adm" and name == "c" and vector is None and "y" in given:
        vector = "y"
    return Cond(
        crossattn=None if crossattn is None else jnp.asarray(given[crossattn]),
        concat=None if concat is None else jnp.asarray(case.image(concat)),
        vector=None if vector is None else jnp.asarray(given[vector]),
    )


# ------------------------------------------------------------------------------------- schedules, q


def register_schedule(case: Case) -> Results:
    kwargs = {**case.kwargs, **case.inputs}  # given_betas are an input
    schedule = schedule_of(kwargs)
    tables = {
        name: getattr(schedule, name)
        for name in Schedule.__dataclass_fields__
        if name != "v_posterior"
    }
    tables["lvlb_weights"] = obj.elbo_weights(objective_of(kwargs), schedule)
    if kwargs.get("given_betas") is None:
        arguments = pick(kwargs, "timesteps linear_start linear_end cosine_s")
        kind = kwargs.get("beta_schedule", "linear")
        tables["betas_float64"] = make_betas(kind, **{"timesteps": 1000} | arguments)
    return tables


def ddim_schedules(case: Case) -> Results:
    schedule, results = schedule_of(case.kwargs), {}
    for kind, steps, eta in case.kwargs["combos"]:
        grid = step_grid(kind, steps, schedule.timesteps, compat=True)
        nodes = jax.tree.map(lambda a: a[::-1], DDIM().nodes(schedule, grid, eta=eta))
        # Two tables are float32 arithmetic on rounded values in the original (errors near 1e-5),
        # which our samplers do not repeat.
        abar, prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        values = {
            "timesteps": nodes.t,
            "sigmas": nodes.noise,
            "alphas": abar[grid],
            "alphas_prev": nodes.x0.astype(np.float64) ** 2,
            "sqrt_one_minus_alphas": np.sqrt(1 - abar[grid]),
            "sigmas_for_original_num_steps": np.float32(eta)
            * np.sqrt((1 - prev) / (1 - abar) * (1 - abar / prev)),
        }
        results |= {f"{kind}_S{steps}_eta{eta}.{what}": value for what, value in values.items()}
    return results


def q_functions(case: Case) -> Results:
    schedule, t = schedule_of(case.kwargs), case.inputs["t"]
    x0, noise, xt = (case.image(name) for name in ("x_start", "noise", "x_t"))
    results = {
        "q_sample": q_sample(schedule, x0, t, noise),
        "predict_start_from_noise": predict_x0(schedule, xt, t, noise),
    }
    for prefix, triple in {
        "q": q_mean_variance(schedule, x0, t),
        "q_posterior": posterior(schedule, x0, xt, t),
    }.items():
        results |= dict(
            zip(
                (f"{prefix}_mean", f"{prefix}_variance", f"{prefix}_log_variance"),
                triple,
                strict=True,
            )
        )
    return {name: nchw(a) for name, a in results.items()}


# ------------------------------------------------------------------------------------------- losses


def p_losses(case: Case) -> Results:
    """Loss, its parts and gradients.

    Latent models weight by logvar (learned or constant), pixel-space DDPM does not.
    """
    model, table = model_of(case)
    kwargs, schedule = case.kwargs, model.schedule
    x0, noise, t = case.image("x_start"), case.image("noise"), jnp.asarray(case.inputs["t"])
    cond, latent = condition_of(case), case.cls.endswith("LatentDiffusion")

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            out = model.apply(params, q_sample(schedule, x0, t, noise), t, cond)
            per_sample = obj.pointwise(
                kwargs.get("loss_type", "l2"),
                out,
                obj.target(model.objective, schedule, x0, noise, t),
            )
            logvar = (
                params.get("logvar", jnp.full(schedule.timesteps, kwargs.get("logvar_init", 0.0)))
                if latent
                else None
            )
            weights = {
                "simple_weight": kwargs.get("l_simple_weight", 1.0),
                "elbo_weight": kwargs.get("original_elbo_weight", 0.0),
            }
            return obj.diffusion_loss(
                per_sample,
                t,
                elbo=obj.elbo_weights(model.objective, schedule),
                **weights,
                logvar=logvar,
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, parts), grads = run(model.params)
    logged = {
        f"{prefix}/{name}": value for prefix in ("train", "val") for name, value in parts.items()
    }
    return {"loss": loss, **parts, **logged} | {
        f"grad:{name}": g for name, g in to_theirs(table, grads).items()
    }


# ----------------------------------------------------------------------------------------- samplers


def denoiser_of(case: Case, model: LatentDiffusion, scale: float) -> Denoiser:
    """The model under the case's condition.

    Guided by ``scale``, unless that is 1 or the case has no unconditional input.
    """

    def apply(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        return model.apply(model.params, x, t, cond)

    cond, null = condition_of(case), condition_of(case, "uc")
    if scale == 1.0 or not jax.tree.leaves(null):
        return unguided(apply, cond)
    return classifier_free(apply, cond, null, scale)


def corrector(kwargs: Mapping[str, Any], schedule: Schedule) -> Correct | None:
    """A score corrector: from its formula, "e_t + <number>*x", or from a and b of
    e_t + a * x * sqrt(1 - abar_t) + b."""
    if "corrector_kwargs" in kwargs:
        a, b = kwargs["corrector_kwargs"]["a"], kwargs["corrector_kwargs"]["b"]
        return lambda eps, x, t: eps + a * x * level(schedule, t, x)[1] + b
    text = kwargs.get("score_corrector")
    if not text:
        return None
    formula = re.fullmatch(r"e_t\s*([+-])\s*([\d.]+)\s*\*\s*x", str(text))
    if formula is None:
        raise NotYet(f"score_corrector {text!r}")
    weight = float(formula[1] + formula[2])
    return lambda eps, x, t: eps + weight * x


def quantizer_of(case: Case) -> Callable[[jax.Array], jax.Array]:
    """x0 [b, h, w, c] -> the nearest codes of the first stage's codebook."""
    try:
        from ldm_jax.models.quantize import nearest_codes
    except ImportError:
        raise NotYet("a quantising first stage") from None
    own = {n: w for n, w in case.weights().items() if n.endswith("quantize.embedding.weight")}
    if len(own) != 1:
        raise NotYet("a first stage without a codebook")
    codebook = jnp.asarray(*own.values())
    return lambda x0: codebook[nearest_codes(x0.reshape(-1, x0.shape[-1]), codebook)].reshape(
        x0.shape
    )


def drawn(case: Case, kind: str) -> np.ndarray | None:
    """The recorded draws of a kind ("normal", "uniform") in order, [n, b, c, h, w]."""
    arrays = [a for name, a in case.inputs.items() if re.fullmatch(rf"draw\d+\.{kind}", name)]
    return np.stack(arrays) if arrays else None


def noises(case: Case, *, mask_first: bool) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(step noise [S, b, c, h, w] after its dropout, noise of the known region) as recorded.

    Draws of a step lie in the order mask, noise, dropout; the DDPM loops blend last.
    """
    noise, masks = drawn(case, "normal"), case.inputs.get("mask_noise")
    if noise is None:
        return case.inputs.get("noise"), masks
    if "mask" in case.inputs:
        noise, masks = (noise[1::2], noise[::2]) if mask_first else (noise[::2], noise[1::2])
    if (uniform := drawn(case, "uniform")) is not None:
        noise = np.asarray(drop_noise(noise, uniform, case.kwargs["noise_dropout"]))
    return noise, masks


def known_of(case: Case, noise: np.ndarray | None) -> Known | None:
    """The region to keep, where the case has one."""
    if "mask" not in case.inputs:
        return None
    assert noise is not None
    return Known(case.image("x0"), case.image("mask"), nhwc(noise))


def run_sampler(
    case: Case,
    model: LatentDiffusion,
    sampler: Any,
    grid: np.ndarray,
    x: np.ndarray,
    noise: np.ndarray | None,
    *,
    options: Mapping[str, Any],
    known: Known | None = None,
    clip: bool = False,
    scale: float = 1.0,
) -> tuple[jax.Array, Trace]:
    """A whole run from ``x`` with step noise [S, b, c, h, w], zeros where none is recorded.

    ``options`` are the sampler's eta and temperature.
    """
    quantize = (
        quantizer_of(case)
        if case.kwargs.get("quantize_x0") or case.kwargs.get("quantize_denoised")
        else None
    )
    nodes = sampler.nodes(model.schedule, grid, **options)
    correct = corrector(case.kwargs, model.schedule)

    @jax.jit
    def run(model: LatentDiffusion, x: jax.Array, noise: jax.Array, known: Known | None) -> Any:
        predict = predictor(
            denoiser_of(case, model, scale),
            model.schedule,
            model.objective,
            clip=clip,
            correct=correct,
            quantize=quantize,
        )
        return sample(
            sampler,
            predict,
            x,
            nodes,
            schedule=model.schedule,
            noise=noise[:, None],
            known=known,
            trace=True,
        )

    steps = np.zeros((len(grid), *x.shape), np.float32) if noise is None else nhwc(noise)
    last, trace = run(model, x, steps, known)
    assert trace is not None
    return last, trace


def ddim_sampler(case: Case) -> Results:
    kwargs, (model, _) = case.kwargs, model_of(case)
    if "t_start" in kwargs:
        return img2img(case, model)
    sampler, total, results = DDIM(), model.schedule.timesteps, {}
    options = pick(kwargs, "eta temperature")
    if "ddim_num_steps" in kwargs:  # make_schedule, then ddim_sampling(timesteps=...)
        options["eta"] = kwargs.get("ddim_eta", 0.0)
        grid, count = step_grid("uniform", kwargs["ddim_num_steps"], total, compat=True), None
        results["ddim_timesteps"], count = grid, kwargs.get("timesteps")
        if "ddim_use_original_steps=True" in case.spec["call"]:
            sampler, grid = DDIM(to_x0=True), np.arange(total if count is None else count)
        elif count is not None:  # one step fewer than the count
            grid = grid[: int(min(count / len(grid), 1) * len(grid)) - 1]
    else:
        kind = kwargs.get("ddim_discretize", "uniform")
        grid = step_grid(kind, kwargs["S"], total, compat=True)
    x, (noise, masks) = case.image("x_T"), noises(case, mask_first=True)
    last, trace = run_sampler(
        case,
        model,
        sampler,
        grid,
        x,
        noise,
        options=options,
        known=known_of(case, masks),
        scale=kwargs.get("unconditional_guidance_scale", 1.0),
    )
    with_start = (np.concatenate([x[None], steps]) for steps in trace)
    x_inter, pred_x0 = (nchw(steps) for steps in with_start)
    results |= {"x_final": nchw(last), "x_inter": x_inter, "pred_x0": pred_x0, "timesteps": grid}
    return results


def img2img(case: Case, model: LatentDiffusion) -> Results:
    """Noise to the t_start-th step of the grid, then sampling over the steps before it."""
    kwargs, x0, noise = case.kwargs, case.image("x0"), case.image("noise")
    grid = step_grid("uniform", kwargs["S"], model.schedule.timesteps, compat=True)
    encoded = np.asarray(q_sample(model.schedule, x0, grid[kwargs["t_start"]], noise))
    grid, options = grid[: kwargs["t_start"]], pick(kwargs, "eta temperature")
    decoded, _ = run_sampler(
        case,
        model,
        DDIM(),
        grid,
        encoded,
        case.inputs.get("step_noise"),
        options=options,
        scale=kwargs.get("scale", 1.0),
    )
    results = {"encoded": encoded, "decoded": decoded}
    for name in case.expected:  # the same at a timestep of the whole schedule
        if at := re.fullmatch(r"encoded_original_t(\d+)", name):
            results[name] = q_sample(model.schedule, x0, int(at[1]), noise)
    return {name: nchw(a) for name, a in results.items()}


def rows_from(
    node: Any, sampler: Any, recorded: np.ndarray | None, shape: tuple[int, ...]
) -> np.ndarray:
    """Recorded noise [draws, b, c, h, w] at the rows that draw it, [n, 1, b, h, w, c], else zeros.

    Samplers with churn draw at the start of a step and dpm_fast at its end, even with weight 0;
    others only with a nonzero weight.
    """
    noise = np.zeros((len(node.t), *shape), np.float32)
    if recorded is not None and sampler.draws:
        if "churn" in sampler.options:
            rows = np.flatnonzero(node.begin)
        elif sampler == SAMPLERS["dpm_fast"]:
            rows = np.flatnonzero(np.append(node.begin[1:], True))
        else:
            rows = np.flatnonzero(node.next[:, -1])
        if len(rows) == len(recorded):
            noise[rows] = nhwc(recorded)
        elif node.next[:, -1].any():
            raise NotYet(f"{len(recorded)} recorded draws for {len(rows)} that this sampler makes")
    return noise[:, None]


def run_rows(
    case: Case,
    model: LatentDiffusion,
    sampler: Any,
    node: Any,
    x: np.ndarray,
    *,
    scale: float,
    noise: np.ndarray | None = None,
    known: Known | None = None,
    rounded: bool = False,
    quantize: Callable[[jax.Array], jax.Array] | None = None,
    correct: Correct | None = None,
    objective: str | None = None,
) -> tuple[np.ndarray, Trace]:
    """(x before every row and at the end, Trace).

    `rounded` passes the nearest timestep to the model.
    """
    steps = rows_from(node, sampler, noise, x.shape)
    correct = corrector(case.kwargs, model.schedule) if correct is None else correct

    @jax.jit
    def run(model: LatentDiffusion, x: jax.Array, steps: jax.Array, known: Known | None) -> Any:
        denoise = denoiser_of(case, model, scale)
        predict = predictor(
            (lambda x, t: denoise(x, jnp.round(t))) if rounded else denoise,
            model.schedule,
            objective or model.objective,
            correct=correct,
            quantize=quantize,
        )
        return sample(
            sampler, predict, x, node, schedule=model.schedule, noise=steps, known=known, trace=True
        )

    _, trace = run(model, jnp.asarray(x, jnp.float32), steps, known)
    return np.concatenate([x[None], np.asarray(trace.x)]), trace


def plms_sampler(case: Case) -> Results:
    """PLMS; its noise has no weight, so only the known region's counts."""
    kwargs, (model, _) = case.kwargs, model_of(case)
    if kwargs.get("eta"):
        raise NotYet("the original refuses an eta")
    kind, total = kwargs.get("ddim_discretize", "uniform"), model.schedule.timesteps
    grid = step_grid(kind, kwargs["S"], total, compat=True)
    sampler, x, masks = PLMS(), case.image("x_T"), case.inputs.get("mask_noise")
    node = sampler.nodes(model.schedule, grid)
    begin = np.flatnonzero(node.begin)
    if "mask" in case.inputs and masks is None:  # mask, noise, noise; then mask, noise
        normals = drawn(case, "normal")
        assert normals is not None
        masks = normals[[0, *range(3, len(normals), 2)]] if len(grid) > 1 else normals[:1]
    if masks is not None:  # one draw for each step
        rows = np.zeros((len(node.t), *masks.shape[1:]), np.float32)
        rows[begin] = masks
        masks = rows
    states, trace = run_rows(
        case,
        model,
        sampler,
        node,
        x,
        scale=kwargs.get("unconditional_guidance_scale", 1.0),
        known=known_of(case, masks),
        quantize=quantizer_of(case) if kwargs.get("quantize_x0") else None,
    )
    ends = [*(begin[1:] - 1), -1]  # the last row of each step
    return {
        "x_final": nchw(states[-1]),
        "x_inter": nchw(states[[*begin, len(states) - 1]]),
        "pred_x0": nchw(np.stack([x, *np.asarray(trace.x0)[ends]])),
        "timesteps": grid,
    }


# DPM-Solver's time: t in (0, 1], timestep i at (i + 1) / N, linear log sqrt(abar) in between.


def log_alpha(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    n = schedule.timesteps
    return np.interp(
        t, np.arange(1, n + 1) / n, np.log(np.asarray(schedule.alphas_cumprod, np.float64)) / 2
    )


def sigma_of_time(schedule: Schedule, t: np.ndarray) -> np.ndarray:
    return np.sqrt(np.expm1(-2 * log_alpha(schedule, t)))


def time_of_sigma(schedule: Schedule, sigma: np.ndarray) -> np.ndarray:
    n, table = schedule.timesteps, np.log(np.asarray(schedule.alphas_cumprod, np.float64)) / 2
    return np.interp(-np.log1p(np.square(sigma)) / 2, table[::-1], np.arange(n, 0, -1) / n)


def dpm_solver_grid(
    schedule: Schedule, skip: str, steps: int, first: float, last: float
) -> np.ndarray:
    """Times [steps + 1] from `first` down to `last`."""
    if skip == "logSNR":
        ends = sigma_of_time(schedule, np.array([first, last]))
        return time_of_sigma(schedule, np.geomspace(*ends, steps + 1))
    if skip == "time_uniform":
        return np.linspace(first, last, steps + 1)
    if skip == "time_quadratic":
        return np.linspace(first**0.5, last**0.5, steps + 1) ** 2
    raise NotYet(f"skip_type {skip!r}")


@dataclasses.dataclass(frozen=True)
class DenoiseToZero:
    """Runs an algorithm; also returns the x0 predicted at its last step."""

    algorithm: Multistep | Singlestep

    def __call__(self, b: Basis, sigmas: np.ndarray) -> Iterator[Row]:
        yield from self.algorithm(b, sigmas[:-1])
        keep, w = exponential(self.algorithm.form, sigmas[-2], 0.0)
        yield Row(sigmas[-2], 0.0, keep * b.x + w @ b.m[:1])


def dpm_solver(case: Case) -> Results:
    """DPM_Solver used directly, or by DPMSolverSampler, which has its own defaults."""
    wrapped = "S" in case.kwargs
    kwargs = {"order": 2 if wrapped else 3, "method": "multistep" if wrapped else "singlestep"}
    kwargs |= {"predict_x0": wrapped, "skip_type": "time_uniform", "solver_type": "dpm_solver"}
    kwargs |= {"steps": case.kwargs.get("S", 20), "lower_order_final": True, "max_val": 1.0}
    kwargs |= case.kwargs | case.kwargs.get("init", {}) | case.kwargs.get("sample", {})
    model, _ = model_of(case)
    schedule, n = model.schedule, model.schedule.timesteps
    steps, order, skip = int(kwargs["steps"]), kwargs["order"], kwargs["skip_type"]
    method, taylor = kwargs["method"], kwargs["solver_type"] == "taylor"
    form: Form = "x0" if kwargs["predict_x0"] else "eps"
    ends = kwargs.get("t_start") or 1.0, kwargs.get("t_end") or 1.0 / n
    times = dpm_solver_grid(schedule, skip, steps, *ends)
    sigmas = sigma_of_time(schedule, times)
    if method == "multistep":
        lower = steps < 15 and kwargs["lower_order_final"]
        second = "exact" if taylor else "half"
        algorithm = Multistep(order, form, second, "released", lower)
    elif method == "singlestep":
        if skip != "logSNR":
            raise NotYet("the original crashes: singlestep needs logSNR")
        algorithm = Singlestep(order, form, taylor)
        orders = split(steps, order)  # steps of one length, with their calls evenly within them
        logs = np.log(sigmas[[0, -1]])
        inner = (i + np.arange(1, o + 1) / o for i, o in enumerate(orders))
        places = np.concatenate([[0.0], *inner])
        sigmas = np.exp(logs[0] + places / len(orders) * (logs[1] - logs[0]))
    elif method == "singlestep_fixed":
        algorithm = Singlestep(order, form, taylor, fixed=True)
        outer = dpm_solver_grid(schedule, skip, steps // order, *ends)
        inner = [
            dpm_solver_grid(schedule, skip, order, a, b)[1:] for a, b in itertools.pairwise(outer)
        ]
        sigmas = sigma_of_time(schedule, np.concatenate([outer[:1], *inner]))
    else:
        raise NotYet(f"method {method!r}")
    if kwargs.get("denoise_to_zero"):
        algorithm, sigmas = DenoiseToZero(algorithm), np.append(sigmas, 0.0)
    sampler = Tableau(algorithm, order, form, history=order - 1)
    node = sampler.table(sigmas, lambda sigma: (time_of_sigma(schedule, sigma) - 1 / n) * 1000)
    guidance = kwargs.get("guidance_type", "classifier-free")
    scale = kwargs.get("guidance_scale", kwargs.get("scale", 1.0))
    objectives = {"noise": "eps", "x_start": "x0", "v": "v"}
    if kwargs.get("model_type", "noise") not in objectives:
        raise NotYet(f"model_type {kwargs['model_type']!r}")

    def classified(eps: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """The classifier's log probability is -0.5 sum((x - x0)^2 mask) and a term without x."""
        table = jnp.log(jnp.asarray(schedule.alphas_cumprod)) / 2
        logs = jnp.interp(t / 1000 + 1 / n, jnp.arange(1, n + 1) / n, table)
        gradient = -(x - case.image("x0")) * case.image("mask")
        return eps - scale * jnp.sqrt(-jnp.expm1(2 * logs)) * gradient

    bound = kwargs["max_val"] if kwargs.get("thresholding") else None
    states, _ = run_rows(
        case,
        model,
        sampler,
        node,
        case.image("x_T"),
        scale=scale if guidance == "classifier-free" else 1.0,
        quantize=None if bound is None else dynamic_threshold(0.995, bound),
        correct=classified if guidance == "classifier" else None,
        objective=objectives[kwargs["model_type"]] if "model_type" in kwargs else None,
    )
    grid = dpm_solver_grid(schedule, skip, steps, 1.0, 1.0 / n)
    results = {"x_final": nchw(states[-1]), "timesteps": times, "grid": grid}
    results["model_times"] = node.t
    if "sched_t" in case.inputs:
        sigma = sigma_of_time(schedule, case.inputs["sched_t"])
        results |= {
            "sched_log_mean_coeff": log_alpha(schedule, case.inputs["sched_t"]),
            "sched_std": sigma / np.hypot(1, sigma),
            "sched_lambda": -np.log(sigma),
            "sched_inverse_lambda": time_of_sigma(schedule, sigma),
        }
    return results


K_SAMPLERS = [
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
]
# Recorded runs differ from the registry: fresh noise in both stages, the third moment as released,
# the error norm of the batch.
RECORDED = {
    "dpmpp_sde": Tableau(DPMppSDE(one_path=False), 1, history=1, draws=1),
    "dpmpp_3m_sde": Tableau(
        MultistepSDE(3, second="exact", third="released", lower_final=False),
        2,
        history=2,
        draws=1,
    ),
    "dpm_adaptive": DPMAdaptive(per_image=False),
}


def k_sampler(case: Case) -> Results:
    """k-diffusion's samplers; their state is x / sqrt(abar), hence the scaling on both sides."""
    name = case.cls.split()[0].rsplit("sample_", 1)[1]
    kwargs, (model, _) = case.kwargs | case.kwargs.get("sample", {}), model_of(case)
    schedule, scale = model.schedule, kwargs.get("scale", 1.0)
    sampler = RECORDED.get(name, SAMPLERS[name])
    sigmas = case.inputs["sigmas"].astype(np.float64)
    logs = log_sigmas(schedule)
    q = case.inputs["q_sigma"].astype(np.float64) if "q_sigma" in case.inputs else sigmas[:-1]
    results: Results = {"model_sigmas": np.exp(logs)}
    if "sigma_to_t" in case.expected:
        t = sigma_to_t(schedule, q)
        results["sigma_to_t"] = np.round(t) if kwargs.get("quantize") else t
    if "t_to_sigma" in case.expected:
        results["t_to_sigma"] = t_to_sigma(
            schedule, [0, 0.5, 10.25, schedule.timesteps - 1.25, schedule.timesteps - 1.0]
        )
    if isinstance(sampler, DPMAdaptive):
        options = pick(kwargs, "rtol atol h_init")
        node = sampler.table(sigmas[0], sigmas[-1] or sigmas[-2], logs, **options)
        x = case.image("x_T") * sigmas[0] / np.hypot(1, sigmas[0])
        predict = predictor(denoiser_of(case, model, scale), schedule, model.objective)
        row = jax.tree.map(lambda a: a[0], node)
        last, _ = sampler.run(predict, jnp.asarray(x, jnp.float32), row)
        return results | {"x_final": nchw(last * np.hypot(1, sigmas[-1] or sigmas[-2]))}
    if name == "dpm_fast":
        sigmas = np.append(np.full(kwargs["n"], sigmas[0]), sigmas[-1] or sigmas[-2])
    theirs = {"churn": "s_churn"}
    options = {o: kwargs[theirs.get(o, o)] for o in sampler.options if theirs.get(o, o) in kwargs}
    if name == "dpmpp_2m_sde" and kwargs.get("solver_type") == "heun":
        sampler = Tableau(MultistepSDE(2, second="exact", lower_final=False), 2, history=1, draws=1)
    node = sampler.table(sigmas, lambda sigma: sigma_to_t(schedule, sigma), **options)
    x = case.image("x_T") * (sigmas[0] / np.hypot(1, sigmas[0]))
    noise, _ = noises(case, mask_first=False)
    states, trace = run_rows(
        case,
        model,
        sampler,
        node,
        x,
        scale=scale,
        noise=noise,
        rounded=bool(kwargs.get("quantize")),
        objective="v" if case.cls.endswith("CompVisVDenoiser") else None,
    )
    begin = np.flatnonzero(node.begin)
    last_a = 1 / np.hypot(1, sigmas[-1])
    hat = node.s[begin].astype(np.float64) / node.a[begin]
    kicked = (
        node.keep * states[:-1].T + node.kick * rows_from(node, sampler, noise, x.shape)[:, 0].T
    )
    results |= {
        "x_final": nchw(states[-1] / last_a),
        "x_steps": nchw((kicked.T)[begin] * np.hypot(1, hat)[:, None, None, None, None]),
        "denoised_steps": nchw(np.asarray(trace.x0)[begin]),
        "sigma_hat": hat,
    }
    return results


def p_sample_loop(case: Case) -> Results:
    """Ancestral sampling from timestep `timesteps` - 1 (or `start_T` - 1) of the schedule.

    Pixel-space models clip the predicted x0.
    """
    kwargs, (model, _) = case.kwargs, model_of(case)
    pixels = case.cls.endswith("ddpm.DDPM")
    clip = kwargs.get("clip_denoised", pixels)
    count = kwargs.get("start_T") or kwargs.get("timesteps") or model.schedule.timesteps
    count = min(count, kwargs.get("timesteps") or count)
    grid, x, options = np.arange(count), case.image("x_T"), pick(kwargs, "temperature")
    if isinstance(options.get("temperature"), str):  # "<number> + <number>*i, indexed by t"
        first, slope = map(float, re.findall(r"[\d.]+", options["temperature"])[:2])
        options["temperature"] = first + slope * np.arange(model.schedule.timesteps)
    noise, masks = noises(case, mask_first=False)
    last, trace = run_sampler(
        case,
        model,
        DDPM(),
        grid,
        x,
        noise,
        known=known_of(case, masks),
        clip=clip,
        options=options,
    )
    if "x0_partials" in case.expected:
        return {"img": nchw(last), "x0_partials": nchw(trace.x0)}
    if case.cls.endswith("progressive_denoising"):
        steps = trace.x0
    else:
        every = kwargs.get("log_every_t", 100 if pixels else 1)
        logged = [i for i, t in enumerate(grid[::-1]) if t % every == 0 or t == grid[-1]]
        steps = np.concatenate([x[None], np.asarray(trace.x)[logged]])
    return {"x_final": nchw(last), "intermediates": nchw(steps)}


def k_loss(case: Case) -> Results:
    """k-diffusion's wrappers of a bare UNet: the loss of each sample, in sigmas, and x0.

    The losses are those of our targets: the mean squared error of eps, or of v (arXiv 2202.00512).
    """
    unet_config = {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {"use_checkpoint": False, **case.kwargs["unet"]},
    }
    unet = network(unet_config)
    assert isinstance(unet, UNet)
    table = unet_table(unet, "net.")
    params = case.params(table, shapes_of(unet))
    betas = re.fullmatch(r"(\w+) ([\d.e-]+)\.\.([\d.e-]+), T=(\d+)", case.kwargs["alphas_cumprod"])
    if betas is None:
        raise NotYet(f"alphas_cumprod {case.kwargs['alphas_cumprod']!r}")
    schedule = make_schedule(betas[1], int(betas[4]), float(betas[2]), float(betas[3]))
    objective = "v" if "VDDPM" in case.cls else "eps"
    sigma = case.inputs["sigma"].astype(np.float64)
    t = sigma_to_t(schedule, sigma)
    if case.kwargs.get("quantize"):
        t = np.round(t)
    a, s = (
        np.reshape(v, (-1, 1, 1, 1)).astype(np.float32)
        for v in (1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma))
    )
    x0, noise = case.image("x"), case.image("noise")

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            xt = a * x0 + s * noise
            out = unet.apply({"params": params}, xt, jnp.asarray(t, jnp.float32))
            chosen = obj.get_objective(objective)
            losses = obj.pointwise("l2", out, chosen.target(x0, noise, a, s))
            return losses.mean(), (losses, chosen.read(out, xt, a, s).x0)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (losses, denoised)), grads = run(params)
    return {"loss": losses, "denoised": nchw(denoised), "t": t} | {
        f"grad:{name}": g for name, g in to_theirs(table, grads).items()
    }


def k_grids(case: Case) -> Results:
    """Sigma grids with their final 0, by the names <kind>_n<count>[_rho<rho>]."""
    kwargs, results = case.kwargs, {}
    low, high, vp = kwargs["sigma_min"], kwargs["sigma_max"], kwargs.get("vp", {})
    for name in case.expected:
        kind, steps, rho = re.fullmatch(r"([a-z]+)_n(\d+)(?:_rho([\d.]+))?", name).groups()
        kind = {"poly": "polyexponential", "exp": "exponential"}.get(kind, kind)
        options = {} if rho is None else {"rho": float(rho)}
        ends = low, high
        if kind == "vp":
            options = pick(vp, "beta_d beta_min")
            ends = tuple(vp_sigma(np.array([vp.get("eps_s", 1e-3), 1.0]), **options))
        results[name] = np.append(SIGMA_GRIDS[kind](int(steps), *ends, **options), 0.0)
    return results


def tiny_net(params: Mapping[str, jax.Array], x: jax.Array, t: jax.Array) -> jax.Array:
    """c2(tanh(c1(x) + e([sin 3t, cos 3t]))) on x [b, c, h, w], t [b]."""

    def conv(name: str, x: jax.Array) -> jax.Array:
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        return jax.lax.conv(x, weight, (1, 1), "SAME") + bias[:, None, None]

    embedded = jnp.stack([jnp.sin(3 * t), jnp.cos(3 * t)], 1) @ params["e.weight"].T
    h = conv("c1", x) + (embedded + params["e.bias"])[:, :, None, None]
    return conv("c2", jnp.tanh(h))


def v_denoiser(case: Case) -> Results:
    """A network that predicts v at the angle of sigma."""
    x0, noise, sigma = (case.inputs[name] for name in ("x", "noise", "sigma"))
    params = {n: jnp.asarray(w, jnp.float32) for n, w in case.weights().items()}
    a, s = 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma)
    wide = (slice(None), None, None, None)
    t, v = jnp.asarray(sigma_to_angle(sigma), jnp.float32), obj.get_objective("v")

    def losses(params: Any) -> tuple[jax.Array, jax.Array]:
        out = tiny_net(params, a[wide] * x0 + s[wide] * noise, t)
        per_sample = obj.pointwise("l2", out, v.target(x0, noise, a[wide], s[wide]))
        return per_sample.mean(), per_sample

    grads, loss = jax.grad(losses, has_aux=True)(params)
    # The wrapper's input is y = x / a.
    scaled = a[wide] * x0
    denoised = v.read(tiny_net(params, scaled, t), scaled, a[wide], s[wide]).x0
    results = {"denoised": denoised, "loss": loss, "sigma_to_t": t}
    results |= {"c_skip": a**2, "c_out": -s, "c_in": a}
    if "t_to_sigma" in case.expected:
        given = re.search(r"t_to_sigma\(\[?([\d., ]+)", case.spec.get("notes", ""))
        times = np.array([0.1, 0.5, 0.9]) if given is None else np.fromstring(given[1], sep=",")
        results["t_to_sigma"] = angle_to_sigma(times)
    return results | {f"grad:{name}": g for name, g in grads.items()}


def k_log_likelihood(case: Case) -> Results:
    kwargs, base = case.kwargs, case.weights()
    if not base:  # the network is another case's, which the notes name
        name = re.search(r"net as in (\w+)", case.spec["notes"])
        assert name is not None
        base = Case(case.folder, name[1], case.manifest[name[1]], case.manifest).weights()
    params = {n: jnp.asarray(w, jnp.float32) for n, w in base.items()}

    def denoise(y: jax.Array, sigma: jax.Array) -> jax.Array:
        a, s = 1 / jnp.hypot(1.0, sigma), sigma / jnp.hypot(1.0, sigma)
        t = jnp.full(y.shape[:1], sigma_to_angle(sigma, jnp))
        return obj.get_objective("v").read(tiny_net(params, a * y, t), a * y, a, s).x0

    probe = 2.0 * case.inputs["v01"].astype(np.float32) - 1
    ends = kwargs["sigma_min"], kwargs["sigma_max"]
    tolerances = pick(kwargs, "atol rtol")
    return {"ll": log_likelihood(denoise, case.inputs["x"], probe, *ends, **tolerances)}


# -------------------------------------------------------------------------------------- the classes


def latent_diffusion(case: Case) -> Results:
    if "ckpt" in case.spec:
        return checkpoints.latent_diffusion(case)
    if "loss" in case.expected:
        return p_losses(case)
    if "x0_partials" in case.expected:
        return p_sample_loop(case)
    return whole_model(case)


def whole_model(case: Case) -> Results:
    """The UNet under its condition, and decoding, of a model whose weights are given in full."""
    try:
        whole = latent_diffusion_of(case.kwargs, buffers=False)
    except TargetError as error:
        raise NotYet(str(error)) from None
    # Buffers follow from the arguments, so a case may store them or not.
    buffers = {entry.source for entry in schedule_buffers(case.kwargs)}
    weights = {n: w for n, w in case.weights().items() if n not in buffers}
    params = to_ours(whole.table, weights, shapes=whole.shapes, where=f"{case.name} ({case.cls})")
    stage = FirstStage(
        params["first_stage"], case.kwargs.get("scale_factor", 1.0), whole.modules["first_stage"]
    )
    schedule = schedule_of(case.kwargs)
    model = LatentDiffusion(
        params, stage, schedule, whole.modules["unet"], Unconditional(), objective_of(case.kwargs)
    )
    cond, t, z = condition_of(case), jnp.asarray(case.inputs["t"]), case.image("x_T")
    # The recorded outputs are of decode_first_stage(0.5 * x_T).
    images = {
        "apply_model": jax.jit(model.apply)(params, z, t, cond),
        "decode_half": jax.jit(stage.decode)(0.5 * z),
        "decode_first_stage_half": jax.jit(stage.decode)(0.5 * z),
        "decode_first_stage_half_noquant": jax.jit(lambda z: stage.decode(z, quantize=False))(
            0.5 * z
        ),
    }
    return {name: nchw(a) for name, a in images.items()}


def ddpm(case: Case) -> Results:
    if "loss" in case.expected:
        return p_losses(case)
    return q_functions(case) if "q_sample" in case.expected else p_sample_loop(case)


CASES: Mapping[str, Callable[[Case], Results]] = {
    "ldm.models.diffusion.ddpm.DDPM.register_schedule": register_schedule,
    "ldm.modules.diffusionmodules.util.make_ddim_timesteps / "
    "make_ddim_sampling_parameters": ddim_schedules,
    "ldm.models.diffusion.ddpm.DDPM": ddpm,
    "ldm.models.diffusion.ddpm.LatentDiffusion": latent_diffusion,
    "ldm.models.diffusion.ddpm.LatentDiffusion.p_sample_loop": p_sample_loop,
    "ldm.models.diffusion.ddpm.LatentDiffusion.progressive_denoising": p_sample_loop,
    "ldm.models.diffusion.ddim.DDIMSampler": ddim_sampler,
    "ldm.models.diffusion.ddim.DDIMSampler (stable-diffusion checkout)": ddim_sampler,
    "ldm.models.diffusion.plms.PLMSSampler": plms_sampler,
    "ldm.models.diffusion.dpm_solver.sampler.DPMSolverSampler": dpm_solver,
    "ldm.models.diffusion.dpm_solver.dpm_solver.DPM_Solver": dpm_solver,
    "ldm.models.diffusion.dpm_solver.dpm_solver.DPM_Solver (stable-diffusion)": dpm_solver,
    **{
        f"k_diffusion.sampling.sample_{name} with k_diffusion.external.{wrapper}": k_sampler
        for name in K_SAMPLERS
        for wrapper in ("CompVisDenoiser", "CompVisVDenoiser")
    },
    "k_diffusion.sampling.get_sigmas_*": k_grids,
    "k_diffusion.external.VDenoiser": v_denoiser,
    "k_diffusion.sampling.log_likelihood": k_log_likelihood,
    "k_diffusion.external.DiscreteVDDPMDenoiser": k_loss,
    "k_diffusion.external.DiscreteEpsDDPMDenoiser": k_loss,
}
