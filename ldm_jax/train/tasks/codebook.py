"""Codes that nothing chooses: how they are noticed, and how they start on encodings, at first and again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.train.state import TrainState

CANDIDATES = 16  # encodings of each picture, at least, that may become codes
MEMORY = 0.97  # decay of the average use of a code: about the last thirty steps
USED = 0.03  # a code that is chosen less than this, of an equal share, is dead


def used(usage: jax.Array, share: jax.Array) -> jax.Array:
    """The moving average of each code's use [n], in units of an equal share, after a batch in which it had ``share`` [n].

    At 1, as if all were in equal use, a code has 115 steps to be chosen before it dies: so begin codes that were trained, or put on encodings. New
    ones begin at 0, and die of the first batch if it did not choose them: the encoder would leave them behind before they were noticed.
    """
    return MEMORY * usage + (1 - MEMORY) * share * len(share)


def enough(codes: int, places: int, rows: int) -> int:
    """How many of a picture's ``places`` encodings suffice for all codes in a batch of ``rows`` pictures; at least `CANDIDATES`, if there are."""
    return min(places, max(CANDIDATES, -(-codes // rows)))


def spread(key: jax.Array, count: int, places: int) -> jax.Array:
    """``count`` different ones of ``places``, at equal distances, from a random one on."""
    return (jax.random.randint(key, (), 0, places) + jnp.arange(count) * (places // count)) % places


def restart_codes(
    state: TrainState,
    extra: dict[str, Any],
    candidates: jax.Array,
    key: jax.Array,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Any], jax.Array]:
    """(state, extra, how many) with dead codes put on encodings of this batch, each on another one, as far as there are enough.

    ``candidates`` [b, k, c] are this device's; all devices choose the same. The codebook is a parameter, then its average is set as well, or the
    collection of the EMA quantiser.
    """
    if axis_name is not None:
        candidates = jax.lax.all_gather(candidates, axis_name, tiled=True)
    flat = jax.random.permutation(key, candidates.reshape(-1, candidates.shape[-1]))
    dead = extra["usage"] < USED
    place = jnp.cumsum(dead) - 1
    new = dead & (place < len(flat))
    chosen = flat[jnp.clip(place, 0, len(flat) - 1)]

    def put(codes: jax.Array) -> jax.Array:
        return jnp.where(new[:, None], chosen, codes)

    def put_params(params: Any) -> Any:
        quantize = {**params["quantize"], "embedding": put(params["quantize"]["embedding"])}
        return {**params, "quantize": quantize}

    extra = extra | {"usage": jnp.where(new, 1.0, extra["usage"])}
    if "collections" in extra:
        book = extra["collections"]["codebook"]["quantize"]
        size = jnp.where(new, 1.0, book["cluster_size"])
        book = {
            "embedding": put(book["embedding"]),
            "embed_avg": put(book["embed_avg"]),
            "cluster_size": size,
        }
        extra["collections"] = {"codebook": {"quantize": book}}
    else:
        average = None if state.ema is None else put_params(state.ema)
        state = dataclasses.replace(state, params=put_params(state.params), ema=average)
    return state, extra, new.sum().astype(jnp.float32)
