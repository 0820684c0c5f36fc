"""Networks and blocks: construction by class and arguments, inputs and outputs of each case."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert.compvis import blocks
from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.targets import module_from_config
from ldm_jax.convert.tables import Table, to_theirs, unused
from ldm_jax.errors import TargetError
from ldm_jax.models.autoencoder import DiagonalGaussian, normal_kl
from ldm_jax.models.discriminator import PatchDiscriminator, fit_actnorm
from ldm_jax.models.gpt import GPT, generate, keep_top_k
from ldm_jax.nn.attention import (
    AttentionBlock,
    AttnBlock,
    BasicTransformerBlock,
    FeedForward,
    LinearAttention,
    SpatialTransformer,
)
from ldm_jax.nn.layers import ddpm_timestep_embedding, timestep_embedding
from ldm_jax.nn.resnet import ResBlock, ResnetBlock
from ldm_jax.train.tasks.adversarial import hinge_loss, vanilla_loss

from . import checkpoints
from .golden import Case, NotYet, nchw, nhwc, shapes_of

Results = dict[str, Any]


def build(case: Case, prefix: str = "") -> tuple[Any, Any]:
    """(module, parameters) of a case whose class is a whole network."""
    try:
        module = module_from_config(case.cls, case.kwargs)
    except TargetError as error:
        raise NotYet(str(error)) from None
    if "ckpt" in case.spec:
        return module, checkpoints.first_stage_params(case)
    return module, case.params(table_of(module, prefix), shapes_of(module))


# --------------------------------------------------------------------------------------------- UNet


def unet(case: Case) -> Results:
    module, params = build(case)
    t = jnp.asarray(case.inputs["timesteps"])
    optional = {
        name: jnp.asarray(case.inputs[name]) for name in ("context", "y") if name in case.inputs
    }
    inside = ("time_embed", "input_blocks_0_0")

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        captured = {
            "capture_intermediates": lambda m, _: m.name in inside,
            "mutable": ["intermediates"],
        }
        y, state = module.apply({"params": params}, x, t, **optional, **captured)
        return y, *(state["intermediates"][name]["__call__"][0] for name in inside)

    y, time_embed, first = run(params, case.image("x"))
    return {"y_pred": nchw(y), "time_embed": time_embed, "input_block0": nchw(first)}


def timestep_embeddings(case: Case) -> Results:
    t, alt = jnp.asarray(case.inputs["t"]), case.kwargs.get("max_period_alt")
    results: Results = {}
    for name in case.expected:  # no function of ours: a plain broadcast
        if repeat := re.fullmatch(r"repeat_only_dim(\d+)", name):
            results[name] = np.repeat(case.inputs["t"][:, None], int(repeat[1]), axis=1)
    for dim in case.kwargs["dims"]:
        results[f"openai_dim{dim}"] = timestep_embedding(t, dim)
        if alt:
            results[f"openai_dim{dim}_maxperiod{alt}"] = timestep_embedding(t, dim, alt)
        results[f"ddpm_dim{dim}"] = ddpm_timestep_embedding(t, dim)
    return results


# ------------------------------------------------------------------------------------- autoencoders


def autoencoder_kl(case: Case) -> Results:
    module, params = build(case)

    @jax.jit
    def run(params: Any, x: jax.Array, z: jax.Array, noise: jax.Array) -> Any:
        variables = {"params": params}
        p, state = module.apply(
            variables,
            x,
            method="encode",
            capture_intermediates=lambda m, _: m.name in ("encoder", "quant_conv"),
            mutable=["intermediates"],
        )
        images = {
            "encoder_h": state["intermediates"]["encoder"]["__call__"][0],
            "moments": state["intermediates"]["quant_conv"]["__call__"][0],
            "mean": p.mean,
            "logvar": p.logvar,
            "mode": p.mode(),
            "sample": p.sample(noise),
            "decode_z": module.apply(variables, z, method="decode"),
            "reconstruction_mode": module.apply(variables, p.mode(), method="decode"),
        }
        return images, {"kl": p.kl(), "nll_of_z": p.nll(z)}

    images, numbers = run(params, case.image("x"), case.image("z"), case.image("sample_noise"))
    return {name: nchw(a) for name, a in images.items()} | numbers


def coder(case: Case) -> Results:
    module, params = build(case)
    return {"y": nchw(jax.jit(module.apply)({"params": params}, case.image("x")))}


def diagonal_gaussian(case: Case) -> Results:
    x, other_moments = case.image("x"), case.image("other_parameters")
    d, det = (
        DiagonalGaussian.from_moments(case.image("parameters"), deterministic)
        for deterministic in (False, True)
    )
    other = DiagonalGaussian.from_moments(other_moments)
    second = DiagonalGaussian.from_moments(jnp.concatenate([x, 0.3 * x], axis=-1))
    # The original can sum over other axes; ours sums over all but the batch, so that this one is
    # computed from its terms.
    nll_terms = 0.5 * (np.log(2 * np.pi) + other.logvar + jnp.square(x - other.mean) / other.var)
    images = {
        "mean": d.mean,
        "logvar": d.logvar,
        "std": d.std,
        "var": d.var,
        "sample": d.sample(case.image("noise")),
        "mode": d.mode(),
        "det_sample": det.sample(case.image("det_noise")),
        "det_std": det.std,
        "normal_kl_std": normal_kl(other.mean, other.logvar, 0.0, 0.0),
        "normal_kl_pair": normal_kl(other.mean, other.logvar, x, 0.3 * x),
        "grad:other_parameters": jax.grad(
            lambda moments: DiagonalGaussian.from_moments(moments).kl().sum()
        )(other_moments),
    }
    return {name: nchw(a) for name, a in images.items()} | {
        "other_kl": other.kl(),
        "kl_other_vs_o2": other.kl(second),
        "other_nll": other.nll(x),
        "other_nll_dims12": nll_terms.transpose(0, 3, 1, 2).sum((1, 2)),
        "det_kl": det.kl(),
        "det_nll": det.nll(x),
    }


# --------------------------------------------------------------------------------------------- text


def text_encoder(case: Case) -> Results:
    module, params = build(case, "transformer.")
    tokens = case.inputs["tokens"]
    run = jax.jit(module.apply, static_argnames="logits")
    return {
        "embeddings": run({"params": params}, tokens),
        "logits": run({"params": params}, tokens, logits=True),
    }


# ------------------------------------------------------------------------------------------- blocks


class Built(NamedTuple):
    """A block with its table and inputs that fit it, to tell its parameters' shapes."""

    module: nn.Module
    table: Table
    example: tuple


def _image(channels: int) -> jax.Array:
    return jnp.zeros((1, 8, 8, channels))


def _res_block(
    *,
    channels: int,
    emb_channels: int,
    dropout: float = 0.0,
    out_channels: int | None = None,
    use_conv: bool = False,
    use_scale_shift_norm: bool = False,
    up: bool = False,
    down: bool = False,
) -> Built:
    out = out_channels or channels
    module = ResBlock(
        out, dropout, use_scale_shift_norm, "up" if up else "down" if down else "none", use_conv
    )
    table = list(blocks.res_block("", (), skip=out != channels, conv_skip=use_conv))
    return Built(module, table, (_image(channels), jnp.zeros((1, emb_channels))))


def _attention_block(
    *,
    channels: int,
    num_heads: int = 1,
    num_head_channels: int = -1,
    use_new_attention_order: bool = False,
) -> Built:
    heads = num_heads if num_head_channels == -1 else channels // num_head_channels
    return Built(
        AttentionBlock(heads, use_new_attention_order),
        list(blocks.attention_block("", ())),
        (_image(channels),),
    )


def _spatial_transformer(
    *,
    in_channels: int,
    n_heads: int,
    d_head: int,
    depth: int = 1,
    dropout: float = 0.0,
    context_dim: int | None = None,
) -> Built:
    table = list(blocks.spatial_transformer("", (), depth=depth))
    context = () if context_dim is None else (jnp.zeros((1, 1, context_dim)),)
    return Built(
        SpatialTransformer(n_heads, d_head, depth, dropout), table, (_image(in_channels), *context)
    )


def _transformer_block(
    *,
    dim: int,
    n_heads: int,
    d_head: int,
    dropout: float = 0.0,
    context_dim: int | None = None,
    gated_ff: bool = True,
) -> Built:
    context = () if context_dim is None else (jnp.zeros((1, 1, context_dim)),)
    table = list(blocks.transformer_block("", (), glu=gated_ff))
    return Built(
        BasicTransformerBlock(n_heads, d_head, dropout, gated_ff),
        table,
        (jnp.zeros((1, 1, dim)), *context),
    )


def _resnet_block(
    *,
    in_channels: int,
    out_channels: int | None = None,
    conv_shortcut: bool = False,
    dropout: float = 0.0,
    temb_channels: int = 512,
) -> Built:
    out = out_channels or in_channels
    table: Table = list(
        blocks.resnet_block("", (), skip=out != in_channels, conv_skip=conv_shortcut)
    )
    if temb_channels:  # the autoencoders give no timestep, so this is never called
        table += [unused("temb_proj.weight", out, temb_channels), unused("temb_proj.bias", out)]
    return Built(ResnetBlock(out, dropout, conv_shortcut), table, (_image(in_channels),))


def _attn_block(*, in_channels: int) -> Built:
    return Built(AttnBlock(), list(blocks.attn_block("", ())), (_image(in_channels),))


def _linear_attention(*, dim: int, heads: int = 4, dim_head: int = 32) -> Built:
    return Built(
        LinearAttention(heads, dim_head), list(blocks.linear_attention("", ())), (_image(dim),)
    )


def _feed_forward(*, dim: int, mult: int = 4, glu: bool = False, dropout: float = 0.0) -> Built:
    return Built(
        FeedForward(mult, glu, dropout),
        list(blocks.feed_forward("", (), glu=glu)),
        (jnp.zeros((1, 1, dim)),),
    )


def block(make: Callable[..., Built]) -> Callable[[Case], Results]:
    """A case that calls one block with the inputs in the listed order."""

    def run(case: Case) -> Results:
        kwargs = {
            name: value
            for name, value in case.kwargs.items()
            if name not in ("use_checkpoint", "checkpoint")
        }
        try:
            built = make(**kwargs)
        except TypeError as error:
            raise NotYet(str(error)) from None
        params = case.params(built.table, param_shapes(built.module, *built.example))
        inputs = [nhwc(x) if x.ndim == 4 else x for x in case.inputs.values()]
        y = jax.jit(built.module.apply)({"params": params}, *inputs)
        return {"y": nchw(y) if y.ndim == 4 else y}

    return run


# ------------------------------------------------------------------------------- discriminator, GPT


def discriminator(case: Case) -> Results:
    module, variables = build(case)
    assert isinstance(module, PatchDiscriminator)
    if "x" in case.inputs:  # one training pass
        y, _ = module.apply(variables, case.image("x"), train=True, mutable=["batch_stats"])
        return {"y": nchw(y)}
    real, fake = case.image("x_real"), case.image("x_fake")
    results: Results = {"eval_logits": nchw(jax.jit(module.apply)(variables, real))}
    if module.use_actnorm:
        variables = jax.jit(lambda variables, x: fit_actnorm(module, variables, x))(variables, real)

    def loss(params: Any) -> Any:
        stats, logits = variables["batch_stats"], []
        for x in (real, fake):
            y, written = module.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            stats = written["batch_stats"]
            logits.append(y)
        return hinge_loss(*logits), (logits, stats)

    (hinge, (logits, stats)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    table = table_of(module, "")
    after = to_theirs(table, {"params": variables["params"], "batch_stats": stats})
    grads = to_theirs(table, {"params": grads, "batch_stats": stats})
    results |= {"train_logits_real": nchw(logits[0]), "train_logits_fake": nchw(logits[1])}
    results |= {"hinge_d_loss": hinge, "vanilla_d_loss": vanilla_loss(*logits)}
    if "weights" in case.inputs:
        # Per-sample weights: each side's mean over a sample's patches, weighted over the batch.
        weights = case.inputs["weights"]
        sides = [nn.relu(1 - logits[0]).mean((1, 2, 3)), nn.relu(1 + logits[1]).mean((1, 2, 3))]
        results["hinge_d_loss_weighted"] = 0.5 * sum(
            (weights * side).sum() / weights.sum() for side in sides
        )
    return (
        results
        | {f"after.{name}": a for name, a in after.items()}
        | {f"grad:{name}": a for name, a in grads.items()}
    )


def gpt(case: Case) -> Results:
    module, params = build(case)
    assert isinstance(module, GPT)
    idx = jnp.asarray(case.inputs["idx"], jnp.int32)
    embeddings, targets = case.inputs.get("embeddings"), case.inputs.get("targets")
    logits = jax.jit(module.apply)({"params": params}, idx, embeddings)
    results = {"y": logits, "logits": logits}
    if targets is not None:

        def loss(params: Any) -> jax.Array:
            logp = jax.nn.log_softmax(module.apply({"params": params}, idx, embeddings))
            return -jnp.take_along_axis(logp, jnp.asarray(targets)[..., None], axis=-1).mean()

        results["loss"], grads = jax.jit(jax.value_and_grad(loss))(params)
        results |= {f"grad:{name}": a for name, a in to_theirs(table_of(module, ""), grads).items()}
    if "with_past_logits" in case.expected:
        steps, cache, continued = [], module.empty_cache(len(idx)), jax.jit(module.apply)
        for piece in (
            idx[:, :2],
            *(idx[:, i : i + 1] for i in range(2, 1 + len(case.expected["with_past_logits"]))),
        ):
            out, cache = continued({"params": params}, piece, cache=cache)
            steps.append(out[:, -1])
        results["with_past_logits"] = jnp.stack(steps)
    if "greedy" in case.expected:
        length = case.expected["greedy"].shape[1]
        greedy = jax.jit(lambda params, idx: generate(module, params, idx, length - 2).tokens)
        results["greedy"] = greedy(params, idx[:, :2])
    results["top3_mask"] = jnp.isfinite(keep_top_k(logits[:, -1], 3)).astype(jnp.uint8)
    return results


CASES: Mapping[str, Callable[[Case], Results]] = {
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": unet,
    "ldm.modules.diffusionmodules.util.timestep_embedding": timestep_embeddings,
    "ldm.models.autoencoder.AutoencoderKL": autoencoder_kl,
    "ldm.modules.diffusionmodules.model.Encoder": coder,
    "ldm.modules.diffusionmodules.model.Decoder": coder,
    "ldm.modules.distributions.distributions.DiagonalGaussianDistribution": diagonal_gaussian,
    "ldm.modules.encoders.modules.BERTEmbedder": text_encoder,
    "ldm.modules.encoders.modules.TransformerEmbedder": text_encoder,
    "ldm.modules.diffusionmodules.openaimodel.ResBlock": block(_res_block),
    "ldm.modules.diffusionmodules.openaimodel.AttentionBlock": block(_attention_block),
    "ldm.modules.attention.SpatialTransformer": block(_spatial_transformer),
    "ldm.modules.attention.BasicTransformerBlock": block(_transformer_block),
    "ldm.modules.attention.FeedForward": block(_feed_forward),
    "ldm.modules.attention.LinearAttention": block(_linear_attention),
    "ldm.modules.attention.SpatialSelfAttention": block(_attn_block),
    "ldm.modules.diffusionmodules.model.ResnetBlock": block(_resnet_block),
    "ldm.modules.diffusionmodules.model.AttnBlock": block(_attn_block),
    "taming.modules.discriminator.model.NLayerDiscriminator": discriminator,
    "taming.modules.transformer.mingpt.GPT": gpt,
}
