"""Options of the original's classes that no published model sets, on recorded inputs."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.convert.compvis.classifier import noisy_classifier
from ldm_jax.convert.compvis.networks import table_of
from ldm_jax.convert.compvis.targets import transformer_wrapper_from_params
from ldm_jax.convert.tables import to_ours, to_theirs
from ldm_jax.diffusion import objective as obj
from ldm_jax.diffusion.guidance import predictor, unguided
from ldm_jax.diffusion.samplers import DDIM, DDPM, sample, step_grid
from ldm_jax.diffusion.schedule import condition_timesteps, q_sample
from ldm_jax.errors import TargetError
from ldm_jax.models import patches
from ldm_jax.models.classifier import Classifier, cross_entropy, top_k_hits
from ldm_jax.models.ldm import FirstStage
from ldm_jax.nn.resize import resize_to
from ldm_jax.train.optim import cycles
from ldm_jax.train.state import ema_update
from ldm_jax.train.tasks.batch_resize import BatchResize
from ldm_jax.train.tasks.label_maps import label_loss

from . import diffusion, stages
from .golden import Case, NotYet, nchw, nhwc, shapes_of, summed_gradient

Results = dict[str, Any]


def gradients(table: Any, grads: Any) -> Results:
    """Gradients under the original's names, those that nothing reaches as zeros."""
    return {f"grad:{name}": a for name, a in to_theirs(table, grads).items()}


def network(case: Case) -> Results:
    """A network of pictures: its result, and the gradients of mean(y^2)."""
    module, params, table = stages.build(case)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> Any:
            y = module.apply({"params": params}, x)
            return jnp.square(y).mean(), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, y), (grads, at_x) = run(params, case.image("x"))
    y = nchw(y) if y.ndim == 4 else y
    return {"y": y, "grad:x": summed_gradient(case, "grad:x", nchw(at_x))} | gradients(table, grads)


def transformer_wrapper(case: Case) -> Results:
    kwargs = dict(case.kwargs)
    encoder = kwargs.pop("encoder", None)
    kwargs = dict(kwargs.get("wrapper", kwargs))
    if encoder is not None:
        target = "ldm.modules.x_transformer.Encoder"
        kwargs["attn_layers"] = {"target": target, "params": encoder}
    try:
        module = transformer_wrapper_from_params(kwargs)
    except TargetError as error:
        raise NotYet(str(error)) from None
    table = table_of(module, "")
    params, tokens = case.params(table, shapes_of(module)), case.inputs["tokens"]
    mask = case.inputs["mask"].astype(bool) if "mask" in case.inputs else None

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            y = module.apply({"params": params}, tokens, mask).embeddings
            return (y * case.inputs.get("w", 1.0)).sum(), y

        (_, y), grads = jax.value_and_grad(loss, has_aux=True)(params)
        plain = module.apply({"params": params}, tokens, mask)
        later = module.apply({"params": params}, tokens, None, plain.mems)
        return y, grads, plain, later

    y, grads, plain, later = run(params)
    return {
        "embeddings": y,
        "logits": plain.logits,
        "y": plain.logits,
        "attn_last": plain.attention[-1],
        "mems_last": plain.mems[-1],
        "embeddings_with_mems": later.embeddings,
    } | gradients(table, grads)


# ------------------------------------------------------------------------------------- first stages


def gumbel_vq(case: Case) -> Results:
    kwargs = dict(case.kwargs)
    module, params, table = stages.build(case)
    scheduler = kwargs.get("temperature_scheduler_config")
    if scheduler is None or not scheduler["target"].endswith("LambdaWarmUpCosineScheduler"):
        raise NotYet(f"temperature_scheduler_config {scheduler}")
    given = scheduler["params"]
    factor = cycles(
        ConfigDict(
            {
                "lengths": (given["max_decay_steps"],),
                "warmup": (given["warm_up_steps"],),
                "start": (given["lr_start"],),
                "high": (given["lr_max"],),
                "low": (given["lr_min"],),
            }
        ),
        "cosine",
    )
    temperatures = [factor(step) for step in case.spec["steps"]]
    chosen = re.search(r"that of step (\d+)", case.spec["call"])
    temperature = factor(int(chosen[1])) if chosen else 1.0
    x = case.image("x")
    noise = [-jnp.log(case.image(f"exponential_{mode}")) for mode in ("eval", "train")]

    def forward(params: Any, train: bool) -> Any:
        apply = {"variables": {"params": params}}
        y, code, h = module.apply(
            *apply.values(), x, train, noise[train], temperature, method="reconstruct"
        )
        return jnp.square(y).mean() + code.loss, (y, code, h)

    _, (decoded, code, h) = jax.jit(forward, static_argnums=1)(params, False)
    (_, (y, trained, _)), grads = jax.jit(
        jax.value_and_grad(forward, has_aux=True), static_argnums=1
    )(params, True)
    entry = module.apply({"params": params}, code.indices, method="codes")
    images = {"quant": code.z, "decoded": decoded, "prequant": h, "codebook_entry": entry}
    images |= {"train_quant": trained.z, "train_decoded": y}
    return {name: nchw(a) for name, a in images.items()} | {
        "temperature": jnp.stack(temperatures),
        "diff": code.loss,
        "indices": code.indices,
        "train_diff": trained.loss,
        "train_indices": trained.indices,
        **gradients(table, grads),
    }


def vqmodel(case: Case) -> Results:
    return vqmodel_ema(case) if "decoded_ema" in case.expected else stages.vqmodel(case)


def vqmodel_ema(case: Case) -> Results:
    """Gradient descent with an average of every parameter."""
    module, params, table = stages.build(case)
    rate = re.search(r"SGD\(([\d.]+)\)", case.spec["call"])
    count = re.search(r"(\d+) times", case.spec["call"])
    assert rate is not None
    assert count is not None
    x, ema = case.image("x"), params

    @jax.jit
    def update(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            y, code = module.apply({"params": params}, x)
            return jnp.square(y).mean() + code.loss

        return jax.tree.map(lambda p, g: p - float(rate[1]) * g, params, jax.grad(loss)(params))

    for n in range(1, int(count[1]) + 1):
        params = update(params)
        ema = ema_update(ema, params, jnp.int32(n), 0.9999)
    live, averaged = (nchw(module.apply({"params": p}, x)[0]) for p in (params, ema))
    shadows = {f"ema/{name.replace('.', '')}": a for name, a in to_theirs(table, ema).items()}
    results = {"decoded_live": live, "decoded_ema": averaged, "decoded_restored": live}
    return results | shadows | {"ema/num_updates": int(count[1])}


def batch_resize(case: Case) -> Results:
    """Bicubic square batches; the recorded choices are those of the steps after the first ones."""
    plan, results = BatchResize(*case.kwargs["batch_resize_range"]), {}
    image, choices = case.inputs["image"], iter(case.inputs.get("choice", ()).tolist())
    steps = sorted(int(name.removeprefix("step")) for name in case.expected)
    for step in steps:
        size = plan.size_at(step, None if step <= 4 else next(choices))
        fits = size == image.shape[1]
        y = image if fits else resize_to(jnp.asarray(image), (size, size), "bicubic")
        results[f"step{step}"] = nchw(y)
    return results


def vq_segmentation(case: Case) -> Results:
    module, params, table = stages.build(case)
    x, loss = case.inputs["segmentation"], case.kwargs["lossconfig"]
    quant = loss["target"].endswith("BCELossWithQuant")
    weight = loss.get("params", {}).get("codebook_weight", 1.0) if quant else 0.0

    @jax.jit
    def run(params: Any) -> Any:
        def total(params: Any) -> Any:
            y, code = module.apply({"params": params}, x)
            loss, metrics = label_loss(y, x, code.loss, weight)
            return loss, (metrics, y)

        return jax.value_and_grad(total, has_aux=True)(params)

    (total, (metrics, y)), grads = run(params)
    bound = module.bind({"params": params})
    labels = jax.nn.one_hot(y.argmax(-1), y.shape[-1])
    parts = {name: value for name, value in metrics.items() if name != "loss"}
    logged = {f"{split}/{n}": v for split in ("train", "val") for n, v in parts.items()}
    return {
        "loss": total,
        "val_loss": total,
        "xrec": nchw(y),
        "rgb_inputs": nchw(bound.to_rgb(x)),
        "rgb_reconstructions": nchw(bound.to_rgb(labels)),
        "train/total_loss": total,
        "val/total_loss": total,
        **logged,
        **gradients(table, grads),
    }


# --------------------------------------------------------------------------------- latent diffusion


def latent_diffusion(case: Case) -> Results:
    if "split_input_params" in case.spec or "split_input_params" in case.kwargs:
        return split_input(case)
    if case.kwargs.get("num_timesteps_cond", 1) > 1:
        return noised_condition(case)
    results = diffusion.latent_diffusion(case)
    if "apply_model" in case.expected and "apply_model" not in results:
        results |= applied(case)
    return results


def applied(case: Case) -> Results:
    """The network under its condition, and DDIM without noise."""
    model, _ = diffusion.model_of(case)
    cond, t = diffusion.condition_of(case), jnp.asarray(case.inputs["t"])
    run = jax.jit(model.apply)
    results = {"apply_model": nchw(run(model.params, case.image("x_start"), t, cond))}
    for name in case.expected:
        if found := re.fullmatch(r"ddim(\d+)", name):
            grid = step_grid("uniform", int(found[1]), model.schedule.timesteps, compat=True)
            x, options = case.image("x_T"), {"eta": 0.0}
            last, _ = diffusion.run_sampler(case, model, DDIM(), grid, x, None, options=options)
            results[name] = nchw(last)
    return results


def noised_condition(case: Case) -> Results:
    """The condition is noised at its own level; in the loop its noise accumulates."""
    model, _ = diffusion.model_of(case)
    schedule, kwargs, cond = model.schedule, case.kwargs, diffusion.condition_of(case)
    levels = condition_timesteps(schedule.timesteps, kwargs["num_timesteps_cond"])
    draws = [case.inputs[n] for n in sorted(case.inputs, key=number_of) if n.startswith("draw")]
    t, c_noise, noise, *rest = draws

    def noised(cond: Any, t: Any, noise: Any) -> Any:
        noise = noise if noise.ndim == 3 else nhwc(noise)
        return jax.tree.map(lambda c: q_sample(schedule, c, t, noise), cond)

    x0, noise = case.image("x"), nhwc(noise)
    first = noised(cond, jnp.asarray(levels)[t], c_noise)
    out = jax.jit(model.apply)(model.params, q_sample(schedule, x0, t, noise), t, first)
    each = obj.pointwise(
        kwargs.get("loss_type", "l2"), out, obj.target(model.objective, schedule, x0, noise, t)
    )
    loss, parts = obj.diffusion_loss(
        each,
        t,
        elbo=obj.elbo_weights(model.objective, schedule),
        simple_weight=kwargs.get("l_simple_weight", 1.0),
        elbo_weight=kwargs.get("original_elbo_weight", 0.0),
        logvar=jnp.full(schedule.timesteps, kwargs.get("logvar_init", 0.0)),
    )
    results = {"loss": loss, "cond_ids": levels}
    results |= {f"{split}/{n}": v for split in ("train", "val") for n, v in parts.items()}

    count = re.search(r"timesteps=(\d+)", case.spec["call"])
    steps = int(count[1]) if count else schedule.timesteps
    nodes = DDPM().nodes(schedule, np.arange(steps))

    @jax.jit
    def step(x: Any, node: Any, cond: Any, noise: Any) -> Any:
        denoise = unguided(lambda x, t, c: model.apply(model.params, x, t, c), cond)
        predict = predictor(
            denoise, schedule, model.objective, clip=kwargs.get("clip_denoised", False)
        )
        return sample(DDPM(), predict, x, node, schedule=schedule, noise=noise[None, None])[0]

    x, every = case.image("x_T"), kwargs.get("log_every_t", 1)
    shown = [x]
    for i, at in enumerate(reversed(range(steps))):
        cond = noised(cond, levels[at], rest[2 * i])
        node = jax.tree.map(lambda a, i=i: a[i : i + 1], nodes)
        x = step(x, node, cond, nhwc(rest[2 * i + 1]))
        if at % every == 0 or at == steps - 1:
            shown.append(x)
    return results | {"img": nchw(x), "intermediates": nchw(np.stack(shown))}


def number_of(name: str) -> int:
    """The place of a recorded draw ("draw12.normal")."""
    found = re.match(r"draw(\d+)", name)
    return int(found[1]) if found else -1


def split_input(case: Case) -> Results:
    """Patch-wise network, encoder and decoder."""
    kwargs, given = case.kwargs, case.spec.get("split_input_params")
    given = dict(given or case.kwargs["split_input_params"])
    factor = given.pop("vqf")
    given.pop("patch_distributed_vq", None)
    pairs = {name: tuple(given.pop(name)) for name in ("ks", "stride")}
    plan = patches.PatchPlan(**pairs, **given)
    model, table = diffusion.model_of(case)
    schedule, x, noise = model.schedule, case.image("x"), case.image("noise")
    t, cond = jnp.asarray(case.inputs["t"]), diffusion.condition_of(case)
    weights = case.weights()
    inner = kwargs["first_stage_config"]
    module = diffusion.network(inner)
    of_stage = table_of(module, "first_stage_model.")
    names = {entry.source for entry in of_stage}
    params = to_ours(
        of_stage,
        {n: w for n, w in weights.items() if n in names},
        shapes=shapes_of(module),
        where=case.name,
    )
    stage = FirstStage(params, kwargs.get("scale_factor", 1.0), module)
    cut = kwargs.get("cond_stage_key") in ("image", "LR_image", "segmentation", "bbox_img")

    def apply(params: Any, x: jax.Array) -> jax.Array:
        if cond.concat is not None and cut:
            return patches.patchwise(
                lambda _, x, c: model.apply(params, x, t, cond.replace(concat=c)),
                (x, cond.concat),
                plan,
            )
        return patches.patchwise(lambda _, x: model.apply(params, x, t, cond), (x,), plan)

    def loss(params: Any) -> jax.Array:
        out = apply(params, q_sample(schedule, x, t, noise))
        each = obj.pointwise(
            kwargs.get("loss_type", "l2"), out, obj.target(model.objective, schedule, x, noise, t)
        )
        return obj.diffusion_loss(
            each,
            t,
            elbo=obj.elbo_weights(model.objective, schedule),
            simple_weight=kwargs.get("l_simple_weight", 1.0),
            elbo_weight=kwargs.get("original_elbo_weight", 0.0),
            logvar=jnp.full(schedule.timesteps, kwargs.get("logvar_init", 0.0)),
        )[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(model.params)
    pixels = case.image("pixels")
    encode = jax.jit(
        lambda p: patches.patchwise(lambda _, p: stage.encode(p), (p,), plan, 1 / factor)
    )
    decode = jax.jit(lambda z: patches.patchwise(lambda _, z: stage.decode(z), (z,), plan, factor))
    results = {
        "loss": value,
        "apply_model": nchw(jax.jit(apply)(model.params, x)),
        "encoded": nchw(encode(pixels)),
        "decoded": nchw(decode(0.4 * x)),
    }
    for suffix, size, scale in (
        ("", x.shape[1:3], 1.0),
        ("_up", x.shape[1:3], factor),
        ("_down", pixels.shape[1:3], 1 / factor),
    ):
        rows, columns = plan.counts(*size)
        out = plan.scaled(scale)
        weight = patches.weights(out, rows, columns)
        shown = case.expected.get(f"weighting{suffix}", weight[None]).shape[-1]
        results[f"weighting{suffix}"] = np.moveaxis(weight, 0, -1)[None, None, ..., :shown]
        full = (int(size[0] * scale), int(size[1] * scale))
        results[f"normalization{suffix}"] = patches.normalization(out, *full)[None, None]
    return results | gradients(table, grads)


# --------------------------------------------------------------------------------------- classifier


def latent_classifier(case: Case) -> Results:
    kwargs = case.kwargs
    try:
        whole = noisy_classifier(kwargs)
    except TargetError as error:
        raise NotYet(str(error)) from None
    params = to_ours(whole.table, case.weights(), shapes=whole.shapes, where=case.name)
    inner = kwargs["diffusion_config"]["params"]
    schedule = diffusion.schedule_of(inner)
    stage = FirstStage(
        params["first_stage"], inner.get("scale_factor", 1.0), whole.modules.get("first_stage")
    )
    module = whole.modules["classifier"]
    maps = "segmentation" in case.inputs
    z = stage.encode(jnp.asarray(case.inputs["image"]))
    if maps:
        labels = jnp.asarray(case.inputs["segmentation"])
        while labels.shape[1] > z.shape[1]:
            size = labels.shape[1] // 2, labels.shape[2] // 2
            labels = resize_to(labels, size, "nearest")
        labels = labels.argmax(-1)
    else:
        labels = jnp.asarray(case.inputs["class_label"])

    @jax.jit
    def shared(params: Any, t: Any, noise: Any) -> Any:
        x = q_sample(schedule, z, t, noise)

        def loss(params: Any) -> Any:
            logits = module.apply({"params": params}, x, t)
            return cross_entropy(logits, labels).mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(params), x

    at = jnp.asarray(case.inputs["t"])
    ((loss, logits), grads), x = shared(params["classifier"], at, case.image("noise"))
    results = {"loss": loss, "targets": labels, "x_noisy": nchw(x)}
    for k in (1, 5):
        hits = top_k_hits(logits, labels, k).astype(jnp.float32)
        # Of maps the original sums over their width before it averages.
        results[f"acc{k}"] = hits.sum(-1).mean() / (k if maps else 1) if maps else hits.mean()
    results["logits"] = nchw(logits) if maps else logits
    table = table_of(module, "model.")
    results |= gradients(table, grads)
    for name in case.inputs:
        if found := re.fullmatch(r"noise_t(\d+)", name):
            t = jnp.full(len(z), int(found[1]))
            ((loss, logits), _), _ = shared(params["classifier"], t, case.image(name))
            results[f"loss_t{found[1]}"] = loss
            results[f"logits_t{found[1]}"] = nchw(logits) if maps else logits
    if "guided" in case.expected:
        results |= guided(case, whole, params, Classifier(params["classifier"], schedule, module))
    return results


def guided(case: Case, whole: Any, params: Any, classifier: Classifier) -> Results:
    """DDIM whose eps the classifier corrects."""
    inner, x = case.kwargs["diffusion_config"]["params"], case.image("x_T")
    steps = re.search(r"DDIM S=(\d+)", case.spec["call"])
    scale = re.search(r"e_t - ([\d.]+)\*sqrt", case.spec["call"])
    assert steps is not None
    assert scale is not None
    labels, schedule, unet = case.inputs["class_label"], classifier.schedule, whole.modules["unet"]
    grid = step_grid("uniform", int(steps[1]), schedule.timesteps, compat=True)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        predict = predictor(
            lambda x, t: unet.apply({"params": params["unet"]}, x, jnp.broadcast_to(t, len(x))),
            schedule,
            diffusion.objective_of(inner),
            correct=lambda eps, x, t: classifier.corrected(eps, x, t, labels, float(scale[1])),
        )
        noise = jnp.zeros((len(grid), 1, *x.shape))
        nodes = DDIM().nodes(schedule, grid)
        return sample(DDIM(), predict, x, nodes, schedule=schedule, noise=noise, trace=True)

    last, trace = run(params, x)
    shown = np.concatenate([x[None], np.asarray(trace.x0)])
    return {"guided": nchw(last), "guided_pred_x0": nchw(shown)}


_MODEL = "ldm.modules.diffusionmodules.model"
CASES: Mapping[str, Callable[[Case], Results]] = {
    f"{_MODEL}.LatentRescaler": network,
    f"{_MODEL}.MergedRescaleEncoder": network,
    f"{_MODEL}.MergedRescaleDecoder": network,
    f"{_MODEL}.FirstStagePostProcessor": network,
    "ldm.modules.x_transformer.TransformerWrapper": transformer_wrapper,
    "taming.models.vqgan.GumbelVQ": gumbel_vq,
    "taming.models.vqgan.VQSegmentationModel": vq_segmentation,
    "ldm.models.autoencoder.VQModel": vqmodel,
    "ldm.models.autoencoder.VQModel.get_input": batch_resize,
    "ldm.models.diffusion.ddpm.LatentDiffusion": latent_diffusion,
    "ldm.models.diffusion.classifier.NoisyLatentImageClassifier": latent_classifier,
}
