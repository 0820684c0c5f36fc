"""Captions as the context of cross-attention."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ldm_jax.conditioning.base import Cond, Conditioner, Rows, some
from ldm_jax.conditioning.tokenizers import bert_tokenizer, clip_tokenizer_with, expand, tokens_of
from ldm_jax.models.bert import TransformerEncoder
from ldm_jax.models.clip import CLIPText

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Text(Conditioner):
    """Base of text conditions: a tokenizer and a text encoder ``module``."""

    module: Any

    field = "prompts"
    negative = True
    interpolates = True
    argument = "tokens"
    markers: ClassVar[tuple[str, str]]  # the tokenizer's attributes of the first and last token

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

    def encode(self, values: Sequence[str]) -> np.ndarray:
        """Tokenizes captions: start, words, end, padding.

        A caption that is too long is cut, with a warning that names the part cut off.

        Returns:
          int32 [b, max_length].
        """
        first, last = (getattr(self.tokenizer, name) for name in self.markers)
        return tokens_of(self.tokenizer, values, self.max_length, first, last, self.padding)

    def encode_null(self, n: int) -> np.ndarray:
        """Returns the tokens of the empty caption, ``n`` times."""
        return np.repeat(self.encode([""]), n, axis=0)

    def tokenizer_json(self) -> str | None:
        """Returns a `tokenizers.Tokenizer` as JSON that encodes a caption as `encode` does."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.enable_truncation(self.max_length)
        pad_token = self.tokenizer.convert_ids_to_tokens(self.padding)
        tokenizer.enable_padding(length=self.max_length, pad_id=self.padding, pad_token=pad_token)
        return tokenizer.to_str()

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes the captions of a batch."""
        return super().encode_rows(raw if "encoded" in raw else {"condition": raw["caption"]})

    def cache_fields(self) -> dict[str, dict[str, Any]]:
        """Returns the tokens' shape."""
        return {"encoded": {"dtype": "int32", "shape": (self.max_length,)}}

    def cache_key(self) -> dict[str, Any]:
        """Returns the number of tokens."""
        return {"tokens per caption": self.max_length}

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


@dataclasses.dataclass(frozen=True)
class BertText(Text):
    """WordPieces of bert-base-uncased and a transformer trained with the UNet (BERTEmbedder)."""

    module: TransformerEncoder

    network = TransformerEncoder
    markers = ("cls_token_id", "sep_token_id")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of bert-base-uncased."""
        return bert_tokenizer()

    @property
    def max_length(self) -> int:
        """The number of tokens, padding included."""
        return self.module.max_seq_len

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Encodes tokens int32 [b, m] as the context [b, m, k]."""
        states: Any = self.module.apply({"params": params}, encoded, train=train, rngs=rngs)
        return Cond(crossattn=states)


@dataclasses.dataclass(frozen=True)
class ClipText(Text):
    """CLIP's tokenizer and text tower, as in Stable Diffusion v1 (FrozenCLIPEmbedder).

    Attributes:
      module: The text tower.
      pad_token_id: The token of the padding; None: the end token. Stable Diffusion 2.x pads with 0.
      added_tokens: Entries after CLIP's vocabulary, with rows of their own in the tower's table
        (textual inversion).
    """

    module: CLIPText
    pad_token_id: int | None = None
    added_tokens: tuple[str, ...] = ()

    network = CLIPText
    markers = ("bos_token_id", "eos_token_id")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of CLIP, with the added tokens."""
        return clip_tokenizer_with(self.added_tokens)

    @property
    def padding(self) -> int:
        """The token of the padding."""
        return self.tokenizer.pad_token_id if self.pad_token_id is None else self.pad_token_id

    def encode(self, values: Sequence[str]) -> np.ndarray:
        """Tokenizes captions, as `Text.encode`; an added token may stand for several vectors."""
        return super().encode([expand(value, self.added_tokens) for value in values])

    @property
    def max_length(self) -> int:
        """The number of tokens, padding included."""
        return self.module.max_position_embeddings

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Encodes tokens int32 [b, m] as the context [b, m, k]."""
        states: Any = self.module.apply({"params": params}, encoded)
        return Cond(crossattn=states.last)
