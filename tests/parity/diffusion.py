"""Schedules, losses and samplers: the original's LatentDiffusion and DDPM objects, with the recorded noise handed
in."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import Cond, Unconditional
from ldm_jax.convert.compvis import unet_table
from ldm_jax.convert.tables import Entry, Table, to_ours, to_theirs, under
from ldm_jax.convert.targets import TargetError, module_from_config
from ldm_jax.convert.whole import latent_diffusion as latent_diffusion_of
from ldm_jax.convert.whole import schedule_buffers
from ldm_jax.diffusion import objective as obj
from ldm_jax.diffusion.guidance import Denoiser, classifier_free, predictor, unguided
from ldm_jax.diffusion.samplers import DDIM, DDPM, Known, Trace, sample, step_grid
from ldm_jax.diffusion.schedule import (
    Schedule,
    make_betas,
    make_schedule,
    posterior,
    predict_x0,
    q_mean_variance,
    q_sample,
)
from ldm_jax.latent import FirstStage, LatentDiffusion
from ldm_jax.models.unet import UNet

from .golden import Case, NotYet, nchw, nhwc, shapes_of

Results = dict[str, Any]
UNET = "model.diffusion_model."

# ------------------------------------------------------------------------------------------------------------ the model


def pick(kwargs: Mapping[str, Any], names: str) -> dict[str, Any]:
    """The named (apart by spaces) arguments that are given."""
    return {name: kwargs[name] for name in names.split() if name in kwargs}


def schedule_of(kwargs: Mapping[str, Any]) -> Schedule:
    """The schedule that DDPM's arguments describe."""
    if kwargs.get("given_betas") is not None:
        raise NotYet("given_betas")
    return make_schedule(**pick(kwargs, "beta_schedule timesteps linear_start linear_end cosine_s v_posterior"))


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

    Conditions come to it ready made, hence no conditioner; samplers are told of the model by the case that their
    weights come from.
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
    return LatentDiffusion(params, first_stage, schedule, unet, Unconditional(), objective_of(kwargs)), table


def condition_of(case: Case, name: str = "c") -> Cond:
    """The condition that the input ``name`` (or <name>_concat, <name>_crossattn) is, by the model's conditioning key;
    none where it is not there."""
    owner: Case | None = case
    while owner is not None and "conditioning_key" not in owner.kwargs:
        owner = owner.base
    key = None if owner is None else owner.kwargs["conditioning_key"]
    given = case.inputs

    def of(kind: str) -> str | None:
        return f"{name}_{kind}" if f"{name}_{kind}" in given else name if key == kind and name in given else None

    concat, crossattn, vector = of("concat"), of("crossattn"), of("adm")
    return Cond(
        crossattn=None if crossattn is None else jnp.asarray(given[crossattn]),
        concat=None if concat is None else jnp.asarray(case.image(concat)),
        vector=None if vector is None else jnp.asarray(given[vector]),
    )


# --------------------------------------------------------------------------------------------------------- schedules, q


def register_schedule(case: Case) -> Results:
    schedule = schedule_of(case.kwargs)
    tables = {name: getattr(schedule, name) for name in Schedule.__dataclass_fields__ if name != "v_posterior"}
    names = {
        "beta_schedule": "kind",
        "timesteps": "timesteps",
        "linear_start": "linear_start",
        "linear_end": "linear_end",
        "cosine_s": "cosine_s",
    }
    betas = make_betas(**{ours: case.kwargs[theirs] for theirs, ours in names.items() if theirs in case.kwargs})
    return tables | {"lvlb_weights": obj.elbo_weights(objective_of(case.kwargs), schedule), "betas_float64": betas}


def ddim_schedules(case: Case) -> Results:
    schedule, results = schedule_of(case.kwargs), {}
    for kind, steps, eta in case.kwargs["combos"]:
        grid = step_grid(kind, steps, schedule.timesteps, compat=True)
        nodes = jax.tree.map(lambda a: a[::-1], DDIM().nodes(schedule, grid, eta=eta))
        # Two tables are float32 arithmetic on rounded values in the original (errors near 1e-5), which no sampler of
        # ours repeats.
        abar, prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        values = {
            "timesteps": nodes.t,
            "sigmas": nodes.sigma,
            "alphas": abar[grid],
            "alphas_prev": nodes.sqrt_abar_prev.astype(np.float64) ** 2,
            "sqrt_one_minus_alphas": np.sqrt(1 - abar[grid]),
            "sigmas_for_original_num_steps": np.float32(eta) * np.sqrt((1 - prev) / (1 - abar) * (1 - abar / prev)),
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
        results |= dict(zip((f"{prefix}_mean", f"{prefix}_variance", f"{prefix}_log_variance"), triple, strict=True))
    return {name: nchw(a) for name, a in results.items()}


# --------------------------------------------------------------------------------------------------------------- losses


def p_losses(case: Case) -> Results:
    """Loss, its parts and gradients; latent models weight by logvar (learned or constant), pixel-space DDPM does
    not."""
    model, table = model_of(case)
    kwargs, schedule = case.kwargs, model.schedule
    x0, noise, t = case.image("x_start"), case.image("noise"), jnp.asarray(case.inputs["t"])
    cond, latent = condition_of(case), case.cls.endswith("LatentDiffusion")

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            out = model.apply(params, q_sample(schedule, x0, t, noise), t, cond)
            per_sample = obj.pointwise(
                kwargs.get("loss_type", "l2"), out, obj.target(model.objective, schedule, x0, noise, t)
            )
            logvar = (
                params.get("logvar", jnp.full(schedule.timesteps, kwargs.get("logvar_init", 0.0))) if latent else None
            )
            weights = {
                "simple_weight": kwargs.get("l_simple_weight", 1.0),
                "elbo_weight": kwargs.get("original_elbo_weight", 0.0),
            }
            return obj.diffusion_loss(
                per_sample, t, elbo=obj.elbo_weights(model.objective, schedule), **weights, logvar=logvar
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, parts), grads = run(model.params)
    logged = {f"{prefix}/{name}": value for prefix in ("train", "val") for name, value in parts.items()}
    return {"loss": loss, **parts, **logged} | {f"grad:{name}": g for name, g in to_theirs(table, grads).items()}


# ------------------------------------------------------------------------------------------------------------- samplers


def denoiser_of(case: Case, model: LatentDiffusion, scale: float) -> Denoiser:
    """The model under the case's condition, guided by ``scale`` unless that is 1 or there is nothing to guide away
    from."""

    def apply(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        return model.apply(model.params, x, t, cond)

    cond, null = condition_of(case), condition_of(case, "uc")
    if scale == 1.0 or not jax.tree.leaves(null):
        return unguided(apply, cond)
    return classifier_free(apply, cond, null, scale)


def corrector(text: str | None) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None:
    """A score corrector from its formula, "e_t + <number>*x"."""
    if text is None:
        return None
    formula = re.fullmatch(r"e_t\s*([+-])\s*([\d.]+)\s*\*\s*x", text)
    if formula is None:
        raise NotYet(f"score_corrector {text!r}")
    weight = float(formula[1] + formula[2])
    return lambda eps, x, t: eps + weight * x


def known_of(case: Case) -> Known | None:
    """The region to keep, where the case has one."""
    if "mask" not in case.inputs:
        return None
    return Known(case.image("x0"), case.image("mask"), case.image("mask_noise"))


def run_sampler(
    case: Case,
    model: LatentDiffusion,
    sampler: Any,
    grid: np.ndarray,
    x: np.ndarray,
    noise: np.ndarray | None,
    *,
    options: Mapping[str, Any],
    clip: bool = False,
    scale: float = 1.0,
) -> tuple[jax.Array, Trace]:
    """The whole run from ``x`` with step noise [S, b, c, h, w], zeros where a case records none; ``options`` are the
    sampler's eta and temperature."""
    if case.kwargs.get("quantize_x0") or case.kwargs.get("quantize_denoised"):
        raise NotYet("a quantising first stage")
    nodes = sampler.nodes(model.schedule, grid, **options)
    correct = corrector(case.kwargs.get("score_corrector"))

    @jax.jit
    def run(model: LatentDiffusion, x: jax.Array, noise: jax.Array, known: Known | None) -> Any:
        predict = predictor(
            denoiser_of(case, model, scale), model.schedule, model.objective, clip=clip, correct=correct
        )
        return sample(
            sampler, predict, x, nodes, schedule=model.schedule, noise=noise[:, None], known=known, trace=True
        )

    steps = np.zeros((len(grid), *x.shape), np.float32) if noise is None else nhwc(noise)
    last, trace = run(model, x, steps, known_of(case))
    assert trace is not None
    return last, trace


def ddim_sampler(case: Case) -> Results:
    kwargs, (model, _) = case.kwargs, model_of(case)
    if "t_start" in kwargs:
        return img2img(case, model)
    grid = step_grid(kwargs.get("ddim_discretize", "uniform"), kwargs["S"], model.schedule.timesteps, compat=True)
    x, options = case.image("x_T"), pick(kwargs, "eta temperature")
    last, trace = run_sampler(
        case,
        model,
        DDIM(),
        grid,
        x,
        case.inputs.get("noise"),
        options=options,
        scale=kwargs.get("unconditional_guidance_scale", 1.0),
    )
    with_start = (np.concatenate([x[None], steps]) for steps in trace)
    x_inter, pred_x0 = (nchw(steps) for steps in with_start)
    return {"x_final": nchw(last), "x_inter": x_inter, "pred_x0": pred_x0, "timesteps": grid}


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


def p_sample_loop(case: Case) -> Results:
    """Ancestral sampling from timestep ``timesteps`` - 1 of the schedule; pixel-space models clip what they predict."""
    kwargs, (model, _) = case.kwargs, model_of(case)
    pixels = case.cls.endswith("ddpm.DDPM")
    clip = pixels and kwargs.get("clip_denoised", True)
    grid, x = np.arange(kwargs.get("timesteps", model.schedule.timesteps)), case.image("x_T")
    last, trace = run_sampler(
        case, model, DDPM(), grid, x, case.inputs.get("noise"), clip=clip, options=pick(kwargs, "temperature")
    )
    if case.cls.endswith("progressive_denoising"):
        steps = trace.x0
    else:
        every = kwargs.get("log_every_t", 100 if pixels else 1)
        logged = [i for i, t in enumerate(grid[::-1]) if t % every == 0 or t == grid[-1]]
        steps = np.concatenate([x[None], np.asarray(trace.x)[logged]])
    return {"x_final": nchw(last), "intermediates": nchw(steps)}


# ---------------------------------------------------------------------------------------------------------- the classes


def latent_diffusion(case: Case) -> Results:
    if "ckpt" in case.spec:
        raise NotYet("checkpoint files")
    if "loss" in case.expected:
        return p_losses(case)
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
    stage = FirstStage(params["first_stage"], case.kwargs.get("scale_factor", 1.0), whole.modules["first_stage"])
    schedule = schedule_of(case.kwargs)
    model = LatentDiffusion(params, stage, schedule, whole.modules["unet"], Unconditional(), objective_of(case.kwargs))
    cond, t, z = condition_of(case), jnp.asarray(case.inputs["t"]), case.image("x_T")
    # The recorded outputs are of decode_first_stage(0.5 * x_T).
    images = {
        "apply_model": jax.jit(model.apply)(params, z, t, cond),
        "decode_first_stage_half": jax.jit(stage.decode)(0.5 * z),
        "decode_first_stage_half_noquant": jax.jit(lambda z: stage.decode(z, quantize=False))(0.5 * z),
    }
    return {name: nchw(a) for name, a in images.items()}


def ddpm(case: Case) -> Results:
    if "loss" in case.expected:
        return p_losses(case)
    return q_functions(case) if "q_sample" in case.expected else p_sample_loop(case)


CASES: Mapping[str, Callable[[Case], Results]] = {
    "ldm.models.diffusion.ddpm.DDPM.register_schedule": register_schedule,
    "ldm.modules.diffusionmodules.util.make_ddim_timesteps / make_ddim_sampling_parameters": ddim_schedules,
    "ldm.models.diffusion.ddpm.DDPM": ddpm,
    "ldm.models.diffusion.ddpm.LatentDiffusion": latent_diffusion,
    "ldm.models.diffusion.ddpm.LatentDiffusion.p_sample_loop": p_sample_loop,
    "ldm.models.diffusion.ddpm.LatentDiffusion.progressive_denoising": p_sample_loop,
    "ldm.models.diffusion.ddim.DDIMSampler": ddim_sampler,
    "ldm.models.diffusion.ddim.DDIMSampler (stable-diffusion checkout)": ddim_sampler,
}
