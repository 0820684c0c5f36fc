"""What a person asks for -> what the UNet is told.

`Cond` has the three ways into a UNet that the family knows: cross-attention, channels concatenated to the input, and a vector added to the timestep
embedding. Unused ways are None, so that the original's conditioning keys (crossattn, concat, hybrid, adm) need no branches.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models.text import TransformerEncoder

LOG = logging.getLogger(__name__)
ASSETS = Path(__file__).parent / "assets"


@flax.struct.dataclass
class Cond:
    """crossattn [b, m, k]; concat [b, h, w, c] at the latent's size; vector [b] (class indices)."""

    crossattn: jax.Array | None = None
    concat: jax.Array | None = None
    vector: jax.Array | None = None


class Conditioner(Protocol):
    """Static and hashable. ``encode`` runs on the host and gives an array pytree; ``__call__`` runs inside the compiled program."""

    def init(self, key: jax.Array) -> dict:
        """Fresh parameters; {} when there are none."""
        ...

    def encode(self, captions: Sequence[str]) -> Any:
        """Host arrays [b, ...] from what the person gave, ready for ``__call__``."""
        ...

    def encode_null(self, n: int) -> Any:
        """Like ``encode``, of the condition that means "anything"."""
        ...

    def __call__(self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None) -> Cond:
        """The condition of b images."""
        ...


@lru_cache(maxsize=2)
def _bert_tokenizer(vocab: Path) -> Any:
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # it warns that PyTorch is missing, which is the point of this project
    from transformers import BertTokenizer

    return BertTokenizer(vocab=str(vocab), do_lower_case=True)


@dataclasses.dataclass(frozen=True)
class BertText:
    """Text through bert-base-uncased WordPieces, padded to ``max_length``, and a transformer trained with the UNet (the original's BERTEmbedder)."""

    module: TransformerEncoder

    @property
    def max_length(self) -> int:
        return self.module.max_seq_len

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> tokens int32 [b, max_length]: [CLS] words [SEP] padding. A caption too long is cut, with a warning that says what was cut."""
        tokenizer = _bert_tokenizer(ASSETS / "tokenizers" / "bert-base-uncased-vocab.txt")
        rows = tokenizer(list(captions), add_special_tokens=False)["input_ids"]
        tokens = np.full((len(rows), self.max_length), tokenizer.pad_token_id, np.int32)
        room = self.max_length - 2
        for i, row in enumerate(rows):
            if len(row) > room:
                cut = tokenizer.decode(row[room:])
                LOG.warning("prompt is %d tokens long, %d are read; cut: %r", len(row), room, cut)
            row = [tokenizer.cls_token_id, *row[:room], tokenizer.sep_token_id]
            tokens[i, : len(row)] = row
        return tokens

    def encode_null(self, n: int) -> np.ndarray:
        """The empty caption, n times."""
        return np.repeat(self.encode([""]), n, axis=0)

    def init(self, key: jax.Array) -> dict:
        variables: Any = self.module.init(key, jnp.zeros((1, self.max_length), jnp.int32))
        return variables["params"]

    def __call__(self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None) -> Cond:
        states: Any = self.module.apply({"params": params}, encoded, train=train, rngs=rngs)
        return Cond(crossattn=states)


@dataclasses.dataclass(frozen=True)
class Unconditional:
    """No condition at all."""

    def encode(self, captions: Sequence[str]) -> None:
        return None

    def encode_null(self, n: int) -> None:
        return None

    def init(self, key: jax.Array) -> dict:
        return {}

    def __call__(self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None) -> Cond:
        return Cond()


def bert(
    dim: int,
    depth: int,
    vocab_size: int = 30522,
    max_seq_len: int = 77,
    heads: int = 8,
    head_dim: int = 64,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> BertText:
    """The text conditioner of the original's text-to-image model (whose dim is 1280, depth 32)."""
    return BertText(TransformerEncoder(dim, depth, vocab_size, max_seq_len, heads, head_dim, dropout, dtype=dtype))


# kind -> from the other entries of a model config's "conditioner"
CONDITIONERS = {"bert": bert, "none": lambda dtype: Unconditional()}
