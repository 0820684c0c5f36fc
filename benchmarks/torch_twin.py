"""The same networks in PyTorch, with the same weights: the other side of the benchmarks.

Written as a PyTorch user would write them: NCHW in channels_last memory,
F.scaled_dot_product_attention, nothing computed twice. Modules have the names of ours, so that
`fill` copies parameters by name. Only what the benchmarks need: the UNet with spatial
transformers, the BERT-style text encoder, the KL decoder.
"""

from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

from ldm_jax.models.unet import Block, UNet, layout


def fill(module: nn.Module, params: Any) -> None:
    """Copies Flax parameters into modules of the same names; KeyError where the names differ."""
    own = {name for name, _ in module.named_parameters(recurse=False)} | {
        name for name, _ in module.named_children()
    }
    leaf = {"scale": "weight", "kernel": "weight", "embedding": "weight"}
    if own != {leaf.get(name, name) for name in params}:
        raise KeyError(
            f"{type(module).__name__} has {sorted(own)}, the parameters {sorted(params)}"
        )
    for name, value in params.items():
        if hasattr(value, "items"):
            fill(getattr(module, name), value)
            continue
        array = np.asarray(value, np.float32)
        if name == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        with torch.no_grad():
            getattr(module, leaf.get(name, name)).copy_(
                torch.from_numpy(np.array(array, order="C"))
            )


class Attention(nn.Module):
    def __init__(self, c: int, context: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(c, inner, bias=False)
        self.to_k = nn.Linear(context, inner, bias=False)
        self.to_v = nn.Linear(context, inner, bias=False)
        self.to_out = nn.Linear(inner, c)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            f(a).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, a in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, c: int, glu: bool):
        super().__init__()
        self.glu = glu
        self.proj_in = nn.Linear(c, 4 * c * (2 if glu else 1))
        self.proj_out = nn.Linear(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj_in(x)
        if not self.glu:
            return self.proj_out(F.gelu(h))
        value, gate = h.chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    def __init__(self, c: int, context: int, heads: int, head_dim: int):
        super().__init__()
        self.attn1, self.attn2 = (
            Attention(c, c, heads, head_dim),
            Attention(c, context, heads, head_dim),
        )
        self.ff = FeedForward(c, glu=True)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, block: Block, context: int, groups: int):
        super().__init__()
        c, inner = block.channels_in, block.heads * block.head_dim
        self.norm = nn.GroupNorm(groups, c, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(c, inner), nn.Linear(inner, c)
        for i in range(block.depth):
            self.add_module(
                f"blocks_{i}", TransformerBlock(inner, context, block.heads, block.head_dim)
            )
        self.depth = block.depth

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h, w = x.shape[2:]
        y = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for i in range(self.depth):
            y = getattr(self, f"blocks_{i}")(y, context)
        return x + self.proj_out(y).transpose(1, 2).unflatten(2, (h, w))


class ResBlock(nn.Module):
    def __init__(self, c: int, features: int, emb: int, groups: int):
        super().__init__()
        self.in_norm, self.out_norm = nn.GroupNorm(groups, c), nn.GroupNorm(groups, features)
        self.in_conv, self.out_conv = (
            nn.Conv2d(c, features, 3, padding=1),
            nn.Conv2d(features, features, 3, padding=1),
        )
        self.emb = nn.Linear(emb, features)
        if c != features:
            self.skip = Pointwise(c, features)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h = self.in_conv(F.silu(self.in_norm(x))) + self.emb(F.silu(emb))[:, :, None, None]
        h = self.out_conv(F.silu(self.out_norm(h)))
        return (self.skip(x) if hasattr(self, "skip") else x) + h


class Pointwise(nn.Linear):
    """A 1x1 convolution of [b, c, h, w] with the parameters of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class Resample(nn.Module):
    """A doubling or halving, with a convolution or without."""

    def __init__(self, kind: str, c: int, convolved: bool, padding: str = "same"):
        super().__init__()
        self.kind, self.right = kind, padding == "right"
        if convolved:
            stride, pad = (1, 1) if kind == "up" else (2, 0 if self.right else 1)
            self.conv = nn.Conv2d(c, c, 3, stride=stride, padding=pad)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        convolved = hasattr(self, "conv")
        if self.kind == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            return self.conv(x) if convolved else x
        if not convolved:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.right else x)


class Conv(nn.Conv2d):
    """A 3x3 convolution that takes and leaves what its row's other blocks are given."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return super().forward(x)


class TimeEmbedding(nn.Module):
    def __init__(self, c: int, features: int):
        super().__init__()
        self.dense_0, self.dense_1 = nn.Linear(c, features), nn.Linear(features, features)
        half = c // 2
        self.register_buffer(
            "freqs", torch.exp(-np.log(10000.0) * torch.arange(half) / half), persistent=False
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        args = t.float()[:, None] * self.freqs
        emb = torch.cat([torch.cos(args), torch.sin(args)], dim=-1).to(dtype)
        return self.dense_1(F.silu(self.dense_0(emb)))


class TorchUNet(nn.Module):
    """The UNet with spatial transformers: x [b, c, h, w], t [b], context [b, m, k] -> x's shape."""

    def __init__(self, unet: UNet):
        super().__init__()
        if not unet.use_spatial_transformer or unet.resblock_updown or unet.use_scale_shift_norm:
            raise ValueError(
                "TorchUNet: spatial transformers only, no resblock_updown, no scale_shift"
            )
        plan, emb, groups = layout(unet), 4 * unet.model_channels, unet.norm_groups
        self.time_embed = TimeEmbedding(unet.model_channels, emb)

        def make(block: Block) -> nn.Module:
            match block.kind:
                case "conv":
                    return Conv(block.channels_in, block.channels_out, 3, padding=1)
                case "res":
                    return ResBlock(block.channels_in, block.channels_out, emb, groups)
                case "transformer":
                    return SpatialTransformer(block, unet.context_dim or block.channels_in, groups)
                case _:
                    return Resample(block.kind, block.channels_in, unet.conv_resample)

        rows = {f"input_blocks_{i}": row for i, row in enumerate(plan.input)} | {
            "middle_block": plan.middle
        }
        rows |= {f"output_blocks_{i}": row for i, row in enumerate(plan.output)}
        self.rows = {name: [f"{name}_{j}" for j in range(len(row))] for name, row in rows.items()}
        for name, row in rows.items():
            for j, block in enumerate(row):
                if block.kind not in ("up", "down") or unet.conv_resample:
                    self.add_module(f"{name}_{j}", make(block))
                else:  # without parameters, which Flax has no entry for
                    object.__setattr__(self, f"{name}_{j}", make(block))
        self.out_norm = nn.GroupNorm(groups, unet.model_channels)
        self.out_conv = nn.Conv2d(unet.model_channels, unet.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb, skips, h = self.time_embed(t, x.dtype), [], x
        for name, blocks in self.rows.items():
            if name.startswith("output"):
                h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:
                h = getattr(self, block)(h, emb, context)
            if name.startswith("input"):
                skips.append(h)
        return self.out_conv(F.silu(self.out_norm(h))).float()


class TorchText(nn.Module):
    """Our `TransformerEncoder`: tokens [b, n] -> [b, n, dim]."""

    def __init__(
        self, dim: int, depth: int, vocab_size: int, max_seq_len: int, heads: int, head_dim: int
    ):
        super().__init__()
        self.depth = depth
        self.token_emb = nn.Embedding(vocab_size, dim)
        self.pos_emb = nn.Parameter(torch.zeros(max_seq_len, dim))
        for i in range(depth):
            self.add_module(f"attn_{i}", Attention(dim, dim, heads, head_dim))
            self.add_module(f"attn_norm_{i}", nn.LayerNorm(dim))
            self.add_module(f"ff_{i}", FeedForward(dim, glu=False))
            self.add_module(f"ff_norm_{i}", nn.LayerNorm(dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(tokens) + self.pos_emb[: tokens.shape[1]]
        for i in range(self.depth):
            x = x + getattr(self, f"attn_{i}")(getattr(self, f"attn_norm_{i}")(x))
            x = x + getattr(self, f"ff_{i}")(getattr(self, f"ff_norm_{i}")(x))
        return self.norm(x)


class ResnetBlock(nn.Module):
    def __init__(self, c: int, features: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, c, 1e-6), nn.GroupNorm(groups, features, 1e-6)
        self.conv1, self.conv2 = (
            nn.Conv2d(c, features, 3, padding=1),
            nn.Conv2d(features, features, 3, padding=1),
        )
        if c != features:
            self.skip = Pointwise(c, features)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.skip(x) if hasattr(self, "skip") else x) + h


class PixelAttention(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2)
        y = self.proj_out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class TorchDecoder(nn.Module):
    """post_quant_conv and decoder of the KL autoencoder: z [b, c, h, w] -> [b, 3, h f, w f]."""

    def __init__(self, module: Any):
        super().__init__()
        if module.attn_resolutions or module.attn_type not in ("vanilla", "none"):
            raise ValueError("TorchDecoder: only attention in the middle, vanilla or none")
        self.post_quant_conv, self.decoder = (
            Pointwise(module.embed_dim, module.z_channels),
            nn.Module(),
        )
        groups, widths = module.norm_groups, [mult * module.ch for mult in module.ch_mult]
        order, c = ["conv_in", "mid_block_1"], widths[-1]
        add = self.decoder.add_module
        add("conv_in", nn.Conv2d(module.z_channels, c, 3, padding=1))
        add("mid_block_1", ResnetBlock(c, c, groups))
        if module.attn_type == "vanilla":
            add("mid_attn_1", PixelAttention(c, groups))
            order.append("mid_attn_1")
        add("mid_block_2", ResnetBlock(c, c, groups))
        order.append("mid_block_2")
        for level in reversed(range(len(widths))):
            for i in range(module.num_res_blocks + 1):
                add(f"up_{level}_block_{i}", ResnetBlock(c, widths[level], groups))
                order.append(f"up_{level}_block_{i}")
                c = widths[level]
            if level:
                add(f"up_{level}_upsample", Resample("up", c, True))
                order.append(f"up_{level}_upsample")
        add("norm_out", nn.GroupNorm(groups, c, 1e-6))
        add("conv_out", nn.Conv2d(c, module.out_ch, 3, padding=1))
        self.order = order

    def forward(self, z: Tensor) -> Tensor:
        h = self.post_quant_conv(z)
        for name in self.order:
            h = getattr(self.decoder, name)(h)
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(h))).float()


def decoder_params(params: Any) -> dict[str, Any]:
    """The part of a KL autoencoder's parameters that `TorchDecoder` has."""
    return {name: params[name] for name in ("post_quant_conv", "decoder")}
