"""Name tables of the networks as diffusers and transformers store them.

`modern` maps the names and shapes of older versions to today's first.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ldm_jax.convert.compvis.blocks import Walk, spatial_transformer
from ldm_jax.convert.compvis.encoders import clip_text_table
from ldm_jax.convert.compvis.networks import param_shapes
from ldm_jax.convert.reader.lazy import LazyTensor
from ldm_jax.convert.tables import CONV1X1, Entry, Path, Table, conv, dense, embedding, norm, unused
from ldm_jax.models.autoencoder import Autoencoder, AutoencoderKL, Coder, Decoder, Encoder
from ldm_jax.models.bert import TransformerEncoder
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.controlnet import HINT, ControlNet, encoder
from ldm_jax.models.unet import Block, Layout, UNet, layout
from ldm_jax.models.vqgan import VQModelInterface

QKV = ("q", "k", "v")


# ---------------------------------------------------------------------------------------- the UNets


def _sources(unet: UNet) -> dict[str, str]:
    """Returns {our name of a block: its name in UNet2DModel and UNet2DConditionModel}."""
    kinds = {
        "transformer": "attentions",
        "attn": "attentions",
        "down": "downsamplers",
        "up": "upsamplers",
    }
    plan, per_level = layout(unet), unet.num_res_blocks + 1
    names = {}

    def row(blocks: list[Block], ours: str, source: str, place: int) -> None:
        for j, block in enumerate(blocks):
            index = 0 if block.kind in ("up", "down") else place
            names[f"{ours}_{j}"] = f"{source}.{kinds.get(block.kind, 'resnets')}.{index}"

    names["input_blocks_0_0"] = "conv_in"
    for i, blocks in enumerate(plan.input[1:]):
        row(blocks, f"input_blocks_{i + 1}", f"down_blocks.{i // per_level}", i % per_level)
    for i, blocks in enumerate(plan.output):
        row(blocks, f"output_blocks_{i}", f"up_blocks.{i // per_level}", i % per_level)
    return names | {
        f"middle_block_{j}": f"mid_block.{kind}"
        for j, kind in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    }


def _trunk(unet: UNet, plan: Layout) -> Table:
    """The time embedding and the blocks of a plan, which UNet and ControlNet share."""
    sources = _sources(unet)

    def blocks() -> Walk:
        for name, block in plan.blocks():
            source = sources[name]
            match block.kind:
                case "conv":
                    yield from conv(source, (name,))
                case "res":
                    yield from norm(f"{source}.norm1", (name, "in_norm"))
                    yield from conv(f"{source}.conv1", (name, "in_conv"))
                    yield from dense(f"{source}.time_emb_proj", (name, "emb"))
                    yield from norm(f"{source}.norm2", (name, "out_norm"))
                    yield from conv(f"{source}.conv2", (name, "out_conv"))
                    if block.channels_in != block.channels_out:
                        yield from dense(f"{source}.conv_shortcut", (name, "skip"), op=CONV1X1)
                case "transformer":
                    linear = unet.use_linear_in_transformer
                    yield from spatial_transformer(
                        f"{source}.", (name,), depth=block.depth, linear=linear
                    )
                case "attn":
                    yield from norm(f"{source}.group_norm", (name, "norm"))
                    for x in QKV:
                        yield from dense(f"{source}.to_{x}", (name, "qkv", x))
                    yield from dense(f"{source}.to_out.0", (name, "proj_out"))
                case _:
                    yield from conv(f"{source}.conv", (name, "conv"))

    return [
        *dense("time_embedding.linear_1", ("time_embed", "dense_0")),
        *dense("time_embedding.linear_2", ("time_embed", "dense_1")),
        *blocks(),
    ]


def unet_table(unet: UNet) -> Table:
    """UNet2DConditionModel and UNet2DModel; the parameters are those of `split_qkv`."""
    table = [
        *_trunk(unet, layout(unet)),
        *norm("conv_norm_out", ("out_norm",)),
        *conv("conv_out", ("out_conv",)),
    ]
    match unet.num_classes:
        case None:
            return table
        case int():
            return [*table, *embedding("class_embedding", ("label_emb",))]
    return [
        *table,
        *dense("add_embedding.linear_1", ("label_emb", "dense_0")),
        *dense("add_embedding.linear_2", ("label_emb", "dense_1")),
    ]


def controlnet_table(net: ControlNet) -> Table:
    """ControlNetModel."""
    plan, hint = encoder(net), "controlnet_cond_embedding"
    table = _trunk(net, plan)
    if net.num_classes == "sequential":
        for i in (0, 1):
            table += dense(f"add_embedding.linear_{i + 1}", ("label_emb", f"dense_{i}"))
    elif net.num_classes is not None:
        table += embedding("class_embedding", ("label_emb",))
    inner = [f"blocks.{i}" for i in range(len(HINT) - 1)]
    for i, name in enumerate(["conv_in", *inner, "conv_out"]):
        table += conv(f"{hint}.{name}", (f"hint_{i}",))
    for i in range(len(plan.input)):
        table += conv(f"controlnet_down_blocks.{i}", (f"zero_convs_{i}",))
    return [*table, *conv("controlnet_mid_block", ("middle_block_out",))]


def split_qkv(unet: UNet, params: Mapping[str, Any]) -> dict[str, Any]:
    """Splits "qkv" {kernel [c, 3c], bias [3c]} of each plain attention into "q", "k" and "v"."""

    def part(a: Any, heads: int, i: int) -> Any:
        *rows, columns = a.shape
        if unet.use_new_attention_order:
            return a.reshape(*rows, 3, columns // 3)[..., i, :]
        return a.reshape(*rows, heads, 3, columns // (3 * heads))[..., i, :].reshape(
            *rows, columns // 3
        )

    split = dict(params)
    for name, block in layout(unet).blocks():
        if block.kind == "attn":
            fused = params[name]["qkv"]
            parts = {
                x: {k: part(a, block.heads, i) for k, a in fused.items()} for i, x in enumerate(QKV)
            }
            split[name] = {**params[name], "qkv": parts}
    return split


def join_qkv(unet: UNet, params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_qkv`, on numpy arrays."""

    def whole(parts: list[np.ndarray], heads: int) -> np.ndarray:
        *rows, columns = parts[0].shape
        if unet.use_new_attention_order:
            return np.concatenate(parts, axis=-1)
        by_head = [a.reshape(*rows, heads, columns // heads) for a in parts]
        return np.stack(by_head, axis=-2).reshape(*rows, 3 * columns)

    joined = dict(params)
    for name, block in layout(unet).blocks():
        if block.kind == "attn":
            parts = params[name]["qkv"]
            fused = {k: whole([parts[x][k] for x in QKV], block.heads) for k in parts["q"]}
            joined[name] = {**params[name], "qkv": fused}
    return joined


# ------------------------------------------------------------------------------------- autoencoders


def _resnet(source: str, path: Path, skip: bool) -> Walk:
    for i in (1, 2):
        yield from norm(f"{source}.norm{i}", (*path, f"norm{i}"))
        yield from conv(f"{source}.conv{i}", (*path, f"conv{i}"))
    if skip:
        yield from dense(f"{source}.conv_shortcut", (*path, "skip"), op=CONV1X1)


def _attention(source: str, path: Path) -> Walk:
    yield from norm(f"{source}.group_norm", (*path, "norm"))
    for x in QKV:
        yield from dense(f"{source}.to_{x}", (*path, x))
    yield from dense(f"{source}.to_out.0", (*path, "proj_out"))


def _coder(coder: Coder, part: str) -> Walk:
    """Encoder or Decoder; only ``attn_type`` "vanilla" and "none" exist there."""
    encodes, last = isinstance(coder, Encoder), len(coder.ch_mult) - 1
    mults = (1, *coder.ch_mult) if encodes else (*coder.ch_mult, coder.ch_mult[-1])
    attends = coder.attn_type == "vanilla"
    yield from conv(f"{part}.conv_in", (part, "conv_in"))
    for level in range(last + 1):
        source = f"{part}.down_blocks.{level}" if encodes else f"{part}.up_blocks.{last - level}"
        ours = f"down_{level}" if encodes else f"up_{level}"
        for i in range(coder.num_res_blocks + (not encodes)):
            skip = i == 0 and mults[level if encodes else level + 1] != coder.ch_mult[level]
            yield from _resnet(f"{source}.resnets.{i}", (part, f"{ours}_block_{i}"), skip)
            if attends and coder.attends(level):
                yield from _attention(f"{source}.attentions.{i}", (part, f"{ours}_attn_{i}"))
        if encodes and level != last:
            yield from conv(f"{source}.downsamplers.0.conv", (part, f"{ours}_downsample", "conv"))
        elif not encodes and level:
            yield from conv(f"{source}.upsamplers.0.conv", (part, f"{ours}_upsample", "conv"))
    for i in (0, 1):
        yield from _resnet(
            f"{part}.mid_block.resnets.{i}", (part, f"mid_block_{i + 1}"), skip=False
        )
    if attends:
        yield from _attention(f"{part}.mid_block.attentions.0", (part, "mid_attn_1"))
    yield from norm(f"{part}.conv_norm_out", (part, "norm_out"))
    yield from conv(f"{part}.conv_out", (part, "conv_out"))


def autoencoder_table(model: Autoencoder) -> Table:
    """AutoencoderKL, and VQModel with its codebook."""
    table: Table = [
        *_coder(Encoder(**model.coder_fields()), "encoder"),
        *_coder(Decoder(**model.coder_fields()), "decoder"),
    ]
    for name in ("quant_conv", "post_quant_conv"):
        table += dense(name, (name,), op=CONV1X1)
    if isinstance(model, VQModelInterface):
        table.append(Entry("quantize.embedding.weight", ("quantize", "embedding")))
    return table


# ------------------------------------------------------------------------------------ text encoders


def bert_table(model: TransformerEncoder) -> Table:
    """LDMBertModel, with the original's unused projection to the vocabulary."""
    table: Table = [
        *embedding("model.embed_tokens", ("token_emb",)),
        Entry("model.embed_positions.weight", ("pos_emb",)),
        *norm("model.layer_norm", ("norm",)),
        unused("to_logits.weight", model.vocab_size, model.dim),
        unused("to_logits.bias", model.vocab_size),
    ]
    for i in range(model.depth):
        source = f"model.layers.{i}"
        table += norm(f"{source}.self_attn_layer_norm", (f"attn_norm_{i}",))
        for x in QKV:
            table += dense(f"{source}.self_attn.{x}_proj", (f"attn_{i}", f"to_{x}"), bias=False)
        table += dense(f"{source}.self_attn.out_proj", (f"attn_{i}", "to_out"))
        table += norm(f"{source}.final_layer_norm", (f"ff_norm_{i}",))
        table += dense(f"{source}.fc1", (f"ff_{i}", "proj_in"))
        table += dense(f"{source}.fc2", (f"ff_{i}", "proj_out"))
    return table


def clip_table(model: CLIPText) -> Table:
    """CLIPTextModel under the names that every version of transformers reads."""
    return clip_text_table(model, "text_model.")


TABLES: dict[type, Callable[[Any], Table]] = {
    UNet: unet_table,
    ControlNet: controlnet_table,
    AutoencoderKL: autoencoder_table,
    VQModelInterface: autoencoder_table,
    TransformerEncoder: bert_table,
    CLIPText: clip_table,
}


def shapes_of(module: Any) -> dict[str, Any]:
    """Returns the parameter tree of the module's table as ShapeDtypeStructs."""
    shapes = param_shapes(module)
    return (
        jax.eval_shape(lambda tree: split_qkv(module, tree), shapes)
        if isinstance(module, UNet)
        else shapes
    )


# ------------------------------------------------------------------------------------ older writers

# The attention of the autoencoders and of UNet2DModel.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern(
    tensors: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, LazyTensor]]:
    """Returns (name, tensor) pairs under today's names and in the shapes of ``expected``.

    A linear layer and a 1x1 convolution are interchangeable. Pairs, so that a tensor under both
    its old and its new name is a duplicate.
    """

    def renamed(name: str) -> str:
        name = re.sub(
            r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
            lambda m: f"{m[1]}.{_OLDER[m[2]]}.",
            name,
        )
        bare = f"text_model.{name}"  # transformers 5 leaves the tower's name out
        return bare if bare in expected else name

    def shaped(name: str, tensor: LazyTensor) -> LazyTensor:
        shape = expected.get(name, tensor.shape)
        if (
            sorted((len(shape), len(tensor.shape))) != [2, 4]
            or (*shape, 1, 1)[:4] != (*tensor.shape, 1, 1)[:4]
        ):
            return tensor
        return LazyTensor(shape, tensor.dtype, lambda: tensor.numpy().reshape(shape))

    return [(renamed(name), shaped(renamed(name), tensor)) for name, tensor in tensors.items()]
