"""Name tables of the original networks: latent-diffusion, stable-diffusion, taming-transformers.

Each ``*_table`` function walks one network from its module's fields; FAMILIES lists all of them.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert.compvis.autoencoders import (
    decoder_table,
    ema_table,
    encoder_table,
    gumbel_table,
    kl_table,
    vq_table,
    vqmodel_table,
)
from ldm_jax.convert.compvis.blocks import Walk, attention_block, res_block, spatial_transformer
from ldm_jax.convert.compvis.encoders import (
    bert_table,
    class_embedder_table,
    clip_text_table,
    clip_vision_table,
    rescaler_table,
)
from ldm_jax.convert.compvis.extras import (
    latent_rescaler_table,
    post_processor_table,
    rescale_decoder_table,
    rescale_encoder_table,
    transformer_wrapper_table,
)
from ldm_jax.convert.tables import (
    CHANNELS,
    CONV1D,
    CONV1X1,
    COUNT,
    DENSE,
    LEADING,
    Entry,
    Table,
    Unused,
    constant,
    conv,
    dense,
    embedding,
    norm,
    unused,
)
from ldm_jax.models.autoencoder import Autoencoder, AutoencoderKL, Decoder, Encoder
from ldm_jax.models.bert import TransformerEncoder
from ldm_jax.models.clip import CLIPText, CLIPVision
from ldm_jax.models.controlnet import HINT, ControlNet, encoder
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.embedders import ClassEmbedder, SpatialRescaler
from ldm_jax.models.encoder_unet import EncoderUNet, encoder_layout
from ldm_jax.models.gpt import GPT, causal_mask
from ldm_jax.models.perceptual import LPIPS, SCALE, SHIFT, VGG16_LAYERS
from ldm_jax.models.quantize import EMAQuantizer, GumbelQuantizer, Quantizer, VectorQuantizer
from ldm_jax.models.rescale import (
    FirstStagePostProcessor,
    LatentRescaler,
    MergedRescaleDecoder,
    MergedRescaleEncoder,
)
from ldm_jax.models.unet import Layout, Trunk, UNet, layout
from ldm_jax.models.vqgan import VQModel, VQModelInterface
from ldm_jax.models.x_transformer import TransformerWrapper


def _trunk(net: Trunk, plan: Layout, prefix: str) -> Table:
    """The time embedding and the blocks, which UNet and classifier share."""

    def blocks() -> Walk:
        for name, block in plan.blocks():
            source = prefix + re.sub(r"_(?=\d)", ".", name)  # input_blocks_3_0 -> input_blocks.3.0
            match block.kind:
                case "conv":
                    yield from conv(source, (name,))
                case "res" | "res_up" | "res_down":
                    yield from res_block(
                        f"{source}.", (name,), skip=block.channels_in != block.channels_out
                    )
                case "transformer":
                    linear = isinstance(net, UNet) and net.use_linear_in_transformer
                    yield from spatial_transformer(
                        f"{source}.", (name,), depth=block.depth, linear=linear
                    )
                case "attn":
                    yield from attention_block(f"{source}.", (name,))
                case "down" if net.conv_resample:
                    yield from conv(f"{source}.op", (name, "conv"))
                case "up" if net.conv_resample:
                    yield from conv(f"{source}.conv", (name, "conv"))

    return [
        *dense(f"{prefix}time_embed.0", ("time_embed", "dense_0")),
        *dense(f"{prefix}time_embed.2", ("time_embed", "dense_1")),
        *blocks(),
    ]


def _vector(unet: UNet, prefix: str) -> Walk:
    """The embedding of the vector condition."""
    match unet.num_classes:
        case None:
            pass
        case "continuous":
            yield from dense(f"{prefix}label_emb", ("label_emb",))
        case "sequential" | "timestep" as kind:  # behind the sinusoids of a timestep
            inner = f"{prefix}label_emb.{0 if kind == 'sequential' else 1}"
            yield from dense(f"{inner}.0", ("label_emb", "dense_0"))
            yield from dense(f"{inner}.2", ("label_emb", "dense_1"))
        case _:
            yield from embedding(f"{prefix}label_emb", ("label_emb",))


def unet_table(unet: UNet, prefix: str = "model.diffusion_model.") -> Table:
    """UNetModel."""
    table = [*_trunk(unet, layout(unet), prefix), *_vector(unet, prefix)]
    if unet.n_embed is None:
        return [
            *table,
            *norm(f"{prefix}out.0", ("out_norm",)),
            *conv(f"{prefix}out.2", ("out_conv",)),
        ]
    # With a codebook to predict, the original still stores the head that it does not call.
    c = unet.model_channels
    table += [unused(f"{prefix}out.0.{name}", c) for name in ("weight", "bias")]
    table += [
        unused(f"{prefix}out.2.weight", unet.out_channels, c, 3, 3),
        unused(f"{prefix}out.2.bias", unet.out_channels),
    ]
    return [
        *table,
        *norm(f"{prefix}id_predictor.0", ("id_norm",)),
        *dense(f"{prefix}id_predictor.1", ("id_predictor",), op=CONV1X1),
    ]


def controlnet_table(net: ControlNet, prefix: str = "control_model.") -> Table:
    """ControlNet, which has the UNet's names for the part that they share."""
    plan = encoder(net)
    table = [*_trunk(net, plan, prefix), *_vector(net, prefix)]
    for i in range(len(HINT) + 1):
        table += conv(f"{prefix}input_hint_block.{2 * i}", (f"hint_{i}",))
    for i in range(len(plan.input)):
        table += conv(f"{prefix}zero_convs.{i}.0", (f"zero_convs_{i}",))
    return [*table, *conv(f"{prefix}middle_block_out.0", ("middle_block_out",))]


def encoder_unet_table(net: EncoderUNet, prefix: str = "") -> Table:
    """EncoderUNetModel."""
    table = _trunk(net, encoder_layout(net), prefix)
    if net.pool.startswith("spatial"):
        table += dense(f"{prefix}out.0", ("out_0",))
        if net.pool == "spatial":
            return [*table, *dense(f"{prefix}out.2", ("out_1",))]
        return [
            *table,
            *norm(f"{prefix}out.1", ("out_norm",)),
            *dense(f"{prefix}out.3", ("out_1",)),
        ]
    table += norm(f"{prefix}out.0", ("out_norm",))
    if net.pool == "adaptive":
        return [*table, *dense(f"{prefix}out.3", ("out_1",), op=CONV1X1)]
    for name in ("qkv_proj", "c_proj"):
        table += dense(f"{prefix}out.2.{name}", ("attn_pool", name), op=CONV1D)
    return [*table, Entry(f"{prefix}out.2.positional_embedding", ("attn_pool", "positions"), DENSE)]


def discriminator_table(model: PatchDiscriminator, prefix: str = "loss.discriminator.") -> Table:
    """NLayerDiscriminator. Paths start at the collections: its normalisation keeps statistics."""
    table: Table = []
    for i, place in enumerate(model.places()):
        table += conv(f"{prefix}main.{place.conv}", ("params", f"conv_{i}"), bias=place.bias)
        if place.norm is None:
            continue
        source, ours = f"{prefix}main.{place.norm}", f"norm_{i}"
        if model.use_actnorm:
            table += [
                Entry(f"{source}.{name}", ("params", ours, name), CHANNELS)
                for name in ("loc", "scale")
            ]
            table.append(Entry(f"{source}.initialized", ("batch_stats", ours, "initialized")))
        else:
            table += norm(source, ("params", ours))
            table += [
                Entry(f"{source}.running_{name}", ("batch_stats", ours, name))
                for name in ("mean", "var")
            ]
            table.append(
                Entry(f"{source}.num_batches_tracked", ("batch_stats", ours, "count"), COUNT)
            )
    return table


def lpips_table(model: LPIPS, prefix: str = "loss.perceptual_loss.") -> Table:
    """LPIPS, VGG-16 features and heads."""
    table: Table = [
        constant(
            f"{prefix}scaling_layer.{name}", np.asarray(values, np.float32)[None, :, None, None]
        )
        for name, values in (("shift", SHIFT), ("scale", SCALE))
    ]
    for block, layers in enumerate(VGG16_LAYERS, start=1):
        for i, layer in enumerate(layers, start=1):
            table += conv(f"{prefix}net.slice{block}.{layer}", ("vgg", f"conv{block}_{i}"))
    for i in range(len(model.widths)):
        table += dense(f"{prefix}lin{i}.model.1", (f"lin{i}",), bias=False, op=CONV1X1)
    return table


def gpt_table(model: GPT, prefix: str = "transformer.") -> Table:
    """MinGPT as taming-transformers has it."""

    def mask() -> np.ndarray:
        return np.asarray(causal_mask(model.block_size, model.n_unmasked), np.float32)[None, None]

    table: Table = [
        *embedding(f"{prefix}tok_emb", ("tok_emb",)),
        Entry(f"{prefix}pos_emb", ("pos_emb",), LEADING),
        *norm(f"{prefix}ln_f", ("ln_f",)),
        *dense(f"{prefix}head", ("head",), bias=False),
    ]
    for i in range(model.n_layer):
        source, ours = f"{prefix}blocks.{i}", f"blocks_{i}"
        for name in ("ln1", "ln2"):
            table += norm(f"{source}.{name}", (ours, name))
        for name in ("query", "key", "value", "proj"):
            table += dense(f"{source}.attn.{name}", (ours, name))
        table += [
            *dense(f"{source}.mlp.0", (ours, "mlp_in")),
            *dense(f"{source}.mlp.2", (ours, "mlp_out")),
        ]
        table.append(Unused(f"{source}.attn.mask", mask, fixed=True))
    return table


class Family(NamedTuple):
    """The table of a module class, and a function to arguments that initialise it."""

    table: Callable[..., Table]
    example: Callable[[Any], tuple]


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _unet_example(unet: UNet) -> tuple:
    side = 2 ** (len(unet.channel_mult) - 1)
    context = None if unet.context_dim is None else _floats(1, 1, unet.context_dim)
    return (
        _floats(1, side, side, unet.in_channels),
        _ints(1),
        context,
        {
            None: None,
            "sequential": _floats(1, unet.adm_in_channels or 1),
            "continuous": _floats(1, 1),
            "timestep": _floats(1),
        }.get(unet.num_classes, _ints(1)),  # type: ignore[arg-type]
    )


def _controlnet_example(net: ControlNet) -> tuple:
    x, t, context, y = _unet_example(net)
    side = 8 * x.shape[1]
    return x, _floats(1, side, side, net.hint_channels), t, context, y


def _pixels(coder: Encoder | Autoencoder | MergedRescaleEncoder) -> tuple:
    side = 2 * 2 ** (len(coder.ch_mult) - 1)
    return (_floats(1, side, side, coder.in_channels),)


def _latents(quantizer: Quantizer) -> tuple:
    return (_floats(1, 2, 2, quantizer.embed_dim),)


FAMILIES: dict[type, Family] = {
    UNet: Family(unet_table, _unet_example),
    ControlNet: Family(controlnet_table, _controlnet_example),
    EncoderUNet: Family(
        encoder_unet_table,
        lambda m: (_floats(1, m.image_size, m.image_size, m.in_channels), _ints(1)),
    ),
    Encoder: Family(encoder_table, _pixels),
    Decoder: Family(decoder_table, lambda m: (_floats(1, 2, 2, m.z_channels),)),
    AutoencoderKL: Family(kl_table, _pixels),
    VQModel: Family(vqmodel_table, _pixels),
    VQModelInterface: Family(vqmodel_table, _pixels),
    VectorQuantizer: Family(vq_table, _latents),
    GumbelQuantizer: Family(
        gumbel_table, lambda m: (_floats(1, 2, 2, m.num_hiddens or m.embed_dim),)
    ),
    EMAQuantizer: Family(ema_table, _latents),
    LatentRescaler: Family(latent_rescaler_table, lambda m: (_floats(1, 16, 16, m.in_channels),)),
    MergedRescaleEncoder: Family(rescale_encoder_table, _pixels),
    MergedRescaleDecoder: Family(
        rescale_decoder_table, lambda m: (_floats(1, 16, 16, m.z_channels),)
    ),
    FirstStagePostProcessor: Family(
        post_processor_table,
        lambda m: (_floats(1, *(m.pretrained.downsampling * 2 ** len(m.ch_mult),) * 2, 3),),
    ),
    TransformerWrapper: Family(transformer_wrapper_table, lambda m: (_ints(1, 1),)),
    TransformerEncoder: Family(bert_table, lambda m: (_ints(1, 1),)),
    CLIPText: Family(clip_text_table, lambda m: (_ints(1, 1),)),
    CLIPVision: Family(clip_vision_table, lambda m: (_floats(1, m.image_size, m.image_size, 3),)),
    ClassEmbedder: Family(class_embedder_table, lambda m: (_ints(1),)),
    SpatialRescaler: Family(rescaler_table, lambda m: (_floats(1, 64, 64, m.in_channels),)),
    LPIPS: Family(lpips_table, lambda m: (_floats(1, 16, 16, 3), _floats(1, 16, 16, 3))),
    PatchDiscriminator: Family(discriminator_table, lambda m: (_floats(1, 64, 64, m.input_nc),)),
    GPT: Family(gpt_table, lambda m: (_ints(1, 1),)),
}


def table_of(module: Any, prefix: str | None = None) -> Table:
    """Returns the module's table; ``prefix`` None is the one of its family's checkpoints."""
    table = FAMILIES[type(module)].table
    return table(module) if prefix is None else table(module, prefix)


def param_shapes(module: Any, *example: Any) -> dict[str, Any]:
    """Returns the module's parameter tree as ShapeDtypeStructs; all collections if it has more.

    Args:
      module: The network.
      example: Arguments to initialise it with, for modules that are not in FAMILIES.
    """
    args = example or FAMILIES[type(module)].example(module)
    variables = jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a), *args)
    return dict(variables.get("params", {}) if set(variables) <= {"params"} else variables)
