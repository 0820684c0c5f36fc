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
class Hybrid(Conditioner):
    """Text as the context, and a masked picture concatenated to the latents.

    The parameters are those of the text. Guidance leads away from another text, with the same
    picture; only the text is dropped in training. `encode` gives the text's tokens, `with_picture`
    makes {"text", "joined"} of them.
    """

    text: Text
    joined: MaskedPicture

    field = "prompts"
    negative = True
    interpolates = True
    edits = False
    cached = False
    needs_mask = True

    @property
    def module(self) -> Any:
        """The text encoder."""
        return self.text.module

    @property
    def concat_channels(self) -> int:
        """The number of channels that are concatenated to the latents."""
        return self.joined.channels

    @classmethod
    def from_config(cls, dtype: Any = jnp.float32, **fields: Any) -> Conditioner:
        """Builds it from "text", a kind of text with its fields, and "joined"."""
        for name in ("text", "joined"):
            if not isinstance(fields.get(name), Mapping):
                raise ValueError(f"field {name!r} is missing")
        parts = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in fields[name].items()}
            for name in ("text", "joined")
        ]
        if (kind := parts[0].pop("kind", None)) not in TEXTS:
            raise ValueError(f"text.kind {kind!r} is neither 'bert' nor 'clip'")
        text = TEXTS[kind].from_config(dtype, **parts[0])
        joined = MaskedPicture.from_config(**parts[1])
        return cls(text, joined)  # type: ignore[arg-type]

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

    def row_problems(self, rows: Rows, column: str, few: int) -> Any:
        """Yields what is wrong with the captions."""
        return self.text.row_problems(rows, column, few)

    def check_size(self, size: tuple[int, int], latent: tuple[int, int]) -> None:
        """The null condition has the size of the latents."""
        try:
            self.joined.check_size(size, latent)
        except ValueError as error:
            raise ValueError(f"joined.{error}") from None

    def with_kernels(self, kernels: Any) -> "Hybrid":
        """Returns the conditioner whose text encoder uses ``kernels``."""
        text: Any = self.text.with_kernels(kernels)
        return dataclasses.replace(self, text=text)

    @property
    def towers(self) -> Mapping[str, Any]:
        """The text, the sole tower."""
        return self.text.towers

    def init(self, key: jax.Array) -> dict:
        """Returns fresh parameters of the text encoder."""
        return self.text.init(key)

    def check_request(self, request: Any) -> None:
        """Prompts, an image and its mask are all needed."""
        super().check_request(request)
        image = dataclasses.replace(request, prompts=None)
        self.joined.check_request(image)

    def encode(self, values: Sequence[str]) -> Any:
        """Returns the tokens of captions."""
        return self.text.encode(values)

    def aligned(self, encoded: Sequence[Any]) -> list[Any]:
        """Returns captions of as many chunks each."""
        return self.text.aligned(encoded)

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
