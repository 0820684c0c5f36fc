"""Tokenizers, made of the vocabularies that ship with the package."""

import gzip
import logging
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

LOG = logging.getLogger(__name__)
ASSETS = Path(__file__).parent.parent / "assets"


@lru_cache(maxsize=2)
def bert_tokenizer(vocab: Path = ASSETS / "tokenizers" / "bert-base-uncased-vocab.txt") -> Any:
    """Returns the tokenizer of bert-base-uncased (30522 entries); nothing is downloaded."""
    # It warns that PyTorch is missing, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import BertTokenizer

    return BertTokenizer(vocab=str(vocab), do_lower_case=True)


def _byte_symbols() -> list[str]:
    """Returns one character for each byte, in the order of byte-level BPE vocabularies (CLIP's)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = len(set(range(256)) - set(printable))
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(others)]


@lru_cache(maxsize=2)
def clip_tokenizer(
    merges_file: Path = ASSETS / "tokenizers" / "clip-bpe_simple_vocab_16e6.txt.gz",
) -> Any:
    """Returns CLIP's byte-pair tokenizer (49408 entries); nothing is downloaded."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import CLIPTokenizer

    symbols = _byte_symbols()
    # CLIP uses the first merges, up to a vocabulary of 49408; the first line is a version.
    lines = (
        gzip.decompress(merges_file.read_bytes())
        .decode("utf-8")
        .split("\n")[1 : 49408 - 2 * len(symbols) - 2 + 1]
    )
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    entries = [*symbols, *(s + "</w>" for s in symbols), *(left + right for left, right in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=merges)  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def bert_tokenizer_with(added_tokens: tuple[str, ...]) -> Any:
    """Returns the tokenizer of bert-base-uncased with further entries, numbered from 30522."""
    if not added_tokens:
        return bert_tokenizer()
    tokenizer = bert_tokenizer.__wrapped__()  # not the shared one
    tokenizer.add_tokens(list(added_tokens))
    return tokenizer


@lru_cache(maxsize=8)
def clip_tokenizer_with(added_tokens: tuple[str, ...]) -> Any:
    """Returns CLIP's tokenizer with further entries, numbered from 49408."""
    if not added_tokens:
        return clip_tokenizer()
    tokenizer = clip_tokenizer.__wrapped__()  # not the shared one
    tokenizer.add_tokens(list(added_tokens))
    return tokenizer


def tokens_of_word(word: str, count: int) -> tuple[str, ...]:
    """Returns the entries of the vocabulary of a word of ``count`` vectors: "x", "x_1" ..."""
    return (word, *(f"{word}_{i}" for i in range(1, count)))


def expand(caption: str, added_tokens: Sequence[str]) -> str:
    """Replaces an added token of several vectors, "x", by "x x_1 x_2 ...", as diffusers does.

    The longest token at a place counts, in any case, as for the tokenizer.
    """
    runs = {}
    for token in added_tokens:
        names, i = [token], 1
        while f"{token}_{i}" in added_tokens:
            names.append(f"{token}_{i}")
            i += 1
        runs[token.lower()] = " ".join(names)
    if not runs:
        return caption
    pattern = "|".join(re.escape(token) for token in sorted(added_tokens, key=len, reverse=True))
    return re.sub(pattern, lambda m: runs.get(m[0].lower(), m[0]), caption, flags=re.IGNORECASE)


def tokens_of(
    tokenizer: Any,
    captions: Sequence[str],
    length: int,
    start: int,
    end: int,
    pad: int | None = None,
) -> np.ndarray:
    """Tokenizes captions: start, words, end, padding.

    Captions that are too long are cut, with a warning that names the part cut off.

    Args:
      tokenizer: A tokenizer of `transformers`.
      captions: The captions.
      length: The number of tokens, padding included.
      start: The first token.
      end: The token after the words.
      pad: The token of the padding; None: the tokenizer's.

    Returns:
      int32 [b, length].
    """
    rows = tokenizer(list(captions), add_special_tokens=False)["input_ids"]
    tokens = np.full((len(rows), length), tokenizer.pad_token_id if pad is None else pad, np.int32)
    room = length - 2
    for i, row in enumerate(rows):
        if len(row) > room:
            cut = tokenizer.decode(row[room:])
            LOG.warning(
                "prompt of %d tokens: the last %d are cut: %r", len(row), len(row) - room, cut
            )
        row = [start, *row[:room], end]
        tokens[i, : len(row)] = row
    return tokens
