"""First stages, quantisers, conditioning networks and the classifier of each case."""

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
    Quantized,
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
)
from ldm_jax.train.tasks.autoencoder import code_metrics

from . import checkpoints
from .golden import Case, NotYet, nchw, shapes_of

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


def quantizer_results(module: VectorQuantizer, out: Quantized, first: bool) -> Results:
    indices = out.indices.reshape(-1, 1) if first else out.indices
    return {"z_q": nchw(out.z), "loss": out.loss, "indices": indices}


def vector_quantizer(case: Case) -> Results:
    """Both of the original's quantisers; the first adds one-hot codes and an index column."""
    module, params, table = build(case)
    assert isinstance(module, VectorQuantizer)
    first, z, w = case.cls.endswith("VectorQuantizer"), case.image("z"), case.image("w")

    @jax.jit
    def run(params: Any, z: jax.Array) -> Any:
        def objective(params: Any, z: jax.Array) -> Any:
            out = module.apply({"params": params}, z, rngs=seeds())
            return (out.z * w).sum() + (2 if first else 3) * out.loss, out

        (_, out), grads = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, z)
        return out, grads

    out, (grads, grad_z) = run(params, z)
    bound = module.bind({"params": params}, rngs=seeds())
    b, h, width, c = z.shape
    entries = bound.codes(out.indices)
    results = quantizer_results(module, out, first) | {
        "perplexity": out.perplexity,
        "min_encodings": jax.nn.one_hot(out.indices.reshape(-1), module.n_embed),
        "codebook_entry": nchw(entries.reshape(b, h, width, c)),
        "codebook_entry_noshape": entries.reshape(-1, c),
        "grad:z": nchw(grad_z),
    }
    if module.remap is not None:
        results["remap_all"] = bound.remap_to_used(jnp.arange(module.n_embed)[None])
        results["unmap_all"] = bound.unmap_to_all(jnp.arange(module.re_embed)[None])
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
    kwargs, inputs = case.kwargs, case.inputs
    kl = "contperceptual" in case.cls
    try:
        whole = loss_parts({"target": case.cls, "params": kwargs}, "", case.spec["vgg_widths"])
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
    )
    weight = kwargs.get("kl_weight" if kl else "codebook_weight", 1.0)
    x = case.image("inputs")
    nll = make_nll(
        x,
        kwargs.get("pixel_loss", "l1"),
        kwargs.get("perceptual_weight", 1.0),
        lambda a, b: lpips.apply({"params": parts["lpips"]}, a, b),
        summed=kl,
    )
    params = {"last_weight": CONV.to_ours(inputs["last_weight"]), "last_bias": inputs["last_bias"]}
    if kl:
        params |= {
            "logvar": parts["logvar"],
            "posterior_parameters": case.image("posterior_parameters"),
        }

    def forward(params: Any) -> Any:
        places = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            case.image("feat"), params["last_weight"], (1, 1), "SAME", dimension_numbers=places
        )
        if not kl:
            return (y + params["last_bias"], jnp.mean(inputs["codebook_loss"])), y + params[
                "last_bias"
            ]
        posterior = DiagonalGaussian.from_moments(params["posterior_parameters"])
        return (y + params["last_bias"], posterior.kl().mean()), y + params["last_bias"]

    @jax.jit
    def evaluated(step: jax.Array) -> Any:
        (y, penalty), _ = forward(params)
        real, fake = (adversary.module.apply(variables, a) for a in (x, y))
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
        )
        (y, penalty), _ = forward(params)
        assert made.fake is not None
        real = judge(adversary.module, variables, x)
        fake = judge(adversary.module, real.variables, y)
        grads, second = discriminator_gradients(adversary, real, fake, step)
        first = made.metrics | {"penalty": penalty}
        return first, second, made.grads, grads, made.fake.variables, fake.variables

    results: Results = {}
    table = table_of(adversary.module, "discriminator.")
    split = "train" if case.spec["train_mode"] else "val"
    for step in case.spec["global_steps"]:
        at = f"step{step}"
        if split == "val":
            first, second = evaluated(jnp.int32(step))
        else:
            first, second, grads, of_disc, after_first, after_second = trained(jnp.int32(step))
            for name, grad in grads.items():
                turned = (
                    CONV.to_theirs(grad)
                    if name == "last_weight"
                    else nchw(grad)
                    if grad.ndim == 4
                    else grad
                )
                results[f"grad:{at}.opt0.{name}"] = turned
            for name, grad in to_theirs(table, {**variables, "params": of_disc}).items():
                results |= {
                    f"grad:{at}.opt1.{name}": grad,
                    f"grad:{at}.opt1.{name}[:8]": grad[:8] if grad.ndim else grad,
                }
            for optimizer, after in enumerate((after_first, after_second)):
                for name, a in to_theirs(table, after).items():
                    results[f"{at}.opt{optimizer}.after.{name}"] = a
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
    return results


def lit_ema(case: Case) -> Results:
    """The average over a stream of parameters; what is not trained has none, and stays."""
    inputs, results = case.inputs, {}
    live = {name.removeprefix("init/"): a for name, a in inputs.items() if name.startswith("init/")}
    frozen = {name: live.pop(name) for name in list(live) if f"update0/{name}" not in inputs}
    n, ema = case.kwargs.get("start_num_updates", 0), live
    for call in range(sum(name.startswith("update") for name in inputs) // len(live)):
        n += 1
        ema = ema_update(
            ema,
            {name: inputs[f"update{call}/{name}"] for name in live},
            jnp.int32(n),
            case.kwargs["decay"],
        )
        results |= {f"after{call}/{name.replace('.', '')}": a for name, a in ema.items()}
        results |= {
            f"after{call}/decay": np.float32(case.kwargs["decay"]),
            f"after{call}/num_updates": n,
        }
    return results | {f"copied/{name}": a for name, a in (frozen | ema).items()}


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
