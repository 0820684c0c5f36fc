"""Dead codes of a codebook: how they are detected, and restarted on encodings of the batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.train.state import TrainState

MIN_CANDIDATES = 16  # encodings per picture, at least, that may become codes
USAGE_DECAY = 0.97  # of a code's average use: about the last thirty steps
DEAD = 0.03  # a code is dead below this use, in units of an equal share


def update_usage(usage: jax.Array, share: jax.Array) -> jax.Array:
    """Returns the moving average of each code's use [n], in units of an equal share.

    A trained or restarted code begins at 1 and has 115 steps to be chosen before it is dead. A new
    code begins at 0 and is dead unless the first batch chooses it: the encoder would leave it
    behind before its average fell.

    Args:
      usage: The average before, [n].
      share: The share of a batch's encodings that chose each code, [n].
    """
    return USAGE_DECAY * usage + (1 - USAGE_DECAY) * share * len(share)


def candidate_count(codes: int, places: int, rows: int) -> int:
    """Returns how many of a picture's encodings are candidates: enough for all codes.

    Args:
      codes: Size of the codebook.
      places: Encodings of a picture.
      rows: Pictures of a batch.
    """
    return min(places, max(MIN_CANDIDATES, -(-codes // rows)))


def candidate_places(key: jax.Array, count: int, places: int) -> jax.Array:
    """Returns ``count`` different places of ``places``, evenly spaced from a random start."""
    return (jax.random.randint(key, (), 0, places) + jnp.arange(count) * (places // count)) % places


def restart_codes(
    state: TrainState,
    extra: dict[str, Any],
    candidates: jax.Array,
    key: jax.Array,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Any], jax.Array]:
    """Moves dead codes to encodings of this batch, each to another one, as far as they suffice.

    Args:
      state: The state; a codebook that is a parameter is moved there, in the average too.
      extra: Has "usage", and in "collections" the codebook of the EMA quantiser.
      candidates: This device's encodings [b, k, c].
      key: The same on all devices, so that all choose the same.
      axis_name: Of the devices of a pmap.

    Returns:
      (state, extra, number of restarted codes).
    """
    if axis_name is not None:
        candidates = jax.lax.all_gather(candidates, axis_name, tiled=True)
    flat = jax.random.permutation(key, candidates.reshape(-1, candidates.shape[-1]))
    dead = extra["usage"] < DEAD
    place = jnp.cumsum(dead) - 1
    new = dead & (place < len(flat))
    chosen = flat[jnp.clip(place, 0, len(flat) - 1)]

    def restart(codes: jax.Array) -> jax.Array:
        return jnp.where(new[:, None], chosen, codes)

    def restart_params(params: Any) -> Any:
        quantize = params["quantize"]
        return {
            **params,
            "quantize": {**quantize, "embedding": restart(quantize["embedding"])},
        }

    extra = extra | {"usage": jnp.where(new, 1.0, extra["usage"])}
    if "collections" in extra:
        book = extra["collections"]["codebook"]["quantize"]
        book = {
            "embedding": restart(book["embedding"]),
            "embed_avg": restart(book["embed_avg"]),
            "cluster_size": jnp.where(new, 1.0, book["cluster_size"]),
        }
        extra["collections"] = {"codebook": {"quantize": book}}
    else:
        average = None if state.ema is None else restart_params(state.ema)
        state = dataclasses.replace(state, params=restart_params(state.params), ema=average)
    return state, extra, new.sum().astype(jnp.float32)
