"""The diffusion UNet (Dhariwal & Nichol 2021, arXiv:2105.05233).

With cross-attention it is that of Rombach et al. 2022 (arXiv:2112.10752); with a vector condition
and a depth for each level, that of SDXL (Podell et al. 2023, arXiv:2307.01952).

`layout(config)` describes the network as rows of blocks; the module runs those rows and the
conversion tables walk them, so that the two cannot disagree. `Trunk` and `downward` are what the
UNet shares with the classifier of `ldm_jax.models.encoder_unet`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.kernels import SAVED
from ldm_jax.nn.attention import AttentionBlock, SpatialTransformer
from ldm_jax.nn.layers import (
    Array,
    Conv,
    Dense,
    Embed,
    GroupNorm,
    Module,
    repeat_batch,
    timestep_embedding,
)
from ldm_jax.nn.resnet import Downsample, ResBlock, Upsample


class Block(NamedTuple):
    """One block of the UNet, with the channels that enter and leave it."""

    kind: Literal["conv", "res", "res_up", "res_down", "attn", "transformer", "down", "up"]
    channels_in: int
    channels_out: int
    heads: int = 0
    head_dim: int = 0
    depth: int = 0
    attend_to_context: bool = False


class Layout(NamedTuple):
    """Rows of blocks.

    The result of every input row is kept, and concatenated to the input of an output row, the last
    one first.
    """

    input: list[list[Block]]
    middle: list[Block]
    output: list[list[Block]]

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """(module name, block): input_blocks_i_j, output_blocks_i_j, middle_block_j."""
        for part, rows in (("input_blocks", self.input), ("output_blocks", self.output)):
            for i, row in enumerate(rows):
                yield from ((f"{part}_{i}_{j}", block) for j, block in enumerate(row))
        yield from ((f"middle_block_{j}", block) for j, block in enumerate(self.middle))


class Trunk(Module):
    """The fields of a network made of rows of blocks, and how a row runs.

    Names and defaults are the original's. ``attention_resolutions`` are downsampling factors, not
    sizes. ``num_head_channels``, when positive, fixes the head size and lets the head count follow;
    otherwise ``num_heads`` holds. ``num_attention_blocks``, one number for each level, limits how
    many of its residual blocks attention follows. ``dropout`` needs a "dropout" rng when ``train``.
    ``remat`` recomputes the inside of each block in the backward pass.
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
    num_attention_blocks: tuple[int, ...] | None = None
    norm_groups: int = 32
    remat: bool = False

    def attends(self, downsampling: int, level: int, i: int) -> bool:
        """Whether residual block ``i`` of a level is followed by attention."""
        counts = self.num_attention_blocks
        return downsampling in self.attention_resolutions and (counts is None or i < counts[level])

    def embed_time(self, t: Array) -> Array:
        """``t`` [b] -> [b, 4 model_channels]; called inside ``__call__``."""
        embed = self.layer(TimeEmbedding)(4 * self.model_channels, name="time_embed")
        return embed(timestep_embedding(t, self.model_channels))

    def run(
        self, row: list[Block], name: str, h: Array, emb: Array, context: Array | None, train: bool
    ) -> Array:
        """Runs one row of blocks; called inside ``__call__``, whose submodules these become."""

        def make(cls: Any, *args: Any, remat_static: tuple[int, ...] = (), **fields: Any) -> Any:
            if self.remat:
                policy = jax.checkpoint_policies.save_only_these_names(SAVED)
                cls = nn.remat(cls, static_argnums=remat_static, policy=policy)
            return self.layer(cls)(*args, norm_groups=self.norm_groups, **fields)

        for j, block in enumerate(row):
            at = f"{name}_{j}"
            match block.kind:
                case "conv":
                    h = self.layer(Conv)(block.channels_out, name=at)(h)
                case "res" | "res_up" | "res_down":
                    resample = {"res": "none", "res_up": "up", "res_down": "down"}[block.kind]
                    fields = (block.channels_out, self.dropout, self.use_scale_shift_norm, resample)
                    res = make(ResBlock, *fields, remat_static=(3,), name=at)
                    h = res(h, repeat_batch(emb, h), train)
                case "transformer":
                    fields = (block.heads, block.head_dim, block.depth)
                    first = {"attend_to_context": block.attend_to_context}
                    transformer = make(
                        SpatialTransformer, *fields, **first, remat_static=(3,), name=at
                    )
                    h = transformer(h, context, train)
                case "attn":
                    h = make(AttentionBlock, block.heads, self.use_new_attention_order, name=at)(h)
                case "down":
                    h = self.layer(Downsample)(self.conv_resample, "same", name=at)(h)
                case "up":
                    h = self.layer(Upsample)(self.conv_resample, name=at)(h)
            h = self.kernels.keep_rows(h)
        return h


class UNet(Trunk):
    """x [b, h, w, in_channels], t [b] -> float32 [b, h, w, out_channels].

    Fields carry the original's names and defaults (see `Trunk`). Height and width must divide by
    2^(levels - 1).

    Attributes:
      num_classes: What the vector condition y is: None, there is none; a number, class indices [b];
        "sequential", float features [b, adm_in_channels] (SDXL); "timestep", scalars [b] as
        sinusoids; "continuous", scalars [b, 1]. It is added to the timestep embedding.
      transformer_depth: Transformer blocks of a level; one number, or one for each level.
      disable_self_attentions: Of each level, whether its first attention reads the context.
      use_linear_in_transformer: How the original stores the transformers' projections.
      n_embed: Predict logits [b, h, w, n_embed] of codebook indices instead.
      legacy: Spread channels that num_head_channels does not divide over the heads.
    """

    num_classes: int | Literal["sequential", "timestep", "continuous"] | None = None
    adm_in_channels: int | None = None
    use_spatial_transformer: bool = False
    transformer_depth: int | tuple[int, ...] = 1
    context_dim: int | None = None
    use_linear_in_transformer: bool = False
    disable_self_attentions: tuple[bool, ...] | None = None
    n_embed: int | None = None
    legacy: bool = True

    def embed_vector(self, y: Array) -> Array:
        """The vector condition -> [b, 4 model_channels]; called inside ``__call__``."""
        width = 4 * self.model_channels
        match self.num_classes:
            case "continuous":
                return self.layer(Dense)(width, name="label_emb")(y)
            case "timestep":
                y = timestep_embedding(y, self.model_channels)
            case "sequential":
                if y.ndim != 2 or y.shape[1] != self.adm_in_channels:
                    raise ValueError(
                        f"UNet: y of shape {y.shape}, expected [b, {self.adm_in_channels}]"
                    )
            case _:
                embed = self.layer(Embed)(int(self.num_classes or 0), width, name="label_emb")
                return self.kernels.keep_rows(embed(y))
        return self.layer(TimeEmbedding)(width, name="label_emb")(y)

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
        controls: tuple[Array, ...] = (),
    ) -> Array | tuple[Array, Array]:
        """Runs the network.

        Args:
          x: Latents [b, h, w, in_channels].
          t: Timesteps [b].
          context: [r b, m, context_dim] for cross-attention. Several contexts of each picture, one
            batch after the other, give [r b, h, w, out_channels]: what lies before the first
            cross-attention is computed once.
          y: The vector condition, where ``num_classes`` is set.
          train: Whether dropout is on.
          depth: With a depth the result is (output, deep), where ``deep`` [b, h', w', c'] is the
            feature that enters the last ``depth`` output rows.
          deep: Such a feature: only the first and the last ``depth`` rows run, around it
            (DeepCache, Ma et al. 2023, arXiv:2312.00858).
          controls: Features that a ControlNet adds to the skips, in their order, and the last one
            to the result of the middle; fewer than all are those of the last.
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError("UNet: y must be given if and only if num_classes is set")
        if context is not None and not self.use_spatial_transformer:
            raise ValueError("UNet: context needs use_spatial_transformer=True")
        factor = 2 ** (len(self.channel_mult) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"UNet: height and width {x.shape[1:3]} must be multiples of {factor}")
        plan, reused = layout(self), deep is not None
        if not int(reused) <= depth <= len(plan.input):
            raise ValueError(
                f"UNet: depth {depth} must be from {int(reused)} to {len(plan.input)}, "
                "its input rows"
            )
        emb = self.embed_time(t)
        if y is not None:
            emb = emb + self.embed_vector(y)
        missing = len(plan.input) + 1 - len(controls)
        added: list[Array | float] = [*[0.0] * missing, *controls]
        added = added[:depth] if reused else added  # those of the rows that run

        h, skips, last = x.astype(self.dtype), [], len(plan.output) - depth
        for i, row in enumerate(plan.input[:depth] if reused else plan.input):
            h = self.run(row, f"input_blocks_{i}", h, emb, context, train)
            skips.append(h)
        if not reused:
            h = self.run(plan.middle, "middle_block", h, emb, context, train)
            h = h + added.pop() if controls else h
        for i, row in enumerate(plan.output):
            if i < last and reused:
                continue
            if i == last:
                h = deep = h if deep is None else deep
            skip = repeat_batch(skips.pop(), h)
            skip = skip + added.pop() if controls else skip
            h = jnp.concatenate([h, skip], axis=-1)
            h = self.run(row, f"output_blocks_{i}", h, emb, context, train)

        norm = self.layer(GroupNorm)
        if self.n_embed is not None:
            h = norm(1e-5, self.norm_groups, name="id_norm")(h)
            out = Dense(self.n_embed, kernels=self.kernels, name="id_predictor")(h)
        else:
            h = norm(1e-5, self.norm_groups, silu=True, name="out_norm")(h)
            out = self.layer(Conv)(self.out_channels, zero=True, name="out_conv")(h)
            out = out.astype(jnp.float32)
        return out if deep is None else (out, deep)


class TimeEmbedding(Module):
    """Two dense layers with SiLU between: [b, c] -> [b, features]."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = self.layer(Dense)
        x = nn.silu(dense(self.features, name="dense_0")(x))
        return dense(self.features, name="dense_1")(x)


def check_heads(net: Trunk) -> None:
    """ValueError where there is attention without a number of heads."""
    if net.num_heads == -1 and net.num_head_channels == -1 and net.attention_resolutions:
        raise ValueError(f"{type(net).__name__}: set num_heads or num_head_channels")


def resampler(net: Trunk, kind: Literal["up", "down"], ch: int) -> Block:
    """The block that doubles or halves the size between two levels."""
    return Block(f"res_{kind}" if net.resblock_updown else kind, ch, ch)  # type: ignore[arg-type]


def downward(
    net: Trunk, attention: Callable[[int, int], Block]
) -> tuple[list[list[Block]], list[Block]]:
    """The input rows and the middle.

    ``attention(channels, level)`` makes the attention block of a level; the middle's is -1.
    """
    ch, ds = net.model_channels, 1
    rows = [[Block("conv", net.in_channels, ch)]]
    for level, mult in enumerate(net.channel_mult):
        for i in range(net.num_res_blocks):
            row = [Block("res", ch, mult * net.model_channels)]
            ch = mult * net.model_channels
            if net.attends(ds, level, i):
                row.append(attention(ch, level))
            rows.append(row)
        if level != len(net.channel_mult) - 1:
            rows.append([resampler(net, "down", ch)])
            ds *= 2
    return rows, [Block("res", ch, ch), attention(ch, -1), Block("res", ch, ch)]


def layout(unet: UNet) -> Layout:
    """The blocks of a UNet, in the original's order and count."""
    check_heads(unet)
    heads_up = unet.num_heads if unet.num_heads_upsample == -1 else unet.num_heads_upsample
    levels, depth = len(unet.channel_mult), unet.transformer_depth
    depths = (depth,) * levels if isinstance(depth, int) else depth
    if len(depths) != levels:
        raise ValueError(f"UNet: transformer_depth {depths} must have {levels} entries")
    first = unet.disable_self_attentions or (False,) * levels

    def attention(ch: int, level: int, upward: bool = False) -> Block:
        heads = unet.num_heads if unet.num_head_channels == -1 else ch // unet.num_head_channels
        plain = not unet.use_spatial_transformer
        if plain and unet.num_head_channels == -1 and unet.legacy and upward:
            # Only the plain attention of the decoder follows num_heads_upsample.
            heads = heads_up
        # legacy spreads channels that the head size does not divide over the heads.
        fixed = unet.num_head_channels != -1 and not unet.legacy
        head_dim = unet.num_head_channels if fixed else ch // heads
        if plain:
            return Block("attn", ch, ch, heads, head_dim)
        to_context = level >= 0 and first[level]  # the middle keeps its self-attention
        return Block("transformer", ch, ch, heads, head_dim, depths[level], to_context)

    rows_in, middle = downward(unet, attention)
    skips = [row[-1].channels_out for row in rows_in]
    ch, ds = skips[-1], 2 ** (levels - 1)
    rows_out = []
    for level, mult in reversed(list(enumerate(unet.channel_mult))):
        for i in range(unet.num_res_blocks + 1):
            row = [Block("res", ch + skips.pop(), mult * unet.model_channels)]
            ch = mult * unet.model_channels
            if unet.attends(ds, level, i):
                row.append(attention(ch, level, upward=True))
            if level and i == unet.num_res_blocks:
                row.append(resampler(unet, "up", ch))
                ds //= 2
            rows_out.append(row)
    return Layout(rows_in, middle, rows_out)


FIELDS = tuple(
    f.name
    for f in dataclasses.fields(UNet)
    if f.name not in ("parent", "name", "dtype", "kernels", "remat")
)
