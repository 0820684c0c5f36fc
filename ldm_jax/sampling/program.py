"""From a request in arrays to pixels: all of sampling as one pure function.

What a person may change without compiling anew is an array here. What is None is not asked for, and makes another program.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.feature_cache import FeatureCache
from ldm_jax.diffusion.guidance import Predict, predictor
from ldm_jax.diffusion.samplers import SAMPLERS, AnySampler, Known, initial_noise, sample
from ldm_jax.diffusion.schedule import lift, q_sample
from ldm_jax.models.ldm import FirstStage, LatentDiffusion, to_float, to_uint8

Array = Any  # jax.Array or np.ndarray


class Toward(NamedTuple):
    """The other end of an interpolation: its seeds [b] and encoded conditions, and how far to go there, ``mix`` [b] in [0, 1]."""

    seeds: Array
    encoded: Any
    mix: Array


class Rows(NamedTuple):
    """What is asked for, one row for each picture: every leaf is [b, ...].

    ``encoded`` and ``null`` are conditions as the model's conditioner encodes them, of a `Hybrid` the text alone; ``interval`` [b, 2] are the first
    and the last timestep that is guided. ``image`` uint8 [b, H, W, 3] is a picture to begin with, ``mask`` uint8 [b, H, W, 1] is 1 where it is to be
    made anew, ``variation`` [b] in [0, 1] is how far to go from it.
    """

    seeds: Array
    encoded: Any
    null: Any = None
    guidance: Array | None = None
    interval: Array | None = None
    rescale: Array | None = None
    image: Array | None = None
    mask: Array | None = None
    variation: Array | None = None
    toward: Toward | None = None


class Plan(NamedTuple):
    """The steps, the same for all pictures: the sampler's ``nodes``; from a picture with noise, the row where they ``start`` and the timestep
    (``level``) of that noise; the nodes of DDIM ``inversion`` for variations.
    """

    nodes: Any
    start: Array | None = None
    level: Array | None = None
    inversion: Any = None


@dataclasses.dataclass(frozen=True)
class Form:
    """What is compiled in beside the sampler.

    ``size`` (H, W) in pixels; the calls of the model whose predicted x0 are shown as ``progress``, of the first ``progress_rows`` pictures (0 is
    all); how to decode: ``decode_batch`` pictures at a time (a divisor of the batch; 0 is all), in tiles of ``tile`` pixels where a side is longer
    (0 is never). ``quantize`` brings each predicted x0 to the nearest codes, where the first stage has any.
    Of ``cache_interval`` calls of the UNet only the first is a full one, the others run its first and last ``cache_depth`` rows (1: all are full).
    """

    size: tuple[int, int]
    progress: tuple[int, ...] = ()
    progress_rows: int = 0
    decode_batch: int = 0
    tile: int = 0
    quantize: bool = False
    cache_interval: int = 1
    cache_depth: int = 1


class Made(NamedTuple):
    """uint8 ``images`` [b, H, W, 3], and ``progress`` [b, k, H, W, 3] if asked for."""

    images: Array
    progress: Array | None


def generate(
    model: LatentDiffusion, sampler: AnySampler, plan: Plan, rows: Rows, form: Form
) -> Made:
    """Conditions, seeds and pictures -> pictures.

    ``model``, ``plan`` and ``rows`` are traced. An image depends on its own row alone, not on its place in a batch.
    """
    stage, keys = model.first_stage, jax.vmap(jax.random.key)(rows.seeds)
    f, toward = stage.downsampling, rows.toward
    shape = (form.size[0] // f, form.size[1] // f, stage.channels)
    x = initial_noise(keys, shape)
    if toward is not None:
        x = slerp(x, initial_noise(jax.vmap(jax.random.key)(toward.seeds), shape), toward.mix)

    z0 = known = pixels = None
    if rows.image is not None:
        pixels = to_float(rows.image)
        if model.conditioner.edits:
            # The posterior's mode, not a sample of it as in the original: a picture stays what it is under every seed.
            z0 = stage.encode(pixels).astype(jnp.float32)
            known = None if rows.mask is None else Known(z0, 1.0 - whole_cells(rows.mask, f))

    def told(encoded: Any) -> Any:
        return model.conditioner.with_picture(encoded, stage, pixels, rows.mask)

    parts = None if toward is None else (told(toward.encoded), toward.mix)
    options: dict[str, Any] = {
        "interval": None if rows.interval is None else tuple(rows.interval.T),
        "rescale": rows.rescale,
    }

    def predict(*guidance: Any, **options: Any) -> Predict:
        denoise = model.denoiser(told(rows.encoded), *guidance, toward=parts, **options)
        codes = stage.quantized if form.quantize else None
        return predictor(
            denoise, model.schedule, model.objective, clip=stage.module is None, quantize=codes
        )

    if rows.variation is not None:
        # The noise that leads to the picture, without guidance, which could not be inverted; then part of the way to that of the seed.
        assert z0 is not None
        inverted, _ = sample(SAMPLERS["ddim_inversion"], predict(), z0, plan.inversion)
        x = slerp(inverted, x, rows.variation)
    elif plan.level is not None:
        assert z0 is not None
        x = q_sample(model.schedule, z0, plan.level, x)

    cache = FeatureCache(form.cache_interval) if form.cache_interval > 1 else None
    if cache is not None:  # which holds features of all rows, those of the null condition too
        options |= {"cache": cache, "cache_depth": form.cache_depth, "skip": False}
    guided = predict(None if rows.null is None else told(rows.null), rows.guidance, **options)
    z, steps = sample(
        sampler,
        guided,
        x,
        plan.nodes,
        schedule=model.schedule,
        keys=keys,
        known=known,
        start=plan.start,
        trace=bool(form.progress),
        cache=cache,
    )

    def show(z: jax.Array) -> jax.Array:
        out = decode(stage, z, form)
        if rows.image is not None and rows.mask is not None:  # the rest stays as it was
            out = jnp.where(rows.mask[: len(z)] > 0, out, to_float(rows.image[: len(z)]))
        return to_uint8(out)

    progress = None
    if steps is not None:
        # One after the other, so that the decoder is compiled once more and not once for each.
        shown = steps.x0[np.array(form.progress)][:, : form.progress_rows or len(x)]
        progress = jnp.swapaxes(jax.lax.map(show, shown), 0, 1)
    return Made(show(z), progress)


def slerp(a: jax.Array, b: jax.Array, mix: jax.Array) -> jax.Array:
    """Along the great circle from ``a`` to ``b`` [n, ...], ``mix`` [n] of the way: what lies between two noises has the length of a noise."""
    axes = tuple(range(1, a.ndim))
    dot, aa, bb = ((u * v).sum(axes) for u, v in ((a, b), (a, a), (b, b)))
    angle = jnp.arccos(jnp.clip(dot / jnp.sqrt(aa * bb), -1.0, 1.0))
    sine = jnp.sin(angle)
    flat = sine < 1e-3  # nearly one line: no circle is given
    sine = jnp.where(flat, 1.0, sine)
    to_a = jnp.where(flat, 1 - mix, jnp.sin((1 - mix) * angle) / sine)
    to_b = jnp.where(flat, mix, jnp.sin(mix * angle) / sine)
    return lift(to_a, a) * a + lift(to_b, b) * b


def whole_cells(mask: jax.Array, f: int) -> jax.Array:
    """A mask of pixels [b, H, W, 1] -> of latents, float32 [b, H / f, W / f, 1]: a cell is made anew where any of its pixels is."""
    b, h, w, _ = mask.shape
    return jnp.max(mask.reshape(b, h // f, f, w // f, f, 1), (2, 4)).astype(jnp.float32)


# ----------------------------------------------------------------------------------------------------------------------- decoding


def decode(stage: FirstStage, z: jax.Array, form: Form) -> jax.Array:
    """Latents [b, h, w, c] -> pixels [b, H, W, 3], in the parts that ``form`` says."""
    one: Callable[[jax.Array], jax.Array] = stage.decode
    if form.tile and max(z.shape[1:3]) * stage.downsampling > form.tile:
        one = partial(
            decode_tiled,
            stage.decode,
            factor=stage.downsampling,
            tile=form.tile // stage.downsampling,
        )
    d = form.decode_batch
    if not 0 < d < z.shape[0]:
        return one(z)
    # Each part takes pictures from every device: the batch is split along the axis that stays.
    parts = jnp.swapaxes(z.reshape(d, -1, *z.shape[1:]), 0, 1)
    pixels = jnp.swapaxes(jax.lax.map(one, parts), 0, 1)
    return pixels.reshape(-1, *pixels.shape[2:])


# Pixels decoded at a time where nobody says: a CPU's cores are busy with a small picture already.
_AT_ONCE, _AT_ONCE_ON_CPU = 512 * 512, 128 * 128


def decode_part(platform: str, size: tuple[int, int], local: int, wanted: int | None = None) -> int:
    """How many of its ``local`` pictures of ``size`` a device decodes at a time: a divisor of them, at most ``wanted``; 0 where that is all.

    Where nobody wants a number, a CPU decodes as many as have 128x128 pixels together, an accelerator 512x512, or one: what it needs then does not
    grow with the batch.
    """
    if wanted is None:
        wanted = max((_AT_ONCE_ON_CPU if platform == "cpu" else _AT_ONCE) // (size[0] * size[1]), 1)
    part = max((d for d in range(1, local + 1) if local % d == 0 and d <= wanted), default=0)
    return part if part < local else 0


def decode_tiled(
    decode: Callable[[jax.Array], jax.Array], z: jax.Array, *, factor: int, tile: int
) -> jax.Array:
    """`decode` of latents [b, h, w, c] by tiles of at most ``tile`` x ``tile`` cells, a quarter of which overlaps, blended by linear ramps.

    Not exact: what a decoder computes from the whole picture (group normalisation, attention) it then computes from a tile;
    benchmarks/tiled_decode.py measures by how much. Memory is that of one tile and the picture.
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
    """Where tiles begin that cover a length evenly and overlap by at least ``overlap``."""
    count = -(-max(length - overlap, 1) // (tile - overlap))
    return [round(place) for place in np.linspace(0, length - tile, max(count, 1))]


def tile_ramp(length: int, overlap: int) -> np.ndarray:
    """Weights of a tile's pixels along one axis, float32 [length]: rising over ``overlap`` at both ends, never 0."""
    ends = np.minimum(np.arange(length) + 0.5, length - 0.5 - np.arange(length))
    return np.minimum(ends / max(overlap, 1), 1.0).astype(np.float32)
