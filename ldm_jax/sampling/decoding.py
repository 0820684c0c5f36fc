"""Latents to pixels, a few pictures or a tile at a time."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.ldm import FirstStage


def decode(stage: FirstStage, z: jax.Array, batch: int = 0, tile: int = 0) -> jax.Array:
    """Decodes latents [b, h, w, c] to pixels [b, H, W, 3].

    Args:
      stage: The first stage.
      z: The latents.
      batch: Pictures that are decoded at a time, a divisor of b; 0 is all.
      tile: Pixels of a tile, for pictures with a longer side; 0 is never.
    """
    one: Callable[[jax.Array], jax.Array] = stage.decode
    f = stage.downsampling
    if tile and max(z.shape[1:3]) * f > tile:
        one = partial(decode_tiled, stage.decode, factor=f, tile=tile // f)
    if not 0 < batch < z.shape[0]:
        return one(z)
    # Each part takes pictures from every device: the batch is split along the axis that stays.
    parts = jnp.swapaxes(z.reshape(batch, -1, *z.shape[1:]), 0, 1)
    pixels = jnp.swapaxes(jax.lax.map(one, parts), 0, 1)
    return pixels.reshape(-1, *pixels.shape[2:])


# Pixels decoded at a time by default: a small picture already occupies a CPU's cores.
_AT_ONCE, _AT_ONCE_ON_CPU = 512 * 512, 128 * 128


def decode_part(platform: str, size: tuple[int, int], local: int, wanted: int | None = None) -> int:
    """Returns how many of its ``local`` pictures of ``size`` a device decodes at a time.

    A divisor of them, at most ``wanted``; 0 where that is all. By default a CPU decodes as many as
    have 128x128 pixels together, an accelerator 512x512, or one: the memory does not grow with the
    batch.
    """
    if wanted is None:
        wanted = max((_AT_ONCE_ON_CPU if platform == "cpu" else _AT_ONCE) // (size[0] * size[1]), 1)
    part = max((d for d in range(1, local + 1) if local % d == 0 and d <= wanted), default=0)
    return part if part < local else 0


def decode_tiled(
    decode: Callable[[jax.Array], jax.Array], z: jax.Array, *, factor: int, tile: int
) -> jax.Array:
    """Decodes latents [b, h, w, c] in tiles of at most ``tile`` x ``tile`` cells.

    A quarter of a tile overlaps with the next; they are blended by linear ramps. Not exact: what a
    decoder computes from the whole picture (group normalisation, attention) it computes from a
    tile. Memory is that of one tile and the picture.
    """
    b, h, w, _ = z.shape
    th, tw, overlap = min(tile, h), min(tile, w), tile // 4
    spots = np.array(
        [(y, x) for y in tile_starts(h, th, overlap) for x in tile_starts(w, tw, overlap)]
    )
    ramp = np.outer(*(tile_ramp(n * factor, overlap * factor) for n in (th, tw)))[:, :, None]
    total = np.zeros((h * factor, w * factor, 1), np.float32)
    for y, x in spots * factor:
        total[y : y + th * factor, x : x + tw * factor] += ramp

    def add(canvas: jax.Array, spot: jax.Array) -> tuple[jax.Array, None]:
        y, x = spot
        part = decode(jax.lax.dynamic_slice(z, (0, y, x, 0), (b, th, tw, z.shape[3])))
        corner = (0, y * factor, x * factor, 0)
        there = jax.lax.dynamic_slice(canvas, corner, part.shape)
        return jax.lax.dynamic_update_slice(canvas, there + part * ramp, corner), None

    canvas = jnp.zeros((b, h * factor, w * factor, jax.eval_shape(decode, z).shape[-1]))
    return jax.lax.scan(add, canvas, jnp.asarray(spots))[0] / total


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Returns where tiles start that cover a length evenly and overlap by ``overlap`` or more."""
    count = -(-max(length - overlap, 1) // (tile - overlap))
    return [round(place) for place in np.linspace(0, length - tile, max(count, 1))]


def tile_ramp(length: int, overlap: int) -> np.ndarray:
    """Returns weights along an axis, float32 [length]: rising over ``overlap`` at both ends."""
    ends = np.minimum(np.arange(length) + 0.5, length - 0.5 - np.arange(length))
    return np.minimum(ends / max(overlap, 1), 1.0).astype(np.float32)
