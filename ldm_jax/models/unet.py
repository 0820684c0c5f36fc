"""The diffusion UNet (Dhariwal & Nichol 2021; with cross-attention, Rombach et al. 2022).

`layout(config)` lays out the network as rows of blocks; the module runs those rows and the conversion tables walk them, so that the two cannot
disagree about what is where. `Trunk` and `downward` are what the UNet shares with the classifier of `ldm_jax.models.encoder_unet`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.kernels.attention import SAVED
from ldm_jax.nn.attention import AttentionBlock, SpatialTransformer
from ldm_jax.nn.layers import (
    Array,
    Dtype,
    GroupNorm,
    as_many,
    conv,
    dense,
    keep_rows,
    look_up,
    timestep_embedding,
)
from ldm_jax.nn.resnet import Downsample, ResBlock, Upsample


class Block(NamedTuple):
    """One block of the UNet: what it is and the channels that enter and leave it."""

    kind: Literal["conv", "res", "res_up", "res_down", "attn", "transformer", "down", "up"]
    channels_in: int
    channels_out: int
    heads: int = 0
    head_dim: int = 0
    depth: int = 0


class Layout(NamedTuple):
    """Rows of blocks. Every input row's result is kept and joined, last first, to the input of an output row."""

    input: list[list[Block]]
    middle: list[Block]
    output: list[list[Block]]

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """(module name, block) for every block: input_blocks_i_j, middle_block_j, output_blocks_i_j."""
        for part, rows in (("input_blocks", self.input), ("output_blocks", self.output)):
            for i, row in enumerate(rows):
                yield from ((f"{part}_{i}_{j}", block) for j, block in enumerate(row))
        yield from ((f"middle_block_{j}", block) for j, block in enumerate(self.middle))


class Trunk(nn.Module):
    """The fields of a network made of rows of blocks, and how a row runs. Names and defaults are the original's.

    ``attention_resolutions`` are downsampling factors, not sizes. ``num_head_channels``, when positive, fixes the head size and lets the head count
    follow; otherwise ``num_heads`` holds. ``dropout`` needs a "dropout" rng when ``train``.
    """

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...] = ()
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    dropout: float = 0.0
    conv_resample: bool = True
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    norm_groups: int = 32
    remat: bool = False
    dtype: Dtype = jnp.float32

    def embed_time(self, t: Array) -> Array:
        """T [b] -> [b, 4 model_channels]; called inside ``__call__``."""
        module = TimeEmbedding(4 * self.model_channels, self.dtype, name="time_embed")
        return module(timestep_embedding(t, self.model_channels))

    def run(
        self, row: list[Block], name: str, h: Array, emb: Array, context: Array | None, train: bool
    ) -> Array:
        """Runs one row of blocks; called inside ``__call__``, whose submodules these become."""

        def make(cls: Any, *args: Any, remat_static: tuple[int, ...] = (), **fields: Any) -> Any:
            if self.remat:
                cls = nn.remat(
                    cls,
                    static_argnums=remat_static,
                    policy=jax.checkpoint_policies.save_only_these_names(SAVED),
                )
            return cls(*args, norm_groups=self.norm_groups, dtype=self.dtype, **fields)

        for j, block in enumerate(row):
            at = f"{name}_{j}"
            match block.kind:
                case "conv":
                    h = conv(block.channels_out, 3, h, name=at, dtype=self.dtype)(h)
                case "res" | "res_up" | "res_down":
                    resample = {"res": "none", "res_up": "up", "res_down": "down"}[block.kind]
                    fields = (block.channels_out, self.dropout, self.use_scale_shift_norm, resample)
                    h = make(ResBlock, *fields, remat_static=(3,), name=at)(
                        h, as_many(emb, h), train
                    )
                case "transformer":
                    fields = (block.heads, block.head_dim, block.depth)
                    h = make(SpatialTransformer, *fields, remat_static=(3,), name=at)(
                        h, context, train
                    )
                case "attn":
                    h = make(AttentionBlock, block.heads, self.use_new_attention_order, name=at)(h)
                case "down":
                    h = Downsample(self.conv_resample, "same", self.dtype, name=at)(h)
                case "up":
                    h = Upsample(self.conv_resample, self.dtype, name=at)(h)
            h = keep_rows(h)
        return h


class UNet(Trunk):
    """UNet: x [b, h, w, in_channels], t [b] -> [b, h, w, out_channels] (float32).

    Fields carry the original's names and defaults (see `Trunk`). Height and width must divide by 2^(levels - 1). With ``n_embed`` the head predicts
    codebook indices ([b, h, w, n_embed] logits) instead.
    """

    num_classes: int | None = None
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | None = None
    n_embed: int | None = None
    legacy: bool = True

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        context: Array | None = None,
        y: Array | None = None,
        train: bool = False,
        depth: int = 0,
        deep: Array | None = None,
    ) -> Array | tuple[Array, Array]:
        """``context`` [b, m, context_dim] feeds cross-attention; ``y`` [b] holds class indices where ``num_classes`` is set.

        Several contexts of each picture may be given one batch after the other, [n b, m, context_dim], for a result [n b, h, w, out_channels]: what
        lies before the first cross-attention is then computed once.

        With a ``depth`` the result is (output, the deep feature [b, h', w', c'] that enters the last ``depth`` output rows). Given such a feature as
        ``deep``, only the first and the last ``depth`` rows run, around it (Ma et al. 2023, arXiv:2312.00858).
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError("UNet: y must be given if and only if num_classes is set")
        if context is not None and not self.use_spatial_transformer:
            raise ValueError("UNet: context needs use_spatial_transformer=True")
        factor = 2 ** (len(self.channel_mult) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"UNet: height and width {x.shape[1:3]} must be multiples of {factor}")
        plan = layout(self)
        if not int(deep is not None) <= depth <= len(plan.input):
            raise ValueError(
                f"UNet: depth {depth} must be from {int(deep is not None)} to {len(plan.input)}, its input rows"
            )
        emb = self.embed_time(t)
        if self.num_classes is not None and y is not None:
            table = nn.Embed(
                self.num_classes, 4 * self.model_channels, dtype=self.dtype, name="label_emb"
            )
            emb = emb + keep_rows(look_up(table, y))

        h, skips, reused, last = (
            x.astype(self.dtype),
            [],
            deep is not None,
            len(plan.output) - depth,
        )
        for i, row in enumerate(plan.input[:depth] if reused else plan.input):
            h = self.run(row, f"input_blocks_{i}", h, emb, context, train)
            skips.append(h)
        if not reused:
            h = self.run(plan.middle, "middle_block", h, emb, context, train)
        for i, row in enumerate(plan.output):
            if i < last and reused:
                continue
            if i == last:
                h = deep = h if deep is None else deep
            h = jnp.concatenate([h, as_many(skips.pop(), h)], axis=-1)
            h = self.run(row, f"output_blocks_{i}", h, emb, context, train)

        if self.n_embed is not None:
            h = GroupNorm(1e-5, self.norm_groups, dtype=self.dtype, name="id_norm")(h)
            out = dense(self.n_embed, h, name="id_predictor", dtype=jnp.float32)(h)
        else:
            h = GroupNorm(1e-5, self.norm_groups, silu=True, dtype=self.dtype, name="out_norm")(h)
            out = conv(self.out_channels, 3, h, zero=True, name="out_conv", dtype=self.dtype)(
                h
            ).astype(jnp.float32)
        return out if deep is None else (out, deep)


class TimeEmbedding(nn.Module):
    """Two dense layers with SiLU between: [b, c] -> [b, features]."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.silu(dense(self.features, x, name="dense_0", dtype=self.dtype)(x))
        return dense(self.features, x, name="dense_1", dtype=self.dtype)(x)


def check_heads(net: Trunk) -> None:
    """ValueError where there is attention and nothing says how many heads it has."""
    if net.num_heads == -1 and net.num_head_channels == -1 and net.attention_resolutions:
        raise ValueError(f"{type(net).__name__}: set num_heads or num_head_channels")


def resampler(net: Trunk, kind: Literal["up", "down"], ch: int) -> Block:
    """The block that doubles or halves the size between two levels."""
    return Block(f"res_{kind}" if net.resblock_updown else kind, ch, ch)  # type: ignore[arg-type]


def downward(
    net: Trunk, attention: Callable[[int], Block]
) -> tuple[list[list[Block]], list[Block]]:
    """The input rows and the middle; ``attention`` makes the attention block of a channel count."""
    ch, ds = net.model_channels, 1
    rows = [[Block("conv", net.in_channels, ch)]]
    for level, mult in enumerate(net.channel_mult):
        for _ in range(net.num_res_blocks):
            row = [Block("res", ch, mult * net.model_channels)]
            ch = mult * net.model_channels
            if ds in net.attention_resolutions:
                row.append(attention(ch))
            rows.append(row)
        if level != len(net.channel_mult) - 1:
            rows.append([resampler(net, "down", ch)])
            ds *= 2
    return rows, [Block("res", ch, ch), attention(ch), Block("res", ch, ch)]


def layout(unet: UNet) -> Layout:
    """The blocks of a UNet, in the original's order and count."""
    check_heads(unet)
    heads_up = unet.num_heads if unet.num_heads_upsample == -1 else unet.num_heads_upsample
    transformer = unet.use_spatial_transformer

    def attention(ch: int, upward: bool = False) -> Block:
        heads = unet.num_heads if unet.num_head_channels == -1 else ch // unet.num_head_channels
        if not transformer and unet.num_head_channels == -1 and unet.legacy and upward:
            heads = (
                heads_up  # only the plain attention of the decoder listens to num_heads_upsample
            )
        fixed = (
            unet.num_head_channels != -1 and not unet.legacy
        )  # legacy spreads what does not divide over the heads
        head_dim = unet.num_head_channels if fixed else ch // heads
        if transformer:
            return Block("transformer", ch, ch, heads, head_dim, unet.transformer_depth)
        return Block("attn", ch, ch, heads, head_dim)

    rows_in, middle = downward(unet, attention)
    skips = [row[-1].channels_out for row in rows_in]
    ch, ds = skips[-1], 2 ** (len(unet.channel_mult) - 1)
    rows_out = []
    for level, mult in reversed(list(enumerate(unet.channel_mult))):
        for i in range(unet.num_res_blocks + 1):
            row = [Block("res", ch + skips.pop(), mult * unet.model_channels)]
            ch = mult * unet.model_channels
            if ds in unet.attention_resolutions:
                row.append(attention(ch, upward=True))
            if level and i == unet.num_res_blocks:
                row.append(resampler(unet, "up", ch))
                ds //= 2
            rows_out.append(row)
    return Layout(rows_in, middle, rows_out)


FIELDS = tuple(
    f.name for f in dataclasses.fields(UNet) if f.name not in ("parent", "name", "dtype", "remat")
)
