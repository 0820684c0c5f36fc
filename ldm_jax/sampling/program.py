"""Sampling as one pure function: from the arrays of a request to pixels."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.feature_cache import FeatureCache
from ldm_jax.diffusion.guidance import Correct, Predict, predictor
from ldm_jax.diffusion.samplers import (
    SAMPLERS,
    AnySampler,
    Known,
    advance,
    initial_noise,
    sample,
)
from ldm_jax.diffusion.schedule import lift, q_sample
from ldm_jax.models.ldm import FirstStage, LatentDiffusion, to_float, to_uint8
from ldm_jax.sampling.decoding import decode
from ldm_jax.sampling.inputs import Array, Inputs


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What is compiled in beside the sampler.

    Attributes:
      size: (H, W) in pixels.
      progress: The calls of the model whose predicted x0 are returned.
      progress_rows: Number of pictures with progress, from the first; 0 is all.
      decode_batch: Pictures decoded at a time, a divisor of the batch; 0 is all.
      tile: Pixels of a tile, where a side is longer; 0 is never.
      renoise_null: Whether samplers step with the null condition's noise (CFG++).
      quantize: Whether predicted x0 are replaced by the nearest codes of the first stage.
      cache_interval: Run the full UNet every N calls; 1 is always.
      cache_depth: Rows of the UNet at each end that run in every call.
      decodes: Whether the latents are decoded; without, the pictures have no pixels.
      patch: Pixels of a patch that the UNet runs on, where a side is longer; 0 is never.
    """

    size: tuple[int, int]
    progress: tuple[int, ...] = ()
    progress_rows: int = 0
    decode_batch: int = 0
    tile: int = 0
    renoise_null: bool = False
    quantize: bool = False
    cache_interval: int = 1
    cache_depth: int = 1
    decodes: bool = True
    patch: int = 0


class Steps(NamedTuple):
    """The sampler's tables, the same for all pictures; traced.

    Attributes:
      nodes: The sampler's nodes.
      start: The row of ``nodes`` where sampling from an image starts.
      level: The timestep of the noise that is added to the image.
      inversion: The nodes of DDIM inversion, for variations.
      noise_dropout: Rate of dropout on the noise that the sampler adds.
      part: The first row of a part of the run and the row after its last, int32 [2]; None runs all.
    """

    nodes: Any
    start: Array | None = None
    level: Array | None = None
    inversion: Any = None
    noise_dropout: Array | None = None
    part: Array | None = None


class Pictures(NamedTuple):
    """A batch of results.

    Attributes:
      images: uint8 [b, H, W, 3].
      progress: Predictions of x0, uint8 [b, k, H, W, 3].
      latents: float32 [b, h, w, c].
      finite: Whether all pixels of a picture are finite numbers, bool [b].
      state: After a part of a run, `Inputs.state` of the next part; the images and latents are the
        x0 that its last step predicted.
    """

    images: Array
    progress: Array | None
    latents: Array
    finite: Array
    state: Any = None


def generate(
    model: LatentDiffusion,
    sampler: AnySampler,
    steps: Steps,
    inputs: Inputs,
    config: SamplingConfig,
) -> Pictures:
    """Samples a batch of pictures.

    ``model``, ``steps`` and ``inputs`` are traced. A picture depends on its own row alone, not on
    its place in a batch.
    """
    stage, conditioner, toward = model.first_stage, model.conditioner, inputs.toward
    f, keys = stage.downsampling, keys_of(inputs.seeds)
    shape = (config.size[0] // f, config.size[1] // f, stage.channels)
    x = initial_noise(keys, shape) if inputs.noise is None else inputs.noise
    if toward is not None:
        x = slerp(x, initial_noise(keys_of(toward.seeds), shape), toward.mix)
    if inputs.latents is not None:  # of another model, whose steps have drawn from these keys
        x = inputs.latents
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)

    pixels = z0 = known = None
    if inputs.image is not None:
        pixels = to_float(inputs.image)
        if conditioner.edits:
            # The posterior's mode, not a sample of it as in the original: a picture stays the
            # same under every seed.
            z0 = stage.encode(pixels).astype(jnp.float32)
            if inputs.mask is not None:
                known = Known(z0, 1.0 - whole_cells(inputs.mask, f))

    def with_picture(encoded: Any) -> Any:
        return conditioner.with_picture(encoded, stage, pixels, inputs.mask)

    control = None
    if inputs.control is not None:
        hints = tuple(hint.astype(jnp.float32) / 255 for hint in inputs.control.hints)
        control = hints, inputs.control.scales
    other = None if toward is None else (with_picture(toward.encoded), toward.mix)

    def predict(*guidance: Any, **options: Any) -> Predict:
        options["patch"] = config.patch // f
        denoise = model.denoiser(
            with_picture(inputs.encoded), *guidance, toward=other, control=control, **options
        )
        return predictor(
            denoise,
            model.schedule,
            model.objective,
            clip=stage.module is None,
            correct=correction(model, inputs) if guidance else None,
            quantize=stage.quantized if config.quantize else None,
        )

    if inputs.variation is not None:
        # The noise that leads to the picture, without guidance, which could not be inverted; then
        # part of the way to the noise of the seed.
        assert z0 is not None
        inverted, _ = sample(SAMPLERS["ddim_inversion"], predict(), z0, steps.inversion)
        x = slerp(inverted, x, inputs.variation)
    elif steps.level is not None:
        assert z0 is not None
        x = q_sample(model.schedule, z0, steps.level, x)

    options: dict[str, Any] = {
        "interval": None if inputs.interval is None else tuple(inputs.interval.T),
        "rescale": inputs.rescale,
        "renoise_null": config.renoise_null,
    }
    cache = FeatureCache(config.cache_interval) if config.cache_interval > 1 else None
    if cache is not None:  # which holds the features of all rows, the null conditions' too
        options |= {"cache": cache, "cache_depth": config.cache_depth, "skip": False}
    null = None if inputs.null is None else with_picture(inputs.null)
    state, start, stop = (sampler.init(x), x), steps.start, None
    if steps.part is not None:
        begin, (start, stop) = 0 if steps.start is None else steps.start, steps.part
        # One program for the first part and the others: the first ignores the state it is given.
        first = start <= begin
        state = jax.tree.map(lambda new, old: jnp.where(first, new, old), state, inputs.state)
    state, trace = advance(
        sampler,
        predict(null, inputs.guidance, **options),
        state,
        steps.nodes,
        schedule=model.schedule,
        keys=keys,
        noise_dropout=steps.noise_dropout,
        known=known,
        start=start,
        stop=stop,
        trace=bool(config.progress) or stop is not None,
        cache=cache,
    )
    z = state[1]
    if trace is not None and stop is not None:
        last = len(trace.x0)
        z = jnp.where(stop < last, trace.x0[jnp.minimum(stop, last) - 1], z)
        images, finite = finish(stage, z, inputs, config)
        return Pictures(images, None, z, finite, state)
    progress = None
    if trace is not None:
        # One after the other, so that the decoder is compiled once more and not once for each.
        shown = trace.x0[np.array(config.progress)][:, : config.progress_rows or len(x)]
        decoded = jax.lax.map(lambda z: finish(stage, z, inputs, config)[0], shown)
        progress = jnp.swapaxes(decoded, 0, 1)
    if not config.decodes:
        images = jnp.zeros((len(z), 0, 0, 3), jnp.uint8)
        return Pictures(images, progress, z, jnp.isfinite(z).all((1, 2, 3)))
    images, finite = finish(stage, z, inputs, config)
    return Pictures(images, progress, z, finite)


def correction(model: LatentDiffusion, inputs: Inputs) -> Correct | None:
    """Returns what the model's classifier changes of eps; None where it guides to no class."""
    classifier, labels, scale = model.classifier, inputs.labels, inputs.label_scale
    if classifier is None or labels is None or scale is None:
        return None

    def correct(eps: jax.Array, x: jax.Array, t: Array) -> jax.Array:
        # A sampler may have more rows than the request: the same pictures at several times.
        times = len(x) // len(labels)
        return classifier.corrected(eps, x, t, jnp.tile(labels, times), jnp.tile(scale, times))

    return correct


def finish(
    stage: FirstStage, z: jax.Array, inputs: Inputs, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Decodes latents; returns uint8 pictures, and whether their pixels are finite numbers [b]."""
    pixels = decode(stage, z, config.decode_batch, config.tile)
    finite = jnp.isfinite(pixels).all((1, 2, 3))
    if inputs.image is not None and inputs.mask is not None:  # the rest stays as it was
        pixels = jnp.where(inputs.mask[: len(z)] > 0, pixels, to_float(inputs.image[: len(z)]))
    return to_uint8(pixels), finite


def keys_of(seeds: jax.Array) -> jax.Array:
    """Returns one key for each seed, of uint32 [b] or of high and low words [b, 2]."""
    if seeds.ndim == 1:
        return jax.vmap(jax.random.key)(seeds)
    return jax.random.wrap_key_data(seeds, impl="threefry2x32")


def slerp(a: jax.Array, b: jax.Array, mix: jax.Array) -> jax.Array:
    """Interpolates [n, ...] along great circles, ``mix`` [n] of the way from ``a`` to ``b``.

    A point between two noises then has the norm of a noise.
    """
    axes = tuple(range(1, a.ndim))
    dot, aa, bb = ((u * v).sum(axes) for u, v in ((a, b), (a, a), (b, b)))
    angle = jnp.arccos(jnp.clip(dot / jnp.sqrt(aa * bb), -1.0, 1.0))
    sine = jnp.sin(angle)
    flat = sine < 1e-3  # nearly parallel: no circle is defined
    sine = jnp.where(flat, 1.0, sine)
    to_a = jnp.where(flat, 1 - mix, jnp.sin((1 - mix) * angle) / sine)
    to_b = jnp.where(flat, mix, jnp.sin(mix * angle) / sine)
    return lift(to_a, a) * a + lift(to_b, b) * b


def whole_cells(mask: jax.Array, f: int) -> jax.Array:
    """Reduces a mask of pixels [b, H, W, 1] to cells, float32 [b, H / f, W / f, 1].

    A cell is painted where any of its pixels is.
    """
    b, h, w, _ = mask.shape
    return jnp.max(mask.reshape(b, h // f, f, w // f, f, 1), (2, 4)).astype(jnp.float32)
