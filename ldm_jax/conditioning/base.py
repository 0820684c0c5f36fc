"""What a person asks for -> what the UNet is told.

`Cond` has the three ways into a UNet that the family knows: cross-attention, channels concatenated to the input, and a vector added to the timestep
embedding. Unused ways are None, so that the original's conditioning keys (crossattn, concat, hybrid, adm) need no branches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.tokenizers import bert_tokenizer, clip_tokenizer, tokens_of
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.embedders import ClassEmbedder, SpatialRescaler
from ldm_jax.models.text import TransformerEncoder


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

    def encode(self, given: Sequence[Any]) -> Any:
        """Host arrays [b, ...] from what the person gave (captions, labels, maps ...), ready for ``__call__``."""
        ...

    def encode_null(self, n: int) -> Any:
        """Like ``encode``, of the condition that means "anything"."""
        ...

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """The condition of b images."""
        ...


@dataclasses.dataclass(frozen=True)
class BertText:
    """Text through bert-base-uncased WordPieces, padded to ``max_length``, and a transformer trained with the UNet (the original's BERTEmbedder)."""

    module: TransformerEncoder

    @property
    def max_length(self) -> int:
        return self.module.max_seq_len

    @property
    def tokenizer(self) -> Any:
        """Transformers' own."""
        return bert_tokenizer()

    def encode(self, given: Sequence[str]) -> np.ndarray:
        """Captions -> tokens int32 [b, max_length]: [CLS] words [SEP] padding. A caption too long is cut, with a warning that says what was cut."""
        tokenizer = self.tokenizer
        return tokens_of(
            tokenizer, given, self.max_length, tokenizer.cls_token_id, tokenizer.sep_token_id
        )

    def encode_null(self, n: int) -> np.ndarray:
        """The empty caption, n times."""
        return np.repeat(self.encode([""]), n, axis=0)

    def init(self, key: jax.Array) -> dict:
        variables: Any = self.module.init(key, jnp.zeros((1, self.max_length), jnp.int32))
        return variables["params"]

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        states: Any = self.module.apply({"params": params}, encoded, train=train, rngs=rngs)
        return Cond(crossattn=states)


@dataclasses.dataclass(frozen=True)
class BertTokens(BertText):
    """Ready-made tokens through the same transformer: codes of boxes, say (the original's BERTEmbedder without tokenizer)."""

    def encode(self, given: Sequence[Sequence[int]]) -> np.ndarray:  # type: ignore[override]
        """Rows of ``max_length`` tokens each -> int32 [b, max_length]; ValueError where they are not that or not in the vocabulary."""
        tokens = np.asarray(given, np.int32)
        if tokens.ndim != 2 or tokens.shape[1] != self.max_length:
            raise ValueError(f"tokens of shape {tokens.shape}, expected rows of {self.max_length}")
        if tokens.min() < 0 or tokens.max() >= self.module.vocab_size:
            raise ValueError(f"tokens must be from 0 to {self.module.vocab_size - 1}")
        return tokens

    def encode_null(self, n: int) -> np.ndarray:
        """Zeros."""
        return np.zeros((n, self.max_length), np.int32)


@dataclasses.dataclass(frozen=True)
class ClipText:
    """Text through CLIP's tokenizer and text tower, as in Stable Diffusion v1 (the original's FrozenCLIPEmbedder)."""

    module: CLIPText

    @property
    def max_length(self) -> int:
        return self.module.max_position_embeddings

    @property
    def tokenizer(self) -> Any:
        """Transformers' own."""
        return clip_tokenizer()

    def encode(self, given: Sequence[str]) -> np.ndarray:
        """Captions -> tokens int32 [b, max_length]: 49406, words, 49407 to the end. What is too long is cut, with a warning that says what."""
        tokenizer = self.tokenizer
        return tokens_of(
            tokenizer, given, self.max_length, tokenizer.bos_token_id, tokenizer.eos_token_id
        )

    def encode_null(self, n: int) -> np.ndarray:
        """The empty caption, n times."""
        return np.repeat(self.encode([""]), n, axis=0)

    def init(self, key: jax.Array) -> dict:
        variables: Any = self.module.init(key, jnp.zeros((1, self.max_length), jnp.int32))
        return variables["params"]

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        states: Any = self.module.apply({"params": params}, encoded)
        return Cond(crossattn=states.last)


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    """A class as one context token. The last class is the null one where a model is trained for guidance (the original's cin256-v2: 1000 of 1001)."""

    module: ClassEmbedder

    def encode(self, given: Sequence[int | str]) -> np.ndarray:
        """Labels -> int32 [b]; ValueError where one is not a class."""
        labels = np.asarray([int(label) for label in given], np.int32)
        if len(labels) and (labels.min() < 0 or labels.max() >= self.module.n_classes):
            raise ValueError(f"labels must be from 0 to {self.module.n_classes - 1}")
        return labels

    def encode_null(self, n: int) -> np.ndarray:
        return np.full(n, self.module.n_classes - 1, np.int32)

    def init(self, key: jax.Array) -> dict:
        variables: Any = self.module.init(key, jnp.zeros(1, jnp.int32))
        return variables["params"]

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        token: Any = self.module.apply({"params": params}, encoded)
        return Cond(crossattn=token)


@dataclasses.dataclass(frozen=True)
class RescaledMap:
    """A map (of labels, one-hot; a small picture) brought to the latent's size and joined to it (the original's SpatialRescaler).

    ``size``: height and width of the maps in pixels, for `encode_null`.
    """

    module: SpatialRescaler
    size: tuple[int, int] = (256, 256)

    def encode(self, given: Sequence[Any]) -> np.ndarray:
        """Maps [h, w, in_channels], all of one size -> float32 [b, h, w, in_channels]; ValueError for other channels.

        Or labels, whole numbers [h, w] -> int32 [b, h, w], which become one-hot on the device (-1: no label); ValueError where one is no channel.
        """
        maps = np.asarray(given)
        if maps.ndim == 3 and np.issubdtype(maps.dtype, np.integer):
            if maps.min() < -1 or maps.max() >= self.module.in_channels:
                raise ValueError(f"labels must be from 0 to {self.module.in_channels - 1}, or -1")
            return maps.astype(np.int32)
        maps = maps.astype(np.float32)
        if maps.ndim != 4 or maps.shape[-1] != self.module.in_channels:
            raise ValueError(
                f"maps of shape {maps.shape}, expected [b, h, w, {self.module.in_channels}]"
            )
        return maps

    def encode_null(self, n: int) -> np.ndarray:
        """Zeros."""
        return np.zeros((n, *self.size, self.module.in_channels), np.float32)

    def no_labels(self, n: int) -> np.ndarray:
        """Like `encode_null`, as labels: int32 [n, h, w] of -1."""
        return np.full((n, *self.size), -1, np.int32)

    def init(self, key: jax.Array) -> dict:
        variables: Any = self.module.init(key, self.encode_null(1))
        return dict(variables.get("params", {}))

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        maps = jax.nn.one_hot(encoded, self.module.in_channels) if encoded.ndim == 3 else encoded
        small: Any = self.module.apply({"params": params}, maps)
        return Cond(concat=small)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Channels joined to the latent as they are.

    ``of`` says what they are: a "picture" of the latent's size (the original's super-resolution), or what `ldm_jax.models.ldm.masked_condition` makes of
    a picture and its mask, "masked" (the original's inpainting), "masked_sd" (Stable Diffusion's) or "masked_filled" (our own). ``size``: height and
    width of the latents, for `encode_null`.
    """

    channels: int
    of: Literal["picture", "masked", "masked_sd", "masked_filled"] = "picture"
    size: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if self.of not in get_args(Joined.__annotations__["of"]):
            raise ValueError(
                f"of {self.of!r} is neither 'picture' nor 'masked', 'masked_sd' or 'masked_filled'"
            )

    @property
    def masked(self) -> bool:
        """Whether they are made of a picture and its mask, by the first stage inside the compiled program."""
        return self.of != "picture"

    def encode(self, given: Sequence[Any]) -> np.ndarray:
        """Arrays [h, w, channels], all of one size -> float32 [b, h, w, channels]; ValueError for other channels."""
        arrays = np.asarray(given, np.float32)
        if arrays.ndim != 4 or arrays.shape[-1] != self.channels:
            raise ValueError(f"arrays of shape {arrays.shape}, expected [b, h, w, {self.channels}]")
        return arrays

    def encode_null(self, n: int) -> np.ndarray:
        """Zeros."""
        return np.zeros((n, *self.size, self.channels), np.float32)

    def init(self, key: jax.Array) -> dict:
        return {}

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        return Cond(concat=encoded)


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """Text as the context and channels joined to the latent (Stable Diffusion's inpainting). Its parameters are those of the text.

    What is encoded is {"text", "joined"}, as each of them encodes it. Guidance leads away from another text, with the same channels.
    """

    text: BertText | ClipText
    joined: Joined

    @property
    def module(self) -> TransformerEncoder | CLIPText:
        """The text encoder."""
        return self.text.module

    def encode(self, given: Sequence[tuple[str, Any]]) -> dict[str, np.ndarray]:
        """Captions with arrays [h, w, channels]."""
        captions, arrays = zip(*given, strict=True)
        return {"text": self.text.encode(captions), "joined": self.joined.encode(arrays)}

    def encode_null(self, n: int) -> dict[str, np.ndarray]:
        """The empty caption, and zeros."""
        return {"text": self.text.encode_null(n), "joined": self.joined.encode_null(n)}

    def init(self, key: jax.Array) -> dict:
        return self.text.init(key)

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        text = self.text(params, encoded["text"], train=train, rngs=rngs)
        return Cond(crossattn=text.crossattn, concat=encoded["joined"])


def joined_of(conditioner: Any) -> Joined | None:
    """What a conditioner joins to the latent as it is, if anything."""
    part = conditioner.joined if isinstance(conditioner, Hybrid) else conditioner
    return part if isinstance(part, Joined) else None


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Ready-made vectors as the context: CLIP's of a prompt, of retrieved neighbours (the original's retrieval-augmented models).

    ``dim``: of a vector. ``count``: how many a picture has in training and in `encode_null`; sampling takes any number of them.
    """

    dim: int
    count: int = 1

    def __post_init__(self) -> None:
        if min(self.dim, self.count) < 1:
            raise ValueError(f"dim {self.dim} and count {self.count} must be at least 1")

    def encode(self, given: Sequence[Any]) -> np.ndarray:
        """Arrays [m, dim], all of one m, or [dim], one vector each -> float32 [b, m, dim]; ValueError for others, or for what is not finite."""
        shapes = {np.shape(one) for one in given}
        if len(shapes) > 1:
            raise ValueError(
                f"embeddings of the shapes {' and '.join(map(str, sorted(shapes)))}: all need equally many"
            )
        vectors = np.asarray(given, np.float32)
        vectors = vectors[:, None] if vectors.ndim == 2 else vectors
        if vectors.ndim != 3 or vectors.shape[-1] != self.dim or not vectors.size:
            raise ValueError(f"embeddings of shape {vectors.shape[1:]}, expected (m, {self.dim})")
        if not np.isfinite(vectors).all():
            raise ValueError("embeddings must be finite numbers")
        return vectors

    def encode_null(self, n: int) -> np.ndarray:
        """Zeros."""
        return np.zeros((n, self.count, self.dim), np.float32)

    def init(self, key: jax.Array) -> dict:
        return {}

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        return Cond(crossattn=encoded)


@dataclasses.dataclass(frozen=True)
class Unconditional:
    """No condition at all."""

    def encode(self, given: Sequence[Any]) -> None:
        return None

    def encode_null(self, n: int) -> None:
        return None

    def init(self, key: jax.Array) -> dict:
        return {}

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        return Cond()


def bert(
    dim: int,
    depth: int,
    vocab_size: int = 30522,
    max_seq_len: int = 77,
    heads: int = 8,
    head_dim: int = 64,
    dropout: float = 0.0,
    embed_std: float = 0.02,
    with_logits: bool = False,
    dtype: Any = jnp.float32,
) -> BertText:
    """The text conditioner of the original's text-to-image model (whose dim is 1280, depth 32).

    ``with_logits``: its parameters hold the projection to the vocabulary that the original keeps and does not use.
    """
    fields = (dim, depth, vocab_size, max_seq_len, heads, head_dim, dropout)
    return BertText(
        TransformerEncoder(*fields, with_logits=with_logits, embed_std=embed_std, dtype=dtype)
    )


def bert_tokens(**fields: Any) -> BertTokens:
    """Like `bert`, fed with ready-made tokens (the original's layout-to-image model: dim 512, depth 16, 8192 tokens)."""
    return BertTokens(bert(**fields).module)


def rescaler(size: tuple[int, int] = (256, 256), **fields: Any) -> RescaledMap:
    """Maps of ``size`` pixels, resized as the fields of `SpatialRescaler` say."""
    return RescaledMap(SpatialRescaler(**fields), size)


def hybrid(text: dict[str, Any], joined: dict[str, Any], dtype: Any = jnp.float32) -> Hybrid:
    """``text`` are the kind of text, "bert" or "clip", and its entries; ``joined`` the fields of `Joined`."""
    text, joined = (
        {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
        for part in (text, joined)
    )
    if (kind := text.pop("kind", None)) not in ("bert", "clip"):
        raise ValueError(f"text.kind {kind!r} is neither 'bert' nor 'clip'")
    return Hybrid(CONDITIONERS[kind](**text, dtype=dtype), Joined(**joined))


# kind -> from the other entries of a model config's "conditioner"
CONDITIONERS = {
    "bert": bert,
    "tokens": bert_tokens,
    "clip": lambda **fields: ClipText(CLIPText(**fields)),
    "class": lambda **fields: ClassLabel(ClassEmbedder(**fields)),
    "rescale": rescaler,
    "joined": lambda dtype, **fields: Joined(**fields),
    "hybrid": hybrid,
    "embeddings": lambda dtype, **fields: Embeddings(**fields),
    "none": lambda dtype: Unconditional(),
}
