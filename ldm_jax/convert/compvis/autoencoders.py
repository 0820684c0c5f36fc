"""Name tables of the original's autoencoders and quantizers."""

import numpy as np

from ldm_jax.convert.compvis.blocks import Walk, attn_block, linear_attention, resnet_block
from ldm_jax.convert.tables import (
    CONV1X1,
    Entry,
    Path,
    Table,
    constant,
    conv,
    dense,
    norm,
    under,
    unused,
)
from ldm_jax.models.autoencoder import Autoencoder, AutoencoderKL, Coder, Decoder, Encoder
from ldm_jax.models.quantize import EMAQuantizer, GumbelQuantizer, Quantizer, VectorQuantizer
from ldm_jax.models.vqgan import VQModel


def _attention_of(kind: str, prefix: str, path: Path) -> Walk:
    if kind == "vanilla":
        yield from attn_block(prefix, path)
    elif kind == "linear":
        yield from linear_attention(prefix, path)


def _level(
    coder: Coder, side: str, level: int, blocks: int, channels_in: int, path: Path, prefix: str
) -> Walk:
    """The blocks of one level of an encoder (``side`` "down") or decoder ("up")."""
    channels = coder.ch_mult[level] * coder.ch
    for i in range(blocks):
        source, ours = f"{prefix}{side}.{level}", f"{side}_{level}"
        skip = (channels_in if i == 0 else channels) != channels
        yield from resnet_block(f"{source}.block.{i}.", (*path, f"{ours}_block_{i}"), skip=skip)
        if coder.attends(level):
            yield from _attention_of(
                coder.attn_type, f"{source}.attn.{i}.", (*path, f"{ours}_attn_{i}")
            )


def _middle(coder: Coder, path: Path, prefix: str) -> Walk:
    for name in ("block_1", "block_2"):
        yield from resnet_block(f"{prefix}mid.{name}.", (*path, f"mid_{name}"), skip=False)
    yield from _attention_of(coder.attn_type, f"{prefix}mid.attn_1.", (*path, "mid_attn_1"))


def encoder_table(encoder: Encoder, prefix: str = "encoder.", path: Path = ()) -> Table:
    """The autoencoders' Encoder."""
    last, mults = len(encoder.ch_mult) - 1, (1, *encoder.ch_mult)
    table: Table = [*conv(f"{prefix}conv_in", (*path, "conv_in")), *_middle(encoder, path, prefix)]
    for level in range(last + 1):
        table += _level(
            encoder, "down", level, encoder.num_res_blocks, encoder.ch * mults[level], path, prefix
        )
        if level != last and encoder.resamp_with_conv:
            table += conv(
                f"{prefix}down.{level}.downsample.conv", (*path, f"down_{level}_downsample", "conv")
            )
    return [
        *table,
        *norm(f"{prefix}norm_out", (*path, "norm_out")),
        *conv(f"{prefix}conv_out", (*path, "conv_out")),
    ]


def decoder_table(decoder: Decoder, prefix: str = "decoder.", path: Path = ()) -> Table:
    """The autoencoders' Decoder."""
    last, mults = len(decoder.ch_mult) - 1, (*decoder.ch_mult, decoder.ch_mult[-1])
    table: Table = [*conv(f"{prefix}conv_in", (*path, "conv_in")), *_middle(decoder, path, prefix)]
    for level in range(last + 1):
        table += _level(
            decoder,
            "up",
            level,
            decoder.num_res_blocks + 1,
            decoder.ch * mults[level + 1],
            path,
            prefix,
        )
        if level and decoder.resamp_with_conv:
            table += conv(
                f"{prefix}up.{level}.upsample.conv", (*path, f"up_{level}_upsample", "conv")
            )
    if decoder.give_pre_end:  # the original stores the end, which it does not run
        c = decoder.ch * decoder.ch_mult[0]
        table += [unused(f"{prefix}norm_out.{name}", c) for name in ("weight", "bias")]
        return [
            *table,
            unused(f"{prefix}conv_out.weight", decoder.out_ch, c, 3, 3),
            unused(f"{prefix}conv_out.bias", decoder.out_ch),
        ]
    return [
        *table,
        *norm(f"{prefix}norm_out", (*path, "norm_out")),
        *conv(f"{prefix}conv_out", (*path, "conv_out")),
    ]


def _autoencoder(model: Autoencoder, prefix: str) -> Table:
    fields = model.coder_fields()
    return [
        *encoder_table(Encoder(**fields), f"{prefix}encoder.", ("encoder",)),
        *decoder_table(
            Decoder(**fields, tanh_out=model.tanh_out), f"{prefix}decoder.", ("decoder",)
        ),
        *dense(f"{prefix}quant_conv", ("quant_conv",), op=CONV1X1),
        *dense(f"{prefix}post_quant_conv", ("post_quant_conv",), op=CONV1X1),
    ]


def kl_table(model: AutoencoderKL, prefix: str = "first_stage_model.") -> Table:
    """AutoencoderKL; a checkpoint of the autoencoder alone has no prefix."""
    return _autoencoder(model, prefix)


def _used(quantizer: Quantizer, prefix: str) -> Walk:
    """The list of codes in use, which is part of the config here."""
    if quantizer.remap is not None:
        used = np.asarray(quantizer.remap, np.int64)
        yield constant(f"{prefix}used", used)


def vq_table(model: VectorQuantizer, prefix: str = "quantize.") -> Table:
    """VectorQuantizer and VectorQuantizer2."""
    return [Entry(f"{prefix}embedding.weight", ("embedding",)), *_used(model, prefix)]


def gumbel_table(model: GumbelQuantizer, prefix: str = "quantize.") -> Table:
    """GumbelQuantize."""
    return [
        *dense(f"{prefix}proj", ("proj",), op=CONV1X1),
        Entry(f"{prefix}embed.weight", ("embed",)),
        *_used(model, prefix),
    ]


def ema_table(model: EMAQuantizer, prefix: str = "quantize.") -> Table:
    """EMAVectorQuantizer. Paths start at the collection "codebook": it has no parameters."""
    names = {"weight": "embedding", "cluster_size": "cluster_size", "embed_avg": "embed_avg"}
    table: Table = [
        Entry(f"{prefix}embedding.{theirs}", ("codebook", ours)) for theirs, ours in names.items()
    ]
    return [*table, *_used(model, prefix)]


def vqmodel_table(model: VQModel, prefix: str = "first_stage_model.") -> Table:
    """VQModel and VQModelInterface; a checkpoint of the autoencoder alone has no prefix.

    Paths start at the collections with the EMA quantizer, else at the parameters.
    """
    table, quantizer = _autoencoder(model, prefix), model.make_quantizer()
    if model.n_labels is not None:
        table.append(Entry(f"{prefix}colorize", ("colorize",), CONV1X1))
    match quantizer:
        case VectorQuantizer():
            return [*table, *under(("quantize",), vq_table(quantizer, f"{prefix}quantize."))]
        case GumbelQuantizer():
            return [*table, *under(("quantize",), gumbel_table(quantizer, f"{prefix}quantize."))]
    ema = ema_table(quantizer, f"{prefix}quantize.")
    inside = [
        entry._replace(path=("codebook", "quantize", *entry.path[1:]))
        if isinstance(entry, Entry)
        else entry
        for entry in ema
    ]
    return [*under(("params",), table), *inside]
