"""Name tables of the blocks of the original CompVis networks.

Each walker yields one block: ``prefix`` is "" or ends in a dot, ``path`` leads to its parameters.
"""

from collections.abc import Iterator

from ldm_jax.convert.tables import (
    CONV1D,
    CONV1X1,
    DENSE,
    Duplicate,
    Entry,
    Path,
    Unused,
    conv,
    dense,
    norm,
)

Walk = Iterator[Entry | Unused | Duplicate]


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


def spatial_transformer(prefix: str, path: Path, *, depth: int = 1, linear: bool = False) -> Walk:
    """SpatialTransformer; its projections are 1x1 convolutions, or ``linear`` layers (SD 2.x)."""
    yield from norm(f"{prefix}norm", (*path, "norm"))
    for name in ("proj_in", "proj_out"):
        yield from dense(f"{prefix}{name}", (*path, name), op=DENSE if linear else CONV1X1)
    for i in range(depth):
        yield from transformer_block(f"{prefix}transformer_blocks.{i}.", (*path, f"blocks_{i}"))


def attention_block(prefix: str, path: Path) -> Walk:
    """The UNet's AttentionBlock; its fused projection keeps its order."""
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
