"""Name tables of the original CompVis networks: latent-diffusion, stable-diffusion v1 and taming-transformers.

The small walkers yield one block each: ``prefix`` is "" or ends in a dot, ``path`` is where the block's parameters
live. The ``*_table`` functions put a whole network together from its module's fields; they are listed in FAMILIES.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert.tables import (
    CHANNELS,
    CONV1D,
    CONV1X1,
    COUNT,
    LEADING,
    Entry,
    Path,
    Table,
    Unused,
    conv,
    dense,
    embedding,
    norm,
    unused,
)
from ldm_jax.models.autoencoder import AutoencoderKL, Coder, Decoder, Encoder
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.gpt import GPT, causal_mask
from ldm_jax.models.text import TransformerEncoder
from ldm_jax.models.unet import UNet, layout

Walk = Iterator[Entry | Unused]

# --------------------------------------------------------------------------------------------------------------- blocks


def feed_forward(prefix: str, path: Path, *, glu: bool = True) -> Walk:
    """FeedForward of ldm.modules.attention and of x_transformer."""
    yield from dense(f"{prefix}net.0.proj" if glu else f"{prefix}net.0.0", (*path, "proj_in"))
    yield from dense(f"{prefix}net.2", (*path, "proj_out"))


def cross_attention(prefix: str, path: Path, *, out: str = "to_out.0") -> Walk:
    """CrossAttention; ``out`` is the name of its last layer."""
    for name in ("to_q", "to_k", "to_v"):
        yield from dense(f"{prefix}{name}", (*path, name), bias=False)
    yield from dense(f"{prefix}{out}", (*path, "to_out"))


def transformer_block(prefix: str, path: Path, *, glu: bool = True) -> Walk:
    """BasicTransformerBlock."""
    for name in ("norm1", "norm2", "norm3"):
        yield from norm(f"{prefix}{name}", (*path, name))
    for name in ("attn1", "attn2"):
        yield from cross_attention(f"{prefix}{name}.", (*path, name))
    yield from feed_forward(f"{prefix}ff.", (*path, "ff"), glu=glu)


def spatial_transformer(prefix: str, path: Path, *, depth: int = 1) -> Walk:
    """SpatialTransformer, whose projections are 1x1 convolutions."""
    yield from norm(f"{prefix}norm", (*path, "norm"))
    for name in ("proj_in", "proj_out"):
        yield from dense(f"{prefix}{name}", (*path, name), op=CONV1X1)
    for i in range(depth):
        yield from transformer_block(f"{prefix}transformer_blocks.{i}.", (*path, f"blocks_{i}"))


def attention_block(prefix: str, path: Path) -> Walk:
    """The UNet's AttentionBlock; its fused projection keeps its order, which the module knows."""
    yield from norm(f"{prefix}norm", (*path, "norm"))
    for name in ("qkv", "proj_out"):
        yield from dense(f"{prefix}{name}", (*path, name), op=CONV1D)


def attn_block(prefix: str, path: Path) -> Walk:
    """The autoencoders' AttnBlock (and SpatialSelfAttention, the same network)."""
    yield from norm(f"{prefix}norm", (*path, "norm"))
    for name in ("q", "k", "v", "proj_out"):
        yield from dense(f"{prefix}{name}", (*path, name), op=CONV1X1)


def linear_attention(prefix: str, path: Path) -> Walk:
    """LinearAttention."""
    yield from dense(f"{prefix}to_qkv", (*path, "to_qkv"), bias=False, op=CONV1X1)
    yield from dense(f"{prefix}to_out", (*path, "to_out"), op=CONV1X1)


def res_block(prefix: str, path: Path, *, skip: bool, conv_skip: bool = False) -> Walk:
    """The UNet's ResBlock; ``skip`` where it changes the channel count."""
    yield from norm(f"{prefix}in_layers.0", (*path, "in_norm"))
    yield from conv(f"{prefix}in_layers.2", (*path, "in_conv"))
    yield from dense(f"{prefix}emb_layers.1", (*path, "emb"))
    yield from norm(f"{prefix}out_layers.0", (*path, "out_norm"))
    yield from conv(f"{prefix}out_layers.3", (*path, "out_conv"))
    if skip and conv_skip:
        yield from conv(f"{prefix}skip_connection", (*path, "skip"))
    elif skip:
        yield from dense(f"{prefix}skip_connection", (*path, "skip"), op=CONV1X1)


def resnet_block(prefix: str, path: Path, *, skip: bool, conv_skip: bool = False) -> Walk:
    """The autoencoders' ResnetBlock; ``skip`` where it changes the channel count."""
    for i in (1, 2):
        yield from norm(f"{prefix}norm{i}", (*path, f"norm{i}"))
        yield from conv(f"{prefix}conv{i}", (*path, f"conv{i}"))
    if skip and conv_skip:
        yield from conv(f"{prefix}conv_shortcut", (*path, "skip"))
    elif skip:
        yield from dense(f"{prefix}nin_shortcut", (*path, "skip"), op=CONV1X1)


# ------------------------------------------------------------------------------------------------------------- networks


def unet_table(unet: UNet, prefix: str = "model.diffusion_model.") -> Table:
    """UNetModel."""

    def blocks() -> Walk:
        for name, block in layout(unet).blocks():
            source = prefix + re.sub(r"_(?=\d)", ".", name)  # input_blocks_3_0 -> input_blocks.3.0
            match block.kind:
                case "conv":
                    yield from conv(source, (name,))
                case "res" | "res_up" | "res_down":
                    yield from res_block(f"{source}.", (name,), skip=block.channels_in != block.channels_out)
                case "attn" if unet.use_spatial_transformer:
                    yield from spatial_transformer(f"{source}.", (name,), depth=unet.transformer_depth)
                case "attn":
                    yield from attention_block(f"{source}.", (name,))
                case "down" if unet.conv_resample:
                    yield from conv(f"{source}.op", (name, "conv"))
                case "up" if unet.conv_resample:
                    yield from conv(f"{source}.conv", (name, "conv"))

    table: Table = [
        *dense(f"{prefix}time_embed.0", ("time_embed", "dense_0")),
        *dense(f"{prefix}time_embed.2", ("time_embed", "dense_1")),
        *blocks(),
    ]
    if unet.num_classes is not None:
        table += embedding(f"{prefix}label_emb", ("label_emb",))
    if unet.n_embed is None:
        return [*table, *norm(f"{prefix}out.0", ("out_norm",)), *conv(f"{prefix}out.2", ("out_conv",))]
    # With a codebook to predict, the original still makes and stores the head that it does not call.
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


def _attention_of(kind: str, prefix: str, path: Path) -> Walk:
    if kind == "vanilla":
        yield from attn_block(prefix, path)
    elif kind == "linear":
        yield from linear_attention(prefix, path)


def _level(coder: Coder, side: str, level: int, blocks: int, channels_in: int, path: Path, prefix: str) -> Walk:
    """The residual blocks and attentions of one level of an encoder (``side`` "down") or decoder ("up")."""
    channels = coder.ch_mult[level] * coder.ch
    for i in range(blocks):
        source, ours = f"{prefix}{side}.{level}", f"{side}_{level}"
        skip = (channels_in if i == 0 else channels) != channels
        yield from resnet_block(f"{source}.block.{i}.", (*path, f"{ours}_block_{i}"), skip=skip)
        if coder.attends(level):
            yield from _attention_of(coder.attn_type, f"{source}.attn.{i}.", (*path, f"{ours}_attn_{i}"))


def _middle(coder: Coder, path: Path, prefix: str) -> Walk:
    for name in ("block_1", "block_2"):
        yield from resnet_block(f"{prefix}mid.{name}.", (*path, f"mid_{name}"), skip=False)
    yield from _attention_of(coder.attn_type, f"{prefix}mid.attn_1.", (*path, "mid_attn_1"))


def encoder_table(encoder: Encoder, prefix: str = "encoder.", path: Path = ()) -> Table:
    """The autoencoders' Encoder."""
    last, mults = len(encoder.ch_mult) - 1, (1, *encoder.ch_mult)
    table: Table = [*conv(f"{prefix}conv_in", (*path, "conv_in")), *_middle(encoder, path, prefix)]
    for level in range(last + 1):
        table += _level(encoder, "down", level, encoder.num_res_blocks, encoder.ch * mults[level], path, prefix)
        if level != last and encoder.resamp_with_conv:
            table += conv(f"{prefix}down.{level}.downsample.conv", (*path, f"down_{level}_downsample", "conv"))
    return [*table, *norm(f"{prefix}norm_out", (*path, "norm_out")), *conv(f"{prefix}conv_out", (*path, "conv_out"))]


def decoder_table(decoder: Decoder, prefix: str = "decoder.", path: Path = ()) -> Table:
    """The autoencoders' Decoder."""
    last, mults = len(decoder.ch_mult) - 1, (*decoder.ch_mult, decoder.ch_mult[-1])
    table: Table = [*conv(f"{prefix}conv_in", (*path, "conv_in")), *_middle(decoder, path, prefix)]
    for level in range(last + 1):
        table += _level(decoder, "up", level, decoder.num_res_blocks + 1, decoder.ch * mults[level + 1], path, prefix)
        if level and decoder.resamp_with_conv:
            table += conv(f"{prefix}up.{level}.upsample.conv", (*path, f"up_{level}_upsample", "conv"))
    if decoder.give_pre_end:  # the original stores the end that it then does not run
        c = decoder.ch * decoder.ch_mult[0]
        table += [unused(f"{prefix}norm_out.{name}", c) for name in ("weight", "bias")]
        return [
            *table,
            unused(f"{prefix}conv_out.weight", decoder.out_ch, c, 3, 3),
            unused(f"{prefix}conv_out.bias", decoder.out_ch),
        ]
    return [*table, *norm(f"{prefix}norm_out", (*path, "norm_out")), *conv(f"{prefix}conv_out", (*path, "conv_out"))]


def kl_table(model: AutoencoderKL, prefix: str = "first_stage_model.") -> Table:
    """AutoencoderKL; a checkpoint of the autoencoder alone has no prefix."""
    fields = model.coder_fields()
    return [
        *encoder_table(Encoder(**fields), f"{prefix}encoder.", ("encoder",)),
        *decoder_table(Decoder(**fields, tanh_out=model.tanh_out), f"{prefix}decoder.", ("decoder",)),
        *dense(f"{prefix}quant_conv", ("quant_conv",), op=CONV1X1),
        *dense(f"{prefix}post_quant_conv", ("post_quant_conv",), op=CONV1X1),
    ]


def bert_table(model: TransformerEncoder, prefix: str = "cond_stage_model.transformer.") -> Table:
    """The x_transformer TransformerWrapper inside BERTEmbedder and TransformerEmbedder."""
    table: Table = [
        *embedding(f"{prefix}token_emb", ("token_emb",)),
        Entry(f"{prefix}pos_emb.emb.weight", ("pos_emb",)),
        *norm(f"{prefix}norm", ("norm",)),
    ]
    for i in range(model.depth):  # attention and feed-forward are layers of their own there
        attn, ff = f"{prefix}attn_layers.layers.{2 * i}", f"{prefix}attn_layers.layers.{2 * i + 1}"
        table += [*norm(f"{attn}.0", (f"attn_norm_{i}",)), *cross_attention(f"{attn}.1.", (f"attn_{i}",), out="to_out")]
        table += [*norm(f"{ff}.0", (f"ff_norm_{i}",)), *feed_forward(f"{ff}.1.", (f"ff_{i}",), glu=model.ff_glu)]
    if model.with_logits:
        return [*table, *dense(f"{prefix}to_logits", ("to_logits",))]
    return [
        *table,
        unused(f"{prefix}to_logits.weight", model.vocab_size, model.dim),
        unused(f"{prefix}to_logits.bias", model.vocab_size),
    ]


def discriminator_table(model: PatchDiscriminator, prefix: str = "loss.discriminator.") -> Table:
    """NLayerDiscriminator. Paths start at the variables' collections, since its normalisation keeps statistics."""
    table: Table = []
    for i, place in enumerate(model.places()):
        table += conv(f"{prefix}main.{place.conv}", ("params", f"conv_{i}"), bias=place.bias)
        if place.norm is None:
            continue
        source, ours = f"{prefix}main.{place.norm}", f"norm_{i}"
        if model.use_actnorm:
            table += [Entry(f"{source}.{name}", ("params", ours, name), CHANNELS) for name in ("loc", "scale")]
            table.append(Entry(f"{source}.initialized", ("batch_stats", ours, "initialized")))
        else:
            table += norm(source, ("params", ours))
            table += [Entry(f"{source}.running_{name}", ("batch_stats", ours, name)) for name in ("mean", "var")]
            table.append(Entry(f"{source}.num_batches_tracked", ("batch_stats", ours, "count"), COUNT))
    return table


def gpt_table(model: GPT, prefix: str = "transformer.") -> Table:
    """minGPT as taming-transformers has it."""

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
        table += [*dense(f"{source}.mlp.0", (ours, "mlp_in")), *dense(f"{source}.mlp.2", (ours, "mlp_out"))]
        table.append(Unused(f"{source}.attn.mask", mask))
    return table


class Family(NamedTuple):
    """What conversion knows of one of our modules: its table, and arguments that it can be initialised with."""

    table: Callable[..., Table]
    example: Callable[[Any], tuple]


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _unet_example(unet: UNet) -> tuple:
    side = 2 ** (len(unet.channel_mult) - 1)
    context = None if unet.context_dim is None else _floats(1, 1, unet.context_dim)
    return _floats(1, side, side, unet.in_channels), _ints(1), context, None if unet.num_classes is None else _ints(1)


def _pixels(coder: Encoder | AutoencoderKL) -> tuple:
    side = 2 * 2 ** (len(coder.ch_mult) - 1)
    return (_floats(1, side, side, coder.in_channels),)


FAMILIES: dict[type, Family] = {
    UNet: Family(unet_table, _unet_example),
    Encoder: Family(encoder_table, _pixels),
    Decoder: Family(decoder_table, lambda m: (_floats(1, 2, 2, m.z_channels),)),
    AutoencoderKL: Family(kl_table, _pixels),
    TransformerEncoder: Family(bert_table, lambda m: (_ints(1, 1),)),
    PatchDiscriminator: Family(discriminator_table, lambda m: (_floats(1, 64, 64, m.input_nc),)),
    GPT: Family(gpt_table, lambda m: (_ints(1, 1),)),
}


def table_of(module: Any, prefix: str | None = None) -> Table:
    """The module's table; ``prefix`` None is the one that its family's checkpoints have."""
    table = FAMILIES[type(module)].table
    return table(module) if prefix is None else table(module, prefix)


def param_shapes(module: Any, *example: Any) -> dict[str, Any]:
    """The module's parameter tree as ShapeDtypeStructs, without computing anything; all collections where it has more
    than parameters.

    ``example``: arguments to initialise it with, for modules that are not in FAMILIES.
    """
    args = example or FAMILIES[type(module)].example(module)
    variables = jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a), *args)
    return dict(variables["params"] if set(variables) == {"params"} else variables)
