"""Text and a masked picture together: Stable Diffusion's inpainting."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition, Rows
from ldm_jax.conditioning.masked import MaskedPicture, RowMask
from ldm_jax.conditioning.text import BertText, ClipText, Text

TEXTS: dict[str, type[Text]] = {"bert": BertText, "clip": ClipText}


@dataclasses.dataclass(frozen=True)
class BesideText(Conditioner):
    """Base of kinds with something beside a text, whose parameters are those of the text.

    `encode` gives what the text's `encode` does.
    """

    text: Text

    field = "prompts"
    negative = True
    interpolates = True
    cached = False

    @property
    def module(self) -> Any:
        """The text encoder."""
        return self.text.module

    @property
    def towers(self) -> Mapping[str, Any]:
        """The text, the sole tower."""
        return self.text.towers

    def aligned(self, encoded: Sequence[Any]) -> list[Any]:
        """Returns captions of as many chunks each."""
        beside = [isinstance(one, dict) and "text" in one for one in encoded]
        pairs = list(zip(encoded, beside, strict=True))
        texts = self.text.aligned([one["text"] if inside else one for one, inside in pairs])
        return [
            {**one, "text": text} if inside else text
            for (one, inside), text in zip(pairs, texts, strict=True)
        ]

    def row_problems(self, rows: Rows, column: str, few: int) -> Any:
        """Yields what is wrong with the captions."""
        return self.text.row_problems(rows, column, few)

    def with_kernels(self, kernels: Any) -> "BesideText":
        """Returns the conditioner whose text encoder uses ``kernels``."""
        text: Any = self.text.with_kernels(kernels)
        return dataclasses.replace(self, text=text)

    def init(self, key: jax.Array) -> dict:
        """Returns fresh parameters of the text encoder."""
        return self.text.init(key)

    def encode(self, values: Sequence[str]) -> Any:
        """Returns the tokens of captions."""
        return self.text.encode(values)


def text_of(fields: Mapping[str, Any], dtype: Any) -> Text:
    """Builds the condition of a config's "text", a kind of text with its fields."""
    if not isinstance(fields.get("text"), Mapping):
        raise ValueError("field 'text' is missing")
    section = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["text"].items()}
    if (kind := section.pop("kind", None)) not in TEXTS:
        raise ValueError(f"text.kind {kind!r} is neither 'bert' nor 'clip'")
    text: Any = TEXTS[kind].from_config(dtype, **section)
    return text


@dataclasses.dataclass(frozen=True)
class Hybrid(BesideText):
    """Text as the context, and a masked picture concatenated to the latents.

    The parameters are those of the text. Guidance leads away from another text, with the same
    picture; only the text is dropped in training. `encode` gives the text's tokens, `with_picture`
    makes {"text", "joined"} of them.
    """

    joined: MaskedPicture

    edits = False
    needs_mask = True

    @property
    def concat_channels(self) -> int:
        """The number of channels that are concatenated to the latents."""
        return self.joined.channels

    @classmethod
    def from_config(cls, dtype: Any = jnp.float32, **fields: Any) -> Conditioner:
        """Builds it from "text", a kind of text with its fields, and "joined"."""
        text = text_of(fields, dtype)
        if not isinstance(fields.get("joined"), Mapping):
            raise ValueError("field 'joined' is missing")
        inner = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["joined"].items()}
        return cls(text, MaskedPicture.from_config(**inner))  # type: ignore[arg-type]

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what draws the mask of a row."""
        if not str(fields.get("joined", {}).get("of")).startswith("masked"):
            raise ValueError(
                "model.conditioner.joined.of must be 'masked', 'masked_sd' or 'masked_filled' "
                "beside text"
            )
        return RowMask(**settings)

    def check_size(self, size: tuple[int, int], latent: tuple[int, int]) -> None:
        """The null condition has the size of the latents."""
        try:
            self.joined.check_size(size, latent)
        except ValueError as error:
            raise ValueError(f"joined.{error}") from None

    def check_request(self, request: Any) -> None:
        """Prompts, an image and its mask are all needed."""
        super().check_request(request)
        image = dataclasses.replace(request, prompts=None)
        self.joined.check_request(image)

    def encode_null(self, n: int) -> dict[str, Any]:
        """Returns the empty caption, and zeros."""
        return {"text": self.text.encode_null(n), "joined": self.joined.encode_null(n)}

    def null_row(self, encoded: Any = None) -> Any:
        """Returns the empty caption."""
        return self.text.encode_null(1)

    def with_picture(
        self, encoded: Any, first_stage: Any, image: jax.Array | None, mask: jax.Array | None
    ) -> Any:
        """Adds the masked picture to the text."""
        joined = self.joined.with_picture(None, first_stage, image, mask)
        return {"text": encoded, "joined": joined}

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Encodes the text; the masked picture is concatenated."""
        text = self.text(params, encoded["text"], train=train, rngs=rngs)
        return Cond(crossattn=text.crossattn, concat=encoded["joined"])

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes the captions of a batch, beside its masks."""
        text = {name: raw[name] for name in ("encoded", "caption") if name in raw}
        return self.joined.encode_rows(raw) | self.text.encode_rows(text)

    def example_rows(self, size: tuple[int, int]) -> dict[str, Any]:
        """Returns the empty caption and an empty mask."""
        return self.joined.example_rows(size) | self.text.example_rows(size)
