"""Captions as the context of cross-attention."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from ldm_jax.conditioning.base import Cond, Conditioner, Rows, some
from ldm_jax.conditioning.prompts import Chunks, chunks_of, emphasised, padded, parse_weights
from ldm_jax.conditioning.tokenizers import (
    bert_tokenizer_with,
    clip_tokenizer_with,
    expand,
    tokens_of,
)
from ldm_jax.models.bert import TransformerEncoder
from ldm_jax.models.clip import CLIPText

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Text(Conditioner):
    """Base of text conditions: a tokenizer and a text encoder ``module``.

    Attributes:
      module: The text encoder.
      weighted: Whether prompts have weights and any length (`ldm_jax.conditioning.prompts`).
        `encode` then returns {"tokens", "weights"} [b, k, m] of k chunks. Training ignores it.
      added_tokens: Entries after the tokenizer's own vocabulary, with rows of their own in the
        encoder's table (textual inversion).
      table: The name of that table's parameters.
    """

    module: Any
    weighted: bool = False
    added_tokens: tuple[str, ...] = ()

    field = "prompts"
    negative = True
    interpolates = True
    argument = "tokens"
    markers: ClassVar[tuple[str, str]]  # the tokenizer's attributes of the first and last token
    table: ClassVar[str]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of `transformers`."""
        raise NotImplementedError

    @property
    def max_length(self) -> int:
        """The number of tokens, padding included."""
        raise NotImplementedError

    @property
    def padding(self) -> int:
        """The token of the padding."""
        return self.tokenizer.pad_token_id

    def init(self, key: jax.Array) -> dict:
        """Returns fresh parameters."""
        return dict(self.module.init(key, np.zeros((1, self.max_length), np.int32))["params"])

    @property
    def towers(self) -> Mapping[str, Any]:
        """Itself, the sole tower."""
        return {"": self}

    def expanded(self, caption: str) -> str:
        """Returns a caption in which added tokens of several vectors are followed by the others."""
        return expand(caption, self.added_tokens)

    def extended_fields(self, tokens: Sequence[str]) -> dict[str, Any]:
        """Returns the fields of its section that change where ``tokens`` follow the vocabulary."""
        return {
            "vocab_size": self.module.vocab_size + len(tokens),
            "added_tokens": [*self.added_tokens, *tokens],
        }

    def encode(self, values: Sequence[str]) -> Any:
        """Tokenizes captions: start, words, end, padding.

        A caption that is too long is cut, with a warning that names the part cut off.

        Returns:
          int32 [b, max_length]; or {"tokens", "weights"} [b, k, max_length] where ``weighted``.
        """
        if self.weighted:
            rows = [self._chunks(value) for value in values]
            alone = [{"tokens": r.tokens[None], "weights": r.weights[None]} for r in rows]
            return jax.tree.map(lambda *parts: np.concatenate(parts), *self.aligned(alone))
        first, last = (getattr(self.tokenizer, name) for name in self.markers)
        values = [self.expanded(value) for value in values]
        return tokens_of(self.tokenizer, values, self.max_length, first, last, self.padding)

    def encode_null(self, n: int) -> Any:
        """Returns the empty caption, ``n`` times."""
        return jax.tree.map(lambda row: np.repeat(row, n, axis=0), self.encode([""]))

    def aligned(self, encoded: Sequence[Any]) -> list[Any]:
        """Returns weighted prompts with as many chunks each; the empty caption fills them up."""
        if not self.weighted:
            return list(encoded)
        k = max(one["tokens"].shape[1] for one in encoded)
        empty = self._chunks("")

        def filled(array: np.ndarray, row: np.ndarray) -> np.ndarray:
            b, own, m = array.shape
            return np.concatenate([array, np.broadcast_to(row, (b, k - own, m))], axis=1)

        return [
            {
                "tokens": filled(one["tokens"], empty.tokens),
                "weights": filled(one["weights"], empty.weights),
            }
            for one in encoded
        ]

    def _chunks(self, prompt: str) -> Chunks:
        """Reads a prompt with weights."""
        tokenizer, first, last = self.tokenizer, *self.markers
        parts = []
        for text, weight in parse_weights(prompt):
            if text is not None:
                text = tokenizer(self.expanded(text), add_special_tokens=False)["input_ids"]
            parts.append((text, weight))
        comma = tokenizer(",", add_special_tokens=False)["input_ids"]
        chunks = chunks_of(parts, self.max_length - 2, comma[0], self._runs())
        start, end = getattr(tokenizer, first), getattr(tokenizer, last)
        return padded(chunks, self.max_length, start, end, self.padding)

    def _runs(self) -> dict[int, int]:
        """Returns {first token: number of tokens} of added words of several vectors."""
        first = len(self.tokenizer) - len(self.added_tokens)
        return {
            first + i: len(expand(token, self.added_tokens).split())
            for i, token in enumerate(self.added_tokens)
        }

    def tokenizer_json(self) -> str | None:
        """Returns a `tokenizers.Tokenizer` as JSON that encodes a caption as `encode` does."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.enable_truncation(self.max_length)
        pad_token = self.tokenizer.convert_ids_to_tokens(self.padding)
        tokenizer.enable_padding(length=self.max_length, pad_id=self.padding, pad_token=pad_token)
        return tokenizer.to_str()

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes the captions of a batch, without weights."""
        if "encoded" in raw:
            return super().encode_rows(raw)
        return {"encoded": dataclasses.replace(self, weighted=False).encode(raw["caption"])}

    def cache_fields(self) -> dict[str, dict[str, Any]]:
        """Returns the tokens' shape."""
        return {"encoded": {"dtype": "int32", "shape": (self.max_length,)}}

    def cache_key(self) -> dict[str, Any]:
        """Returns the number of tokens, and the added ones."""
        added = {"added tokens": list(self.added_tokens)} if self.added_tokens else {}
        return {"tokens per caption": self.max_length, **added}

    def row_problems(self, rows: Rows, column: str, few: int) -> Iterator[str]:
        """Yields captions that are empty, too long, or not in the vocabulary."""
        captions = rows.captions
        n, known = len(captions), sorted(set(captions))
        LOG.info("%d different captions", len(known))
        if empty := [rows.name(i) for i, text in enumerate(captions) if not text.strip()]:
            yield f"{len(empty)} of {n} captions are empty ({some(empty)})"
        room = self.max_length - 2
        listed = self.tokenizer(known, add_special_tokens=False)["input_ids"] if known else []
        ids = dict(zip(known, listed, strict=True))
        if long := [repr(c) for c in captions if len(ids[c]) > room]:
            yield (
                f"{len(long)} of {n} captions are cut after {room} tokens, "
                f"model.conditioner.max_seq_len - 2 ({some(long)})"
            )
        unknown, end = self.tokenizer.unk_token_id, getattr(self.module, "vocab_size", 1 << 31)
        if strange := [repr(c) for c in captions if any(i == unknown or i >= end for i in ids[c])]:
            yield (
                f"{len(strange)} of {n} captions have tokens that the model does not know "
                f"({some(strange)})"
            )


def context_of(encoded: Any, states: Callable[[Any], Any]) -> Any:
    """Returns the context [b, k m, c] of k chunks that `Text.encode` made.

    Args:
      encoded: Tokens int32 [b, m], or {"tokens", "weights"} [b, k, m].
      states: Tokens int32 [n, m] -> states [n, m, c].
    """
    if not isinstance(encoded, Mapping):
        return states(encoded)
    b, k, m = encoded["tokens"].shape
    found = states(encoded["tokens"].reshape(b * k, m)).reshape(b, k, m, -1)
    return emphasised(found, encoded["weights"]).reshape(b, k * m, -1)


@dataclasses.dataclass(frozen=True)
class BertText(Text):
    """WordPieces of bert-base-uncased and a transformer trained with the UNet (BERTEmbedder)."""

    module: TransformerEncoder

    network = TransformerEncoder
    markers = ("cls_token_id", "sep_token_id")
    table = "token_emb"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of bert-base-uncased, with the added tokens."""
        return bert_tokenizer_with(self.added_tokens)

    @property
    def max_length(self) -> int:
        """The number of tokens, padding included."""
        return self.module.max_seq_len

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Encodes tokens int32 [b, m] as the context [b, m, k]."""

        def states(tokens: Any) -> Any:
            return self.module.apply({"params": params}, tokens, train=train, rngs=rngs)

        return Cond(crossattn=context_of(encoded, states))


@dataclasses.dataclass(frozen=True)
class ClipText(Text):
    """CLIP's tokenizer and text tower, as in Stable Diffusion v1 (FrozenCLIPEmbedder).

    Attributes:
      module: The text tower.
      pad_token_id: The token of the padding; None: the end token. Stable Diffusion 2.x pads with 0.
      clip_skip: The context is the state after this layer from the end, 1 for the last one.
    """

    module: CLIPText
    pad_token_id: int | None = None
    clip_skip: int = 1

    network = CLIPText
    markers = ("bos_token_id", "eos_token_id")
    table = "token_embedding"

    def __post_init__(self) -> None:
        layers = self.module.num_hidden_layers
        if not 1 <= self.clip_skip <= layers:
            raise ValueError(f"clip_skip must be from 1 to {layers}, not {self.clip_skip}")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of CLIP, with the added tokens."""
        return clip_tokenizer_with(self.added_tokens)

    @property
    def padding(self) -> int:
        """The token of the padding."""
        return self.tokenizer.pad_token_id if self.pad_token_id is None else self.pad_token_id

    def extended_fields(self, tokens: Sequence[str]) -> dict[str, Any]:
        """Returns the changed fields; the end token stays the last of the old vocabulary.

        It is pooled by its number from then on, because the new tokens have higher ones.
        """
        fields = super().extended_fields(tokens)
        if self.module.eos_token_id is None:
            fields["eos_token_id"] = self.module.vocab_size - len(self.added_tokens) - 1
        return fields

    @property
    def max_length(self) -> int:
        """The number of tokens, padding included."""
        return self.module.max_position_embeddings

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Encodes tokens int32 [b, m] as the context [b, m, k]."""
        module = self.module
        if self.clip_skip > 1:  # the last layers keep their parameters, for LoRA files
            module = module.clone(num_hidden_layers=module.num_hidden_layers + 1 - self.clip_skip)

        def states(tokens: Any) -> Any:
            found: Any = module.apply({"params": params}, tokens)
            return found.last

        return Cond(crossattn=context_of(encoded, states))
