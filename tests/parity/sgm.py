"""Stable Diffusion XL: sgm's engines, embedders, samplers and blocks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.depth import depth_condition
from ldm_jax.conditioning.upscale import TextUpscale, noisy
from ldm_jax.convert.compvis import blocks
from ldm_jax.convert.compvis.encoders import clip_text_table, open_clip_table
from ldm_jax.convert.compvis.infer import Original
from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.targets import module_from_config
from ldm_jax.convert.originals import config_of, whole_from_config
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Table, source_shapes, to_ours
from ldm_jax.diffusion.discrete import DDIM
from ldm_jax.diffusion.grids import SIGMA_GRIDS, step_grid
from ldm_jax.diffusion.guidance import Predict, classifier_free, predictor, unguided
from ldm_jax.diffusion.objective import Prediction, get_objective
from ldm_jax.diffusion.samplers import SAMPLERS, sample
from ldm_jax.diffusion.schedule import level, make_schedule, t_to_sigma
from ldm_jax.diffusion.solvers import Multistep
from ldm_jax.diffusion.tableau import Tableau
from ldm_jax.models.build import build
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.nn.attention import SpatialTransformer
from ldm_jax.nn.layers import timestep_embedding

from . import options
from .golden import Case, NotYet, nchw, nhwc

Results = dict[str, Any]
SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")


def weights_of(case: Case) -> dict[str, np.ndarray]:
    """The weights of the base without those that are dropped, of the file, and of the case."""
    found: dict[str, np.ndarray] = {}
    if case.base is not None:
        drop = tuple(case.spec.get("params_drop") or ()) or ("\0",)
        found = {n: a for n, a in weights_of(case.base).items() if not n.startswith(drop)}
    if file := case.spec.get("ckpt"):
        with open_checkpoint(case.folder / Path(file)) as checkpoint:
            found |= {n: np.asarray(t.numpy()) for n, t in checkpoint.tensors.items()}
    found |= case.part("param")
    return {n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in found.items()}


def params_of(case: Case, table: Table, shapes: Mapping[str, Any], prefix: str = "") -> Any:
    """The parameters; arrays of another case may be of layers that this one lacks."""
    expected = source_shapes(table, shapes, case.cls)
    found = {n.removeprefix(prefix): a for n, a in weights_of(case).items()}
    own = {n: a for n, a in found.items() if expected.get(n) == a.shape}
    return to_ours(table, own, shapes=shapes, where=f"{case.name} ({case.cls})")


def tower_fields(open_clip: Mapping[str, int], vocabulary: int) -> dict[str, int]:
    """The fields of `CLIPText` of a small OpenCLIP tower."""
    return {
        "hidden_size": open_clip["width"],
        "intermediate_size": 4 * open_clip["width"],
        "num_hidden_layers": open_clip["layers"],
        "num_attention_heads": open_clip["heads"],
        "projection_dim": open_clip["embed_dim"],
        "vocab_size": vocabulary,
    }


def engine_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the sizes of small towers in place of their names."""
    kwargs = dict(kwargs)
    tiny = kwargs.pop("_tiny_towers", None)
    if tiny is None:
        return kwargs
    models = []
    for model in kwargs["conditioner_config"]["params"]["emb_models"]:
        params = {k: v for k, v in model["params"].items() if k not in ("arch", "version")}
        if model["target"].endswith("FrozenCLIPEmbedder"):
            params |= {**tiny["clip_l"], "vocab_size": tiny["vocab_size"]}
        elif model["target"].endswith("FrozenOpenCLIPEmbedder2"):
            params |= {**tower_fields(tiny["open_clip"], tiny["vocab_size"]), "arch": "ViT-bigG-14"}
        models.append({**model, "params": params})
    conditioner = {**kwargs["conditioner_config"], "params": {"emb_models": models}}
    return {**kwargs, "conditioner_config": conditioner}


def whole_of(case: Case) -> Any:
    """The tables and networks of a DiffusionEngine's case."""
    original = Original(case.cls, engine_kwargs(case.kwargs))
    return whole_from_config(original.target, original.params)


def engine_of(case: Case) -> LatentDiffusion:
    """The model of a DiffusionEngine's case."""
    original, whole = Original(case.cls, engine_kwargs(case.kwargs)), whole_of(case)
    params = params_of(case, whole.table, whole.shapes)
    stage = params.pop("first_stage")
    return build(config_of(original, whole.modules), params, stage)


class Discrete:
    """sgm's DiscreteDenoiser: the noise level becomes the nearest of the schedule's."""

    def __init__(self, denoise: Callable[..., Any], levels: np.ndarray, objective: str = "eps"):
        self.denoise, self.levels = denoise, jnp.asarray(levels, jnp.float32)
        self.objective = objective

    def index(self, sigma: jax.Array) -> jax.Array:
        return jnp.abs(sigma[..., None] - self.levels).argmin(-1)

    def denoised(self, y: jax.Array, sigma: jax.Array) -> jax.Array:
        """x0 of ``y`` [b, ...] with noise ``sigma`` [b]."""
        t = self.index(sigma)
        s = self.levels[t].reshape(-1, 1, 1, 1)
        out = self.denoise(y / jnp.sqrt(1 + s**2), t)
        if self.objective == "v":
            return y / (s**2 + 1) - s / jnp.sqrt(s**2 + 1) * out
        return y - s * out

    def predict(self, x: jax.Array, t: Any, at: Any = None, eps: Any = None) -> Prediction:
        a, s = at
        y = x / a
        x0 = self.denoised(y, jnp.broadcast_to(s / a, x.shape[:1]))
        return Prediction((x - a * x0) / s, x0)


def run(
    name: str, predict: Predict, x: jax.Array, sigmas: np.ndarray, noise: Any, **options: Any
) -> jax.Array:
    """Runs a sampler in sigma; returns y after each call [S, b, ...]."""
    sampler: Any = SAMPLERS[name]
    node = sampler.table(sigmas, lambda called: np.zeros(len(called)), **options)
    rows = len(node.t)
    drawn = np.zeros((rows, 1, *x.shape), np.float32)
    uses = (node.kick != 0) | (node.next[:, -1] != 0) if sampler.draws else np.zeros(rows, bool)
    for row, one in zip(np.flatnonzero(uses), noise, strict=False):
        drawn[row, 0] = one
    _, trace = sample(sampler, predict, x, node, noise=jnp.asarray(drawn), trace=True)
    assert trace is not None
    # Between two stages of a step the noise is not one of the sigmas: their places are not used.
    ends = np.append(np.flatnonzero(node.begin)[1:] - 1, rows - 1)
    scale = np.hypot(1, np.asarray(sigmas[1:])).reshape(-1, *(1,) * x.ndim)
    return trace.x[ends] * jnp.asarray(scale, jnp.float32)


def legacy_sigmas(levels: np.ndarray, steps: int) -> np.ndarray:
    """Noise levels of LegacyDDPMDiscretization, with the final 0."""
    places = np.linspace(len(levels) - 1, 0, steps, endpoint=False).astype(int)
    return np.append(levels[places], 0.0)


def engine(case: Case) -> Results:
    """Conditioner, UNet, denoiser, samplers and first stage of SDXL."""
    model, given = engine_of(case), case.inputs
    conditioner: Any = model.conditioner
    b = len(given["x"])

    def encoded(prefix: str, blank: float = 0.0) -> dict[str, Any]:
        numbers = [
            given.get("negative_aesthetic_score" if prefix and "aesth" in n else n)
            for n in (*SIZES, "aesthetic_score")
        ]
        found = {
            name: jnp.broadcast_to(jnp.asarray(given[f"{prefix}tokens_{name}"], jnp.int32), (b, 77))
            for name in conditioner.towers
        }
        sizes = np.concatenate([n for n in numbers if n is not None], axis=1)
        return found | {"sizes": jnp.asarray(sizes), "blank": jnp.full(b, blank)}

    @jax.jit
    def program(model: LatentDiffusion, given: Mapping[str, jax.Array]) -> Results:
        run_ = lambda e: conditioner(model.params["conditioner"], e)  # noqa: E731
        cond, uncond, zero = map(run_, (encoded(""), encoded("uncond_"), encoded("uncond_", 1.0)))

        def apply(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
            return model.apply(model.params, x, t, cond)

        x, x_T = given["x"], given["x_T"]
        alone = Discrete(lambda x, t: apply(x, t, cond), levels)
        sigma = given["sigma"]
        guided = classifier_free(apply, cond, zero, case.spec["guidance_scale"])
        predict = Discrete(guided, levels).predict
        euler = run("euler", predict, x_T, sigmas, [])
        heun = run("heun", predict, x_T, sigmas, [])
        ancestral = run("euler_ancestral", predict, x_T, sigmas, noise)
        ddim = predictor(guided, model.schedule, model.objective)
        none = jnp.zeros((len(grid), 1, *x.shape))
        _, trace = sample(DDIM(), ddim, x_T, nodes, schedule=model.schedule, noise=none, trace=True)
        assert trace is not None
        dim = conditioner.clip_g.module.projection_dim
        return {
            "crossattn": cond.crossattn,
            "vector": cond.vector,
            "uncond_crossattn": uncond.crossattn,
            "uncond_vector": uncond.vector,
            "zero_uncond_vector": zero.vector,
            "clip_g_pooled": cond.vector[:, :dim],
            "unet": jnp.moveaxis(apply(x, given["t"], cond), -1, 1),
            "denoised": jnp.moveaxis(alone.denoised(x * sigma.reshape(-1, 1, 1, 1), sigma), -1, 1),
            "denoiser_index": alone.index(sigma),
            "euler_edm_steps": jnp.moveaxis(euler, -1, 2),
            "heun_edm_samples": jnp.moveaxis(heun[-1], -1, 1),
            "euler_ancestral_steps": jnp.moveaxis(ancestral, -1, 2),
            "decoded": jnp.moveaxis(model.first_stage.decode(euler[-1]), -1, 1),
            "ddim_steps": jnp.moveaxis(trace.x, -1, 2),
            "ddim_decoded": jnp.moveaxis(model.first_stage.decode(trace.x[-1]), -1, 1),
            "first_stage_moments": jnp.moveaxis(model.first_stage.moments(given["image"]), -1, 1),
        }

    noise = [nhwc(one) for one in given["noise"]]
    levels = t_to_sigma(model.schedule, np.arange(model.schedule.timesteps))
    steps = len(case.expected["euler_edm_steps"])
    sigmas = legacy_sigmas(levels, steps)
    grid = step_grid("uniform", steps, model.schedule.timesteps)
    nodes = DDIM().nodes(model.schedule, grid)
    images = ("x", "x_T", "image")
    arrays = {
        n: jnp.asarray(nhwc(a) if n in images else a) for n, a in given.items() if n != "noise"
    }
    arrays["t"] = arrays["t"].astype(jnp.int32)
    tables = {"denoiser_sigmas": levels, "sampler_sigmas": sigmas, "ddim_timesteps": grid[::-1]}
    return program(model, arrays) | tables


def embedders(case: Case) -> Results:
    """The states of both towers, and sinusoids of several numbers."""
    width, heads, layers, dim = case.kwargs["open_clip"]
    vocabulary = 64
    clip_l = CLIPText(**case.kwargs["clip"], vocab_size=vocabulary)
    sizes = {"width": width, "heads": heads, "layers": layers, "embed_dim": dim}
    clip_g = CLIPText(**tower_fields(sizes, vocabulary), hidden_act="gelu")
    at = "conditioner.embedders."
    tables = {
        "clip_l": (clip_l, clip_text_table(clip_l, f"{at}0.transformer.text_model.")),
        "clip_g": (clip_g, open_clip_table(clip_g, f"{at}1.model.", 0)),
    }
    states: dict[str, Any] = {}
    for name, (tower, table) in tables.items():
        params = params_of(case, table, param_shapes(tower))
        tokens = jnp.asarray(case.inputs[f"tokens_{name}"], jnp.int32)
        states[name] = jax.jit(tower.apply)({"params": params}, tokens)
    small, big = states["clip_l"], states["clip_g"]
    outdim = case.kwargs["outdim"]

    def numbers(values: list[Any]) -> np.ndarray:
        array = jnp.asarray(values, jnp.float32)
        return np.asarray(timestep_embedding(array.reshape(-1), outdim)).reshape(len(values), -1)

    hidden = {f"clip_hidden_{i}": s[:, :16] for i, s in enumerate(small.hidden)}
    return hidden | {
        "clip_last": small.last[:, :16],
        "clip_pooled": small.pooled[:, None],
        "openclip_last": big.hidden[-1][:, :16],
        "openclip_penultimate": big.hidden[-2][:, :16],
        "openclip_legacy_last": big.last[:, :16],
        "openclip_legacy_penultimate": big.penultimate[:, :16],
        "openclip_pooled": big.pooled,
        "nd_1d": numbers([6, 2.5]),
        "nd_3d": numbers([[1, 0, 1024], [7.5, 999, 13]]),
    }


def samplers(case: Case) -> Results:
    """sgm's samplers, scalings and discretizations on the UNet of ckpt_sdxl."""
    assert case.base is not None
    if set(case.kwargs) != {"num_steps", "scale"}:
        raise NotYet(f"the arguments {sorted(case.kwargs)}")
    network = case.base.kwargs["network_config"]
    unet = module_from_config(network["target"], network["params"])
    params = params_of(case, table_of(unet, "model.diffusion_model."), param_shapes(unet))
    schedule = make_schedule("linear", 1000, 0.00085, 0.012)
    levels = t_to_sigma(schedule, np.arange(1000))
    steps, scale = case.kwargs["num_steps"], case.kwargs["scale"]
    x = jnp.asarray(case.image("x_T"))
    noise = [nhwc(one) for one in case.inputs["noise"]]
    draws: Mapping[str, int] = case.spec["n_noise_draws"]
    sigmas = legacy_sigmas(levels, steps)

    def apply(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        out: Any = unet.apply({"params": params}, x, t, *cond)
        return out

    vector = jnp.asarray(case.inputs["vector"])
    cond = jnp.asarray(case.inputs["context"]), vector
    null = jnp.asarray(case.inputs["uncond_context"]), jnp.zeros_like(vector)
    guided = Discrete(classifier_free(apply, cond, null, scale), levels).predict
    plain = Discrete(unguided(apply, cond), levels).predict
    other = np.append(SIGMA_GRIDS["karras"](steps, 0.03, 14.6, rho=3.0), 0.0)
    churn = {"churn": 2.0, "s_tmin": 0.05, "s_tmax": 12.0, "s_noise": 1.003}
    order = case.spec["linear_multistep_order"]
    runs: dict[str, tuple[str, Predict, np.ndarray, dict[str, Any]]] = {
        "dpmpp2m": ("dpmpp_2m", guided, sigmas, {}),
        "dpmpp2s_ancestral": ("dpmpp_2s_ancestral", guided, sigmas, {}),
        "linear_multistep": ("lms", guided, sigmas, {"order": order}),
        "euler_churn": ("euler", guided, sigmas, churn),
        "euler_edm_discretization": ("euler", guided, other, {}),
        "euler_identity_guider": ("euler", plain, sigmas, {}),
    }
    results: Results = {}
    for name, (sampler, predict, levels_, extra) in runs.items():
        given = noise[: draws[name]]
        program = jax.jit(lambda x, a=(sampler, predict, levels_, given, extra): run(
            a[0], a[1], x, a[2], a[3], **a[4]
        ))  # fmt: skip
        results[name] = nchw(program(x)[-1])
    sigma = jnp.asarray(case.inputs["sigma"])
    lifted = sigma.reshape(-1, 1, 1, 1)
    for name, objective in (("Eps", "eps"), ("V", "v")):
        of = Discrete(lambda x, t: apply(x, t, cond), levels, objective)
        results[f"denoised_{name}Scaling"] = nchw(jax.jit(of.denoised)(x * lifted, sigma))

    def edm(y: jax.Array, sigma: jax.Array, data: float = 0.5) -> jax.Array:
        total = jnp.sqrt(sigma**2 + data**2).reshape(-1, 1, 1, 1)
        out = apply(y / total, jnp.log(sigma) / 4, cond)
        return data**2 / total**2 * y + sigma.reshape(-1, 1, 1, 1) * data / total * out

    results["denoised_EDMScaling"] = nchw(jax.jit(edm)(x * lifted, sigma))
    for name in case.expected:
        if name.startswith("legacy_ddpm_sigmas_"):
            results[name] = legacy_sigmas(levels, int(name.rsplit("_", 1)[1]))[:60]
    edm_levels = SIGMA_GRIDS["karras"](9, 0.002, 80.0)
    return results | {"edm_sigmas_9": np.append(edm_levels, 0.0)}


def unet(case: Case) -> Results:
    """A UNet under the names of a whole checkpoint."""
    module = module_from_config(case.cls, case.kwargs)
    params = params_of(case, table_of(module, "model.diffusion_model."), param_shapes(module))
    given = {n: jnp.asarray(a) for n, a in case.inputs.items() if n in ("t", "context", "y")}
    t = given.pop("t").astype(jnp.int32)
    out = jax.jit(module.apply)({"params": params}, case.image("x"), t, **given)
    return {"out": nchw(out)}


_TRANSFORMER = {"in_channels", "n_heads", "d_head", "depth", "context_dim", "use_linear"}
_OTHER = {"use_checkpoint", "dropout", "attn_type", "disable_self_attn", "sdp_backend"}


def spatial_transformer(case: Case) -> Results:
    """A SpatialTransformer, of plain and of large inputs."""
    kwargs = case.kwargs
    if unknown := kwargs.keys() - _TRANSFORMER - _OTHER:
        raise NotYet(f"the arguments {sorted(unknown)}")
    depth, first = kwargs.get("depth", 1), bool(kwargs.get("disable_self_attn", False))
    module = SpatialTransformer(kwargs["n_heads"], kwargs["d_head"], depth, attend_to_context=first)
    x, context = case.image("x"), jnp.asarray(case.inputs["context"])
    linear = bool(kwargs.get("use_linear", False))
    table = list(blocks.spatial_transformer("", (), depth=depth, linear=linear))
    params = params_of(case, table, param_shapes(module, x, context))
    apply = jax.jit(module.apply)
    results = {"out": nchw(apply({"params": params}, x, context))}
    return results | {"out_big": nchw(apply({"params": params}, 512 * x, context))}


# ------------------------------------------------------------------------------ Stable Diffusion 2


def second_of(case: Case) -> LatentDiffusion:
    """The model of a case of Stable Diffusion 2."""
    kwargs = {n: v for n, v in case.kwargs.items() if n != "_tiny_tower"}
    tiny = case.kwargs["_tiny_tower"]
    fields = tower_fields(tiny, tiny["vocab_size"])
    del fields["projection_dim"]
    text = dict(kwargs["cond_stage_config"])
    text["params"] = {**text["params"], **fields}
    original = Original(case.cls, {**kwargs, "cond_stage_config": text})
    whole = whole_from_config(original.target, original.params)
    params = params_of(case, whole.table, whole.shapes)
    stage = params.pop("first_stage")
    return build(config_of(original, whole.modules), params, stage)


def joined_of(case: Case, model: LatentDiffusion) -> tuple[Results, dict[str, Any]]:
    """(results, what is encoded beside the text) of the picture of a case."""
    given, conditioner = case.inputs, model.conditioner
    if "mask" in given:
        mask, masked = case.image("mask"), jnp.asarray(case.image("masked_image"))
        f = model.first_stage.downsampling
        z = jax.jit(model.first_stage.encode)(masked)
        joined = jnp.concatenate([jnp.asarray(mask[:, ::f, ::f]), z], axis=-1)
        return {"c_concat": nchw(joined)}, {"joined": joined}
    if "depth" in given:
        depth = depth_condition(case.image("depth"), given["x"].shape[2:])
        return {"c_concat": nchw(depth)}, {"depth": depth}
    if "lr_image" in given:
        assert isinstance(conditioner, TextUpscale)
        level = given["noise_level"].astype(np.int32)
        picture = noisy(conditioner.schedule, case.image("lr_image"), level, case.image("lr_noise"))
        return {"low_scale_z": nchw(picture)}, {"picture": picture, "level": level}
    return {}, {}


def second(case: Case) -> Results:
    """Text, network, conversions between predictions, DDIM and DPM-Solver."""
    model, b = second_of(case), len(case.inputs["x"])
    conditioner: Any = model.conditioner
    results, beside = joined_of(case, model)

    def encoded(name: str) -> Any:
        tokens = np.broadcast_to(case.inputs[name].astype(np.int32), (b, 77))
        return {"text": tokens, **beside} if beside else tokens

    grid = step_grid("uniform", len(case.expected["ddim_steps"]) - 1, 1000)
    nodes = DDIM().nodes(model.schedule, grid)
    times = np.linspace(1.0, 1e-3, 6)
    fine = np.arange(1, 1001) / 1000
    logs = np.log(np.asarray(model.schedule.alphas_cumprod, np.float64)) / 2
    log_a = np.interp(times, fine, logs)
    sigmas = np.sqrt(np.expm1(-2 * log_a))
    solver = Tableau(Multistep(2, "x0", "half", "released", True), 2, history=1)
    node = solver.table(sigmas, lambda called: (times[: len(called)] - 1e-3) * 1000)

    @jax.jit
    def program(model: LatentDiffusion, given: Mapping[str, jax.Array]) -> Results:
        def condition(name: str) -> Any:
            return conditioner(model.params["conditioner"], encoded(name))

        def apply(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
            return model.apply(model.params, x, t, cond)

        cond, null = condition("tokens"), condition("uncond_tokens")
        x, t, x_T = given["x"], given["t"], given["x_T"]
        out = apply(x, t, cond)
        of = get_objective(model.objective)
        prediction = of.read(out, x, *level(model.schedule, t, x))
        guided = classifier_free(apply, cond, null, case.spec["guidance_scale"])
        predict = predictor(guided, model.schedule, model.objective)
        none = jnp.zeros((len(grid), 1, *x.shape))
        _, trace = sample(
            DDIM(), predict, x_T, nodes, schedule=model.schedule, noise=none, trace=True
        )
        assert trace is not None
        solved, _ = sample(solver, predict, x_T, node)
        noise = given["noise"]
        image = lambda a: jnp.moveaxis(a, -1, -3)  # noqa: E731
        return {
            "c": cond.crossattn,
            "uc": null.crossattn,
            "apply_model": image(out),
            f"x0_from_{model.objective}": image(prediction.x0),
            f"eps_from_{model.objective}": image(prediction.eps),
            "v_target": image(get_objective("v").target(x, noise, *level(model.schedule, t, x))),
            "ddim_steps": image(jnp.concatenate([x_T[None], trace.x])),
            "ddim_pred_x0": image(jnp.concatenate([x_T[None], trace.x0])),
            "dpmsolver_samples": image(solved),
            "decoded": image(model.first_stage.decode(trace.x[-1])),
        }

    arrays = {n: jnp.asarray(case.image(n)) for n in ("x", "x_T", "noise")}
    return results | program(model, arrays | {"t": jnp.asarray(case.inputs["t"], jnp.int32)})


def latent_diffusion(case: Case) -> Results:
    """A model of Stable Diffusion 2, or one of the first family."""
    return second(case) if "_tiny_tower" in case.kwargs else options.latent_diffusion(case)


_DDPM = "ldm.models.diffusion.ddpm."
CASES: Mapping[str, Callable[[Case], Results]] = {
    f"{_DDPM}LatentDiffusion": latent_diffusion,
    f"{_DDPM}LatentInpaintDiffusion": second,
    f"{_DDPM}LatentDepth2ImageDiffusion": second,
    f"{_DDPM}LatentUpscaleDiffusion": second,
    "sgm.models.diffusion.DiffusionEngine": engine,
    "sgm.modules.encoders.modules.FrozenCLIPEmbedder / FrozenOpenCLIPEmbedder2 / "
    "ConcatTimestepEmbedderND": embedders,
    "sgm.modules.diffusionmodules.sampling.*": samplers,
    "sgm.modules.diffusionmodules.openaimodel.UNetModel": unet,
    "sgm.modules.attention.SpatialTransformer": spatial_transformer,
}
