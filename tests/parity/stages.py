"""First stages, quantisers, conditioning networks and the classifier of each case."""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert.compvis.networks import table_of
from ldm_jax.convert.compvis.targets import module_from_config
from ldm_jax.convert.compvis.whole import loss_parts
from ldm_jax.convert.tables import CONV, Table, to_ours, to_theirs
from ldm_jax.errors import TargetError
from ldm_jax.models.autoencoder import DiagonalGaussian
from ldm_jax.models.perceptual import LPIPS
from ldm_jax.models.permuter import PERMUTERS
from ldm_jax.models.quantize import (
    EMAQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    share_of,
)
from ldm_jax.models.vqgan import VQModel, VQModelInterface
from ldm_jax.train.state import ema_update
from ldm_jax.train.tasks.adversarial import (
    DISCRIMINATOR_LOSSES,
    Adversary,
    discriminator_gradients,
    generator_gradients,
    judge,
    make_nll,
    with_condition,
)
from ldm_jax.train.tasks.autoencoder import code_metrics

from . import checkpoints
from .golden import Case, NotYet, nchw, nhwc, shapes_of, summed_gradient

Results = dict[str, Any]


def build(case: Case, prefix: str = "", **more: Any) -> tuple[Any, Any, Table]:
    """(module, variables or parameters, table) of a case."""
    kwargs = dict(case.kwargs) | more
    if "used" in case.spec:
        kwargs["remap"] = case.spec["used"]
        if "unknown_index" in case.spec:
            kwargs["unknown_index"] = case.spec["unknown_index"]
    try:
        module = module_from_config(case.cls, kwargs)
    except TargetError as error:
        raise NotYet(str(error)) from None
    table = table_of(module, prefix)
    if "ckpt" in case.spec:
        return module, checkpoints.first_stage_params(case), table
    return module, case.params(table, shapes_of(module)), table


# --------------------------------------------------------------------------------------- classifier


def encoder_unet(case: Case) -> Results:
    module, params, _ = build(case)
    t = jnp.asarray(case.inputs["timesteps"])
    return {"y_pred": jax.jit(module.apply)({"params": params}, case.image("x"), t)}


# --------------------------------------------------------------------------------------- quantisers


def seeds() -> dict[str, jax.Array]:
    """An rng for unknown codes that become random ones."""
    return {"remap": jax.random.key(0)}


def replaced(
    module: VectorQuantizer, indices: jax.Array, recorded: np.ndarray | None
) -> jax.Array | None:
    """Recorded draws, one for each unknown code of ``indices`` in order, where they are."""
    if recorded is None:
        return None
    unknown = ~np.isin(np.asarray(indices), np.asarray(module.remap))
    drawn = np.zeros(unknown.shape, np.int32)
    drawn[unknown] = recorded
    return jnp.asarray(drawn)


def vector_quantizer(case: Case) -> Results:
    """Both of the original's quantisers; the first adds one-hot codes and an index column."""
    module, params, table = build(case)
    assert isinstance(module, VectorQuantizer)
    first, z, w = case.cls.endswith("VectorQuantizer"), case.image("z"), case.image("w")
    b, h, width, c = z.shape
    weight = re.search(r"\+ *(\d+) *\* *loss", case.spec["call"])
    weight = float(weight[1]) if weight else 2.0 if first else 3.0
    plain = module.clone(remap=None, sane_index_shape=True).apply({"params": params}, z).indices
    drawn = replaced(module, plain, case.inputs.get("r_forward"))

    @jax.jit
    def run(params: Any, z: jax.Array) -> Any:
        def objective(params: Any, z: jax.Array) -> Any:
            out = module.apply({"params": params}, z, drawn, rngs=seeds())
            return (out.z * w).sum() + weight * out.loss, out

        (_, out), grads = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, z)
        return out, grads

    out, (grads, grad_z) = run(params, z)
    bound = module.bind({"params": params}, rngs=seeds())
    entries = bound.codes(out.indices)
    results = {
        "z_q": nchw(out.z),
        "loss": out.loss,
        "indices": out.indices.reshape(-1, 1) if first else out.indices,
        "perplexity": out.perplexity,
        "min_encodings": jax.nn.one_hot(out.indices.reshape(-1), module.n_embed),
        "codebook_entry": nchw(entries.reshape(b, h, width, c)),
        "codebook_entry_noshape": entries.reshape(-1, c),
        "grad:z": summed_gradient(case, "grad:z", nchw(grad_z)),
    }
    if module.remap is not None:
        codes = jnp.asarray(case.inputs.get("codes", np.arange(module.n_embed)[None]), jnp.int32)
        drawn = replaced(module, codes, case.inputs.get("r_remap_all"))
        results["remap_all"] = bound.remap_to_used(codes, drawn)
        shape = case.expected["unmap_all"].shape
        all_of = jnp.arange(np.prod(shape)).reshape(shape) % module.re_embed
        results["unmap_all"] = bound.unmap_to_all(all_of)
    return results | {f"grad:{name}": a for name, a in to_theirs(table, grads).items()}


def gumbel(case: Case) -> Results:
    module, params, table = build(case)
    assert isinstance(module, GumbelQuantizer)
    z, w, gumbels = (case.image(name) for name in ("z", "w", "gumbels"))
    train = case.kwargs.get("train", True)

    @jax.jit
    def run(params: Any, z: jax.Array) -> Any:
        def objective(params: Any, z: jax.Array) -> Any:
            out, state = module.apply(
                {"params": params},
                z,
                gumbels,
                train=train,
                capture_intermediates=True,
                mutable=["intermediates"],
            )
            return (out.z * w).sum() + 10 * out.loss, (
                out,
                state["intermediates"]["proj"]["__call__"][0],
            )

        return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, z)

    (_, (out, logits)), (grads, grad_z) = run(params, z)
    b, h, width, _ = z.shape
    every = (jnp.arange(b * h * width) % module.n_embed).reshape(b, h, width)
    return {
        "z_q": nchw(out.z),
        "diff": out.loss,
        "indices": out.indices,
        "logits": nchw(logits),
        "codebook_entry_arange": nchw(module.apply({"params": params}, every, method="codes")),
        "grad:z": nchw(grad_z),
    } | {f"grad:{name}": a for name, a in to_theirs(table, grads).items()}


def ema_quantizer(case: Case) -> Results:
    """Training passes over z0, z1, ..., each updating the codebook, then z0 in evaluation."""
    module, variables, table = build(case)
    assert isinstance(module, EMAQuantizer)

    @jax.jit
    def train(variables: Any, z: jax.Array) -> Any:
        def loss(z: jax.Array) -> Any:
            out, written = module.apply(variables, z, train=True, mutable=["codebook"])
            return out.loss, (out, written)

        return jax.value_and_grad(loss, has_aux=True)(z)

    results: Results = {}
    for i, name in enumerate(case.inputs):
        (loss, (out, variables)), grad = train(variables, case.image(name))
        results |= {f"z_q{i}": nchw(out.z), f"loss{i}": loss, f"perplexity{i}": out.perplexity}
        results |= {f"indices{i}": out.indices, f"dloss_dz{i}": nchw(grad)}
        results |= {f"after{i}.{name}": a for name, a in to_theirs(table, variables).items()}
    out = jax.jit(module.apply)(variables, case.image("z0"))
    return results | {"eval_z_q": nchw(out.z), "eval_loss": out.loss, "eval_indices": out.indices}


# ------------------------------------------------------------------------------------- autoencoders


def vqmodel(case: Case) -> Results:
    if "random_indices" in case.inputs:
        return checkpoints.vqgan(case)
    module, params, _ = build(case)
    assert isinstance(module, VQModel)
    interface = isinstance(module, VQModelInterface)

    @jax.jit
    def run(params: Any, x: jax.Array, z: jax.Array) -> Any:
        variables = {"params": params}

        def apply(*args: Any, method: Any, **options: Any) -> Any:
            return module.apply(variables, *args, method=method, rngs=seeds(), **options)

        h = apply(x, method="prequant")
        code, z_code = apply(h, method="quantized"), apply(z, method="quantized")
        entry = apply(code.indices, method="codes").reshape(h.shape)
        images = {
            "prequant": h,
            "quant": code.z,
            "z_quant": z_code.z,
            "codebook_entry": entry,
            "decode_code": apply(entry, method=VQModel.decode),
        }
        numbers = {
            "emb_loss": code.loss,
            "indices": code.indices,
            "z_emb_loss": z_code.loss,
            "z_indices": z_code.indices,
        }
        if interface:
            latents = apply(x, method="encode")
            images |= {
                "encode": latents,
                "decode_z": apply(z, method="decode"),
                "decode_z_noquant": apply(z, method="decode", quantize=False),
                "reconstruction": apply(latents, method="decode"),
            }
        else:
            y, whole = apply(x, method="__call__")
            images |= {"decode_quant": apply(code.z, method="decode"), "forward_dec": y}
            numbers["forward_diff"] = whole.loss
        return images, numbers

    images, numbers = run(params, case.image("x"), case.image("z"))
    return {name: nchw(a) for name, a in images.items()} | numbers


def lpips(case: Case) -> Results:
    recipe = case.spec.get("param_recipe")
    kwargs = {"vgg_widths": case.spec["vgg_widths"]} if "vgg_widths" in case.spec else {}
    if recipe is None:
        module, params, _ = build(case, **kwargs)
    else:
        module = module_from_config(case.cls, {**case.kwargs, **kwargs})
        weights = {
            name: drawn(name, shape, recipe["seed"])
            for name, shape in case.spec["param_shapes"].items()
        }
        params = to_ours(table_of(module, ""), weights, shapes=shapes_of(module), where=case.name)
    assert isinstance(module, LPIPS)

    @jax.jit
    def run(params: Any, a: jax.Array, b: jax.Array) -> Any:
        def total(b: jax.Array) -> Any:
            distance, state = module.apply(
                {"params": params},
                a,
                b,
                capture_intermediates=lambda m, _: m.name == "vgg",
                mutable=["intermediates"],
            )
            return distance.sum(), (distance, state["intermediates"]["vgg"]["__call__"][0])

        return jax.value_and_grad(total, has_aux=True)(b)

    (_, (distance, maps)), grad = run(params, case.image("input"), case.image("target"))
    results = {"distance": distance[:, None, None, None], "grad:target": nchw(grad)}
    return results | {f"feat{i}": nchw(a) for i, a in enumerate(maps)}


def drawn(name: str, shape: list[int], seed: int) -> np.ndarray:
    """A weight by the rule of the recorded recipe (see `param_recipe` in the manifest)."""
    if name.startswith("scaling_layer."):
        values = [-0.030, -0.088, -0.188] if name.endswith("shift") else [0.458, 0.448, 0.450]
        return np.asarray(values, np.float32).reshape(shape)
    random = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0x7FFFFFFF)
    std = 0.5 if name.startswith("lin") else np.sqrt(2 / (shape[1] * 9)) if len(shape) == 4 else 0.1
    a = (random.standard_normal(shape) * std).astype(np.float32)
    return np.abs(a) if name.startswith("lin") else a


# --------------------------------------------------------------------------- losses of first stages


def gan_loss(case: Case) -> Results:
    """Losses, logs and gradients of a one-convolution generator, per step and optimiser."""
    kwargs, inputs, stored = case.kwargs, case.inputs, case.weights()
    kl = "contperceptual" in case.cls
    heads = [f"perceptual_loss.lin{i}.model.1.weight" for i in range(5)]
    widths = case.spec.get("vgg_widths", [stored[name].shape[1] for name in heads])
    ndf = {"disc_ndf": stored["discriminator.main.0.weight"].shape[0]}  # not of the KL class
    try:
        whole = loss_parts({"target": case.cls, "params": {**kwargs, **ndf}}, "", widths)
    except TargetError as error:
        raise NotYet(str(error)) from None
    parts = case.params(whole.table, whole.shapes)
    lpips, variables = whole.modules["lpips"], parts["discriminator"]
    adversary = Adversary(
        whole.modules["discriminator"],
        loss=kwargs.get("disc_loss", "hinge"),
        start=kwargs["disc_start"],
        factor=kwargs.get("disc_factor", 1.0),
        weight=kwargs.get("disc_weight", 1.0),
        idle_weight=not kl,
    )
    weight = kwargs.get("kl_weight" if kl else "codebook_weight", 1.0)
    x = case.image("inputs")
    cond = case.image("cond") if kwargs.get("disc_conditional") else None
    perceptual = kwargs.get("perceptual_weight", 1.0)
    dropped = [nhwc(inputs[f"u_dropout{i}"]) for i in range(5)] if "u_dropout0" in inputs else None

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        variables = {"params": parts["lpips"]}
        return lpips.apply(variables, a, b, dropped is not None, dropped)

    def make(weights: Any = None) -> Any:
        kind = kwargs.get("pixel_loss", "l1")
        return make_nll(
            x, kind, perceptual, distance if perceptual else None, summed=kl, weights=weights
        )

    nll, weighted = make(), None
    if "weights" in inputs:
        of_pixels = inputs["weights"]
        weighted = make(nhwc(of_pixels) if of_pixels.ndim == 4 else of_pixels)
    params = {"last_weight": CONV.to_ours(inputs["last_weight"]), "last_bias": inputs["last_bias"]}
    params["feat"] = case.image("feat")
    moments = "moments" if "moments" in inputs else "posterior_parameters"
    if kl:
        params |= {"logvar": parts["logvar"], moments: case.image(moments)}
    else:
        params["codebook_loss"] = inputs["codebook_loss"]

    def forward(params: Any) -> Any:
        places = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            params["feat"], params["last_weight"], (1, 1), "SAME", dimension_numbers=places
        )
        if not kl:
            return (y + params["last_bias"], jnp.mean(params["codebook_loss"])), None
        posterior = DiagonalGaussian.from_moments(params[moments])
        return (y + params["last_bias"], posterior.kl().mean()), None

    @jax.jit
    def evaluated(step: jax.Array) -> Any:
        (y, penalty), _ = forward(params)
        real, fake = (adversary.module.apply(variables, with_condition(a, cond)) for a in (x, y))
        nll_loss, log = nll(y, jnp.asarray(params.get("logvar", 0.0)))
        factor, loss = adversary.disc_factor(step), nll_loss + weight * penalty
        first = log | {
            "loss": loss,
            "penalty": penalty,
            "d_weight": 0.0,
            "disc_factor": factor,
            "g_loss": -fake.mean(),
        }
        disc_loss = factor * DISCRIMINATOR_LOSSES[adversary.loss](real, fake)
        second = {"disc_loss": disc_loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return first, second

    @jax.jit
    def trained(step: jax.Array) -> Any:
        made = generator_gradients(
            forward,
            params,
            nll,
            penalty_weight=weight,
            last_layer=lambda grads: grads["last_weight"],
            adversary=adversary,
            variables=variables,
            step=step,
            weighted=weighted,
            cond=cond,
        )
        (y, penalty), _ = forward(params)
        assert made.fake is not None
        real = judge(adversary.module, variables, x, cond)
        fake = judge(adversary.module, real.variables, y, cond)
        grads, second = discriminator_gradients(adversary, real, fake, step)
        first = made.metrics | {"penalty": penalty}
        # The original's first backward pass also reaches the discriminator, to no use.
        logits = made.fake.logits
        reached, _ = made.fake.pullback(jnp.full_like(logits, -1.0 / logits.size))
        reached = jax.tree.map(lambda g: made.metrics["adversarial_weight"] * g, reached)
        return first, second, made.grads, (reached, grads), made.fake.variables, fake.variables

    results: Results = {}
    passes: dict[str, dict[int, Any]] = {}  # gradients of inputs, by step
    table = table_of(adversary.module, "discriminator.")
    split = "train" if case.spec.get("train_mode", "in train mode" in case.spec["call"]) else "val"
    found = {int(m[1]) for name in case.expected if (m := re.search(r"step(\d+)\.", name))}
    for step in case.spec.get("global_steps", sorted(found)):
        at = f"step{step}"
        if split == "val":
            first, second = evaluated(jnp.int32(step))
        else:
            first, second, grads, of_disc, *afters = trained(jnp.int32(step))
            for name, grad in grads.items():
                turned = (
                    CONV.to_theirs(grad)
                    if name == "last_weight"
                    else nchw(grad)
                    if grad.ndim == 4
                    else grad
                )
                passes.setdefault(name, {})[step] = turned
            for i, (of_pass, after) in enumerate(zip(of_disc, afters, strict=True)):
                for name, grad in to_theirs(table, {**variables, "params": of_pass}).items():
                    results |= {
                        f"grad:{at}.opt{i}.{name}": grad,
                        f"grad:{at}.opt{i}.{name}[:8]": grad[:8] if grad.ndim else grad,
                    }
                for name, a in to_theirs(table, after).items():
                    results[f"{at}.opt{i}.after.{name}"] = a
        log = first | {
            "total_loss": first["loss"],
            "kl_loss" if kl else "quant_loss": first["penalty"],
        }
        log |= {"logvar": params["logvar"]} if kl else {}
        if "predicted_indices" in inputs:
            log |= code_metrics(
                share_of(jnp.asarray(inputs["predicted_indices"]), kwargs["n_classes"])
            )
        results |= {f"{at}.opt0.loss": first["loss"], f"{at}.opt1.loss": second["disc_loss"]}
        results |= {f"{at}.opt0.{split}/{name}": a for name, a in log.items()}
        results |= {f"{at}.opt1.{split}/{name}": a for name, a in second.items()}
    for name, grads in passes.items():
        for step, grad in grads.items():
            others = [g for other, g in grads.items() if other != step]
            for i in (0, 1):  # the second optimiser's pass reaches no input
                key = f"grad:step{step}.opt{i}.{name}"
                own = name == "logvar"  # a parameter of the loss
                results[key] = grad if own else summed_gradient(case, key, grad, *others)
    return results


def lit_ema(case: Case) -> Results:
    """The average over a stream of parameters; what is not trained has none, and stays."""
    inputs, kwargs, results = case.inputs, case.kwargs, {}
    net = {name.removeprefix("init/"): a for name, a in inputs.items() if name.startswith("init/")}
    live = {
        name: a
        for name, a in net.items()
        if f"after0/{name.replace('.', '')}" in case.expected and f"update0/{name}" in inputs
    }
    counted = kwargs.get("use_num_upates", True)  # as the original spells it
    n, ema, calls = kwargs.get("start_num_updates", 0), live, 0
    while any(name.startswith(f"update{calls}/") for name in inputs):
        n += 1
        net = net | {name: inputs[f"update{calls}/{name}"] for name in live}
        updates = jnp.int32(n) if counted else None
        ema = ema_update(ema, {name: net[name] for name in live}, updates, kwargs["decay"])
        results |= {f"after{calls}/{name.replace('.', '')}": a for name, a in ema.items()}
        results |= {
            f"after{calls}/decay": np.float32(kwargs["decay"]),
            f"after{calls}/num_updates": n if counted else -1,
        }
        calls += 1
    results |= {f"restored/{name}": a for name, a in net.items()}
    return results | {f"copied/{name}": a for name, a in (net | ema).items()}


# ------------------------------------------------------------------------------------- conditioning


def class_embedder(case: Case) -> Results:
    module, params, _ = build(case)
    return {"c": module.apply({"params": params}, case.inputs["labels"])}


def rescaler(case: Case) -> Results:
    module, params, _ = build(case)
    return {"y": nchw(jax.jit(module.apply)({"params": params}, case.image("x")))}


def clip_text(case: Case) -> Results:
    # A tower is stored under the prefix of its owner.
    last = "embeddings.token_embedding.weight"
    prefix = next(name for name in case.weights() if name.endswith(last)).removesuffix(last)
    module, params, _ = build(case, prefix)
    states = jax.jit(module.apply)({"params": params}, case.inputs["tokens"])
    return {
        "last_hidden_state": states.last,
        "pooler_output": states.pooled,
        "hidden_penultimate": states.hidden[-2],
        "embeddings": states.hidden[0],
    }


def permuters(case: Case) -> Results:
    x, results = case.inputs["x"], {}
    for name, make in PERMUTERS.items():
        forward, back = make(case.kwargs["H"], case.kwargs["W"])
        results |= {name: x[:, forward], f"{name}_reverse": x[:, back]}
    return results


CASES: Mapping[str, Callable[[Case], Results]] = {
    "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel": encoder_unet,
    "taming.modules.vqvae.quantize.VectorQuantizer": vector_quantizer,
    "taming.modules.vqvae.quantize.VectorQuantizer2": vector_quantizer,
    "taming.modules.vqvae.quantize.GumbelQuantize": gumbel,
    "taming.modules.vqvae.quantize.EMAVectorQuantizer": ema_quantizer,
    "ldm.models.autoencoder.VQModel": vqmodel,
    "ldm.models.autoencoder.VQModelInterface": vqmodel,
    "taming.models.vqgan.VQModel": vqmodel,
    "taming.modules.losses.lpips.LPIPS": lpips,
    "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator": gan_loss,
    "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": gan_loss,
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": gan_loss,
    "ldm.modules.ema.LitEma": lit_ema,
    "ldm.modules.encoders.modules.ClassEmbedder": class_embedder,
    "ldm.modules.encoders.modules.SpatialRescaler": rescaler,
    "transformers.CLIPTextModel": clip_text,
    "taming.modules.transformer.permuter": permuters,
}
