r"""Prompts with weights, and of any length, as Stable Diffusion's web UI (A1111) reads them.

    (word)        1.1 times the weight; ((word)) 1.21 times
    [word]        1 / 1.1 times the weight
    (word:1.3)    1.3 times the weight
    \( \) \[ \]   the brackets themselves
    BREAK         the rest begins a new chunk

A prompt is cut into chunks, each of which the text encoder reads by itself; their states follow
one another in the context. Where a chunk would end within a phrase, it ends at the last comma, if
that is among its last `BACKTRACK` tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

BACKTRACK = 20
_UP, _DOWN = 1.1, 1 / 1.1
# An escaped character; a bracket, or a weight with its bracket; BREAK; other characters.
_PIECE = re.compile(
    r"\\(?P<escaped>[\\()\[\]])|(?P<weight>:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\))|(?P<bracket>[()\[\]])"
    r"|\s*\b(?P<stop>BREAK)\b\s*|(?P<text>[^\\()\[\]:B]+|.)",
    re.DOTALL,
)


class Part(NamedTuple):
    """A piece of a prompt with one weight; ``text`` None is a BREAK."""

    text: str | None
    weight: float = 1.0


def parse_weights(prompt: str) -> list[Part]:
    """Returns the parts of a prompt; neighbours of one weight are one part.

    Brackets that are never closed count to the end; closing brackets without an opening one are
    text.
    """
    parts: list[Part] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the parts where brackets begin

    def scale(start: int, factor: float) -> None:
        parts[start:] = [part._replace(weight=part.weight * factor) for part in parts[start:]]

    for piece in _PIECE.finditer(prompt):
        bracket = piece["bracket"]
        if piece["stop"]:
            parts.append(Part(None))
        elif bracket in opened:
            opened[bracket].append(len(parts))
        elif piece["weight"] and opened["("]:
            scale(opened["("].pop(), float(piece["weight"][1:-1]))
        elif bracket == ")" and opened["("]:
            scale(opened["("].pop(), _UP)
        elif bracket == "]" and opened["["]:
            scale(opened["["].pop(), _DOWN)
        else:
            parts.append(Part(piece["escaped"] or piece[0]))
    for starts, factor in ((opened["("], _UP), (opened["["], _DOWN)):
        for start in starts:
            scale(start, factor)
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else Part(None)
        if part.text is None or last.text is None or last.weight != part.weight:
            merged.append(part)
        else:
            merged[-1] = Part(last.text + part.text, part.weight)
    return merged


class Chunks(NamedTuple):
    """A prompt for a text encoder, with m tokens in each of k chunks.

    Attributes:
      tokens: int32 [k, m]: start, words, end, padding.
      weights: float32 [k, m].
    """

    tokens: np.ndarray
    weights: np.ndarray


def chunks_of(
    parts: Sequence[tuple[Sequence[int] | None, float]],
    room: int,
    comma: int | None,
    runs: Mapping[int, int] | None = None,
) -> list[list[tuple[int, float]]]:
    """Divides the tokens of a prompt into chunks of at most ``room``.

    Args:
      parts: (tokens, weight); None for a BREAK.
      room: The tokens of a chunk, without start and end.
      comma: The token at which a chunk preferably ends.
      runs: {first token: number of tokens} of words that are not divided.

    Returns:
      (token, weight) of each chunk, one chunk at least.
    """
    chunks: list[list[tuple[int, float]]] = [[]]
    last_comma = None
    for tokens, weight in parts:
        if tokens is None:
            chunks.append([])
            last_comma = None
            continue
        for token in tokens:
            chunk = chunks[-1]
            needed = min((runs or {}).get(token, 1), room)
            if len(chunk) + needed > room:
                rest: list[tuple[int, float]] = []
                near = last_comma is not None and room - last_comma <= BACKTRACK
                if near and needed == 1 and token != comma:
                    assert last_comma is not None
                    rest = chunk[last_comma + 1 :]
                    del chunk[last_comma + 1 :]
                chunk = rest
                chunks.append(chunk)
                last_comma = None
            if token == comma:
                last_comma = len(chunk)
            chunk.append((token, weight))
    # A BREAK begins a chunk only where something follows.
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def padded(
    chunks: Sequence[Sequence[tuple[int, float]]], length: int, start: int, end: int, pad: int
) -> Chunks:
    """Returns chunks with start, end and padding, whose weights are 1."""
    tokens = np.full((len(chunks), length), pad, np.int32)
    weights = np.ones((len(chunks), length), np.float32)
    for i, chunk in enumerate(chunks):
        tokens[i, : len(chunk) + 2] = [start, *(token for token, _ in chunk), end]
        weights[i, 1 : len(chunk) + 1] = [weight for _, weight in chunk]
    return Chunks(tokens, weights)


def emphasised(states: Any, weights: Any) -> Any:
    """Returns states times their weights, with the mean of each chunk as it was.

    Args:
      states: [b, k, m, c].
      weights: float32 [b, k, m].
    """
    scaled = states * weights[..., None].astype(states.dtype)
    before, after = (x.astype(jnp.float32).mean((2, 3), keepdims=True) for x in (states, scaled))
    # A mean that is but rounding is left alone, and so are chunks without weights.
    noise = 1e-4 * jnp.abs(scaled).astype(jnp.float32).mean((2, 3), keepdims=True)
    plain = (weights == 1).all(axis=2)[:, :, None, None] | (jnp.abs(after) <= noise)
    ratio = jnp.where(plain, 1.0, before / jnp.where(plain, 1.0, after))
    return scaled * ratio.astype(states.dtype)
