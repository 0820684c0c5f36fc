"""Captions of one or two text towers, with the sizes of the picture: Stable Diffusion XL.

Podell et al. 2023, arXiv:2307.01952, section 2.2. CLIP ViT-L and OpenCLIP ViT-bigG give the
context; the pooled state of the latter and sinusoids of the sizes are the vector condition.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.base import Cond, Conditioner, Names, RowCondition, Rows
from ldm_jax.conditioning.text import ClipText, context_of
from ldm_jax.errors import RequestError
from ldm_jax.nn.layers import timestep_embedding

# Field of the request -> its numbers.
NUMBERS = {"original_size": 2, "crop": 2, "target_size": 2, "aesthetic_score": 1}
TOWERS = ("clip_l", "clip_g")


@dataclasses.dataclass(frozen=True)
class RowSizes(RowCondition):
    """The sizes of a row, float32: those of the picture, of its crop and of the result, in pixels.

    Where the model takes an aesthetic score, it is read from ``column``, or is ``aesthetic_score``
    for all rows.
    """

    vector: tuple[str, ...]
    column: str = ""
    aesthetic_score: float = 6.0

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the numbers of the row, float32 [n]."""
        # The crop is stated at the size of the result, as the model's authors do.
        h, w = image.shape[:2]
        crop = view.crop.top * h / view.crop.height, view.crop.left * w / view.crop.width
        score = row[self.column] if self.column else self.aesthetic_score
        values = {"original_size": view.size, "crop": crop, "target_size": (h, w)}
        return numbers_of(self.vector, values | {"aesthetic_score": (score,)})


def numbers_of(vector: Sequence[str], values: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Returns the numbers of the fields ``vector`` in their order, float32 [n]."""
    return np.asarray([number for name in vector for number in values[name]], np.float32)


@dataclasses.dataclass(frozen=True)
class Sdxl(Conditioner):
    """The conditioner of Stable Diffusion XL, base and refiner.

    The parameters are {"clip_l", "clip_g"}, those of the towers. `encode` gives tokens int32 [b, m]
    by tower, the numbers of ``vector`` as "sizes" float32 [b, n], and "blank" [b], 1 where the
    states of the text are replaced by zeros.

    Attributes:
      clip_g: OpenCLIP's tower; its pooled state is the first part of the vector.
      clip_l: CLIP's tower, whose states come first in the context; None: the refiner has none.
      clip_l_layer: Index of the hidden state that is the context, -2 before the last layer.
      clip_g_layer: The same of ``clip_g``.
      vector: The numbers behind the pooled state: "original_size", "crop" (top, left),
        "target_size" or "aesthetic_score".
      size_dim: Length of the sinusoid of each number.
      zero_empty: Whether the null condition has zeros in place of the empty caption.
      size: (H, W) in pixels where neither a request nor a training row gives the sizes.
    """

    clip_g: ClipText
    clip_l: ClipText | None = None
    clip_l_layer: int = -2
    clip_g_layer: int = -2
    vector: tuple[str, ...] = ("original_size", "crop", "target_size")
    size_dim: int = 256
    zero_empty: bool = True
    size: tuple[int, int] = (1024, 1024)

    field = "prompts"
    negative = True
    interpolates = True
    gives_vector = True
    default_guidance = 5.0

    def __post_init__(self) -> None:
        for name in self.vector:
            if name not in NUMBERS:
                raise ValueError(f"vector {name!r} is none of {', '.join(NUMBERS)}")
        for name, tower in self.towers.items():
            layer, count = getattr(self, f"{name}_layer"), tower.module.num_hidden_layers
            if not -count - 1 <= layer <= count:
                raise ValueError(f"{name}_layer {layer} is beyond the tower's {count} layers")
        if self.clip_g.module.projection_dim is None:
            raise ValueError("clip_g.projection_dim is missing: the vector needs the projection")

    @property
    def options(self) -> Names:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The numbers of the vector, and the score to be guided away from."""
        negative = ("negative_aesthetic_score",) if "aesthetic_score" in self.vector else ()
        return (*self.vector, *negative)

    @property
    def towers(self) -> dict[str, ClipText]:
        """The towers by name, in the order of the context's channels."""
        both = {"clip_l": self.clip_l, "clip_g": self.clip_g}
        return {name: tower for name, tower in both.items() if tower is not None}

    # ------------------------------------------------------------------------------ from a config

    @classmethod
    def from_config(cls, dtype: Any = jnp.float32, **fields: Any) -> Conditioner:
        """Builds it from "clip_l" and "clip_g", sections of the kind "clip", and its fields."""
        if not isinstance(fields.get("clip_g"), Mapping):
            raise ValueError("field 'clip_g' is missing")
        for name in TOWERS:
            if (section := fields.get(name)) is None:
                continue
            if (kind := section.get("kind", "clip")) != "clip":
                raise ValueError(f"{name}.kind is {kind!r}, not 'clip'")
            inner = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
            inner.pop("kind", None)
            try:
                fields[name] = ClipText.from_config(dtype, **inner)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return super().from_config(dtype, **fields)

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition:
        """Returns what computes the sizes of a row."""
        vector = next(f.default for f in dataclasses.fields(cls) if f.name == "vector")
        return RowSizes(**settings, vector=tuple(fields.get("vector", vector)))

    def row_problems(self, rows: Rows, column: str, few: int) -> Iterator[str]:
        """Yields captions that a tower cannot read whole."""
        for name, tower in self.towers.items():
            for line in tower.row_problems(rows, column, few):
                yield f"{name}: {line}"

    def with_kernels(self, kernels: Any) -> "Sdxl":
        """Returns the conditioner whose towers use ``kernels``."""
        changes: Any = {name: t.with_kernels(kernels) for name, t in self.towers.items()}
        return dataclasses.replace(self, **changes)

    # --------------------------------------------------------------------------------- the network

    def init(self, key: jax.Array) -> dict:
        """Returns fresh parameters of the towers."""
        keys = jax.random.split(key, len(self.towers))
        return {n: t.init(k) for (n, t), k in zip(self.towers.items(), keys, strict=True)}

    def encode(self, values: Sequence[str]) -> dict[str, Any]:
        """Tokenizes captions for each tower; the sizes are those of a whole picture of ``size``."""
        whole = {"original_size": self.size, "crop": (0, 0), "target_size": self.size}
        sizes = numbers_of(self.vector, whole | {"aesthetic_score": (6.0,)})
        return {
            **{name: tower.encode(values) for name, tower in self.towers.items()},
            "sizes": np.repeat(sizes[None], len(values), 0),
            "blank": np.zeros(len(values), np.float32),
        }

    def encode_null(self, n: int) -> dict[str, Any]:
        """Returns the empty caption ``n`` times, as zeros where ``zero_empty``."""
        return self.encode([""] * n) | {"blank": np.full(n, self.zero_empty, np.float32)}

    def aligned(self, encoded: Sequence[Any]) -> list[Any]:
        """Returns captions of as many chunks each."""
        parts = {n: tower.aligned([e[n] for e in encoded]) for n, tower in self.towers.items()}
        return [{**one, **{n: parts[n][i] for n in parts}} for i, one in enumerate(encoded)]

    def null_row(self, encoded: Any = None) -> dict[str, Any]:
        """Returns the empty caption with the sizes of ``encoded``."""
        null = self.encode_null(1)
        return null if encoded is None else null | {"sizes": encoded["sizes"]}

    def drop(self, encoded: Any, null: Any, drop: jax.Array) -> Any:
        """Replaces the caption of the rows in ``drop`` [b]; the sizes stay."""
        dropped = super().drop(encoded, null, drop)
        return dropped | {"sizes": encoded["sizes"]}

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Encodes tokens as the context [b, m, k], and the vector [b, d]."""
        hidden, pooled = [], None
        for name, tower in self.towers.items():
            layer = getattr(self, f"{name}_layer")

            def run(tokens: Any, name: str = name, tower: ClipText = tower) -> Any:
                return tower.module.apply({"params": params[name]}, tokens)

            given = encoded[name]
            hidden.append(context_of(given, lambda t, run=run, i=layer: run(t).hidden[i]))
            if name == "clip_g":  # of a long prompt the first chunk is pooled
                pooled = run(given["tokens"][:, 0] if isinstance(given, dict) else given).pooled
        assert pooled is not None
        kept = 1 - encoded["blank"][:, None]
        context = jnp.concatenate(hidden, axis=-1)
        b, n = encoded["sizes"].shape
        waves = timestep_embedding(encoded["sizes"].reshape(-1), self.size_dim)
        return Cond(
            crossattn=context * kept[:, :, None].astype(context.dtype),
            vector=jnp.concatenate(
                [pooled.astype(jnp.float32) * kept, waves.reshape(b, n * self.size_dim)], axis=-1
            ),
        )

    # ------------------------------------------------------------------------------------ sampling

    def from_request(
        self,
        encoded: Any,
        request: Any,
        canvas: Any,
        *,
        seeds: Sequence[int],
        negative: bool = False,
    ) -> dict[str, Any]:
        """Fills in the sizes of a request; what it leaves out is the size of the picture."""
        score = request.negative_aesthetic_score if negative else request.aesthetic_score
        default = 2.5 if negative else 6.0
        values = {
            "original_size": request.original_size or canvas.size,
            "crop": request.crop or (0, 0),
            "target_size": request.target_size or canvas.size,
            "aesthetic_score": (default if score is None else score,),
        }
        for name in self.vector:
            if len(values[name]) != NUMBERS[name]:
                raise RequestError(f"{name} takes {NUMBERS[name]} numbers, not {values[name]}")
            least = 1 if name.endswith("size") else 0
            if name != "aesthetic_score" and min(values[name]) < least:
                raise RequestError(f"{name} must be at least {least}, not {tuple(values[name])}")
        sizes = numbers_of(self.vector, values)
        return {**encoded, "sizes": np.repeat(sizes[None], len(encoded["blank"]), 0)}

    # ------------------------------------------------------------------------------------ training

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes the captions of a batch, with the sizes of its rows."""
        if "encoded" in raw:
            return super().encode_rows(raw)
        encoded = self.encode(raw["caption"])
        if "condition" in raw:
            encoded["sizes"] = np.asarray(raw["condition"], np.float32)
        return {"encoded": encoded}

    def cache_fields(self) -> dict[str, dict[str, Any]]:
        """Returns the sizes of a row; its caption is kept in any case."""
        return {"condition": {"dtype": "float32", "shape": (len(self.encode_null(1)["sizes"][0]),)}}

    def cache_key(self) -> dict[str, Any]:
        """Returns the numbers of a row."""
        return {"vector": list(self.vector)}
