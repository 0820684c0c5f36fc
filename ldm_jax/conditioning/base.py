"""Conditions of a diffusion model: what a kind of condition is, and how it enters the UNet."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import DataError, RequestError, did_you_mean

if TYPE_CHECKING:
    from ldm_jax.conditioning.pictures import Canvas, Geometry
    from ldm_jax.data.transforms import View

Names = tuple[str, ...]


@flax.struct.dataclass
class Cond:
    """The ways into a network; a way that a model does not use is None.

    The first three lead into a UNet, the last into a transformer over codes.

    Attributes:
      crossattn: Context tokens [b, m, k], read by cross-attention.
      concat: Channels [b, h, w, c] that are concatenated to the latents.
      vector: Added to the timestep embedding: class indices [b] or features [b, d].
      tokens: Tokens int32 [b, m] that precede the picture's, or a grid [b, h, w] of them with one
        for each code of the picture.
    """

    crossattn: jax.Array | None = None
    concat: jax.Array | None = None
    vector: jax.Array | None = None
    tokens: jax.Array | None = None


class Rows(NamedTuple):
    """The metadata of a data set's rows, for `Conditioner.row_problems`."""

    rows: Sequence[Mapping[str, Any]]
    captions: Sequence[str]
    name: Callable[[int], str]


class RowCondition:
    """Makes the condition of one training row, in the loader's workers.

    Subclasses are picklable. They draw from the sample's own generator, so that a row's condition
    is the same on every machine and after a resume. ``column`` is the metadata column that is
    read, "" if only the picture is.
    """

    column: str

    def read(self, row: dict[str, Any]) -> None:
        """Decodes in place what the row holds as bytes; raises UnreadablePicture."""

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: "View", rng: np.random.Generator
    ) -> np.ndarray | int:
        """Returns the condition of the transformed ``image``, uint8 [H, W, 3].

        The result has the same shape for every row.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raises DataError where something is missing that batches need, before a training."""

    def complete(self, batch: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
        """Returns the conditions of a batch, in the process that trains.

        Args:
          batch: With "image" uint8 [b, H, W, 3] and "condition" [b, ...], the results of the call.
          names: The pictures' names.
        """
        return batch["condition"]

    def draw(self, images: np.ndarray, values: np.ndarray) -> np.ndarray | None:
        """Returns a batch's conditions as pictures uint8 [b, H, W, 3], for previews.

        None where the condition has no place in the picture. ``images`` are uint8 [b, H, W, 3].
        """
        return None


@dataclasses.dataclass(frozen=True)
class Conditioner:
    """A kind of condition. Static and hashable; parameters are passed in.

    `encode` runs on the host, `with_picture` and `__call__` inside the compiled program. A new kind
    is a subclass in a file of its own and an entry in `ldm_jax.conditioning.CONDITIONERS`.

    Attributes:
      field: The field of a `Request` that holds the condition; None for no condition.
      network: Flax module whose fields are fields of the config; kinds with one have a dataclass
        field ``module``.
      guided: Whether classifier-free guidance has a null condition to lead away from.
      default_guidance: Guidance scale of a model whose config gives none; None leaves it to
        sampling's own default.
      negative: Whether negative prompts take the place of the null condition.
      interpolates: Whether a path between two conditions makes sense.
      edits: Whether a request may start from an image (strength, mask, outpaint, variation).
      needs_mask: Whether every request needs an image and a mask.
      cached: Whether a latent cache can hold it: not if it is made of the picture.
      gives_vector: Whether it gives `Cond.vector`.
      by_patch: Whether a patch of a larger picture takes the same condition, or its part of it.
      argument: Name of the condition's argument in an exported program; None if it cannot be
        exported.
      options: Those of `REQUEST_OPTIONS` that the kind takes.
      pretrained: The part of another model directory that its parameters come from, which are then
        never trained; None: they are trained, unless the config says "frozen".
    """

    field: ClassVar[str | None] = None
    network: ClassVar[Callable[..., Any] | None] = None
    guided: ClassVar[bool] = True
    default_guidance: ClassVar[float | None] = None
    negative: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    edits: ClassVar[bool] = True
    needs_mask: ClassVar[bool] = False
    cached: ClassVar[bool] = True
    gives_vector: ClassVar[bool] = False
    by_patch: ClassVar[bool] = True
    argument: ClassVar[str | None] = None
    options: ClassVar[Names] = ()
    pretrained: ClassVar[str | None] = None

    # ------------------------------------------------------------------------------ from a config

    @classmethod
    def variant(cls, fields: Mapping[str, Any]) -> "type[Conditioner]":
        """Returns the class that a config's ``fields`` describe, for kinds with several."""
        return cls

    @classmethod
    def from_config(cls, dtype: Any = jnp.float32, **fields: Any) -> "Conditioner":
        """Builds the conditioner from a config's fields, without "kind".

        Raises:
          ValueError: A field does not exist, is missing, or has a value that does not fit.
        """
        own = {f.name: f for f in dataclasses.fields(cls) if f.name != "module"}
        hidden = ("dtype", "kernels", "parent", "name")
        inner = {
            f.name: f
            for f in (dataclasses.fields(cls.network) if cls.network is not None else ())  # type: ignore[arg-type]
            if f.name not in hidden
        }
        for name in fields:
            if name not in own and name not in inner:
                known = [*own, *inner]
                raise ValueError(f"field {name!r} does not exist{did_you_mean(name, known)}")
        for name, field in {**own, **inner}.items():
            missing = field.default is field.default_factory is dataclasses.MISSING
            if missing and name not in fields:
                raise ValueError(f"field {name!r} is missing")
        outer = {name: value for name, value in fields.items() if name in own}
        if cls.network is None:
            return cls(**outer)
        rest = {name: value for name, value in fields.items() if name not in own}
        return cls(module=cls.network(**rest, dtype=dtype), **outer)  # type: ignore[call-arg]

    @classmethod
    def row_condition(
        cls, fields: Mapping[str, Any], settings: Mapping[str, Any], names: Callable[[], Names]
    ) -> RowCondition | None:
        """Returns what makes the training condition of a row; None if it is the caption or nothing.

        Args:
          fields: The config's "model.conditioner".
          settings: The config's "data.condition".
          names: Returns the class names of the model or of its data.

        Raises:
          ValueError: The settings do not fit.
        """
        if settings:
            raise ValueError(
                f"a conditioner of the kind {fields.get('kind')!r} takes none: leave it empty"
            )
        return None

    @classmethod
    def row_labels(cls, row: Mapping[str, Any], column: str) -> Iterable[Any]:
        """Yields the names or numbers of classes in a row's ``column``."""
        return ()

    @classmethod
    def complete(
        cls, fields: Mapping[str, Any], row_condition: RowCondition | None, dropout: float
    ) -> dict[str, Any]:
        """Returns the config's fields with what follows from the data filled in.

        Raises:
          ValueError: A field contradicts the data, or is missing and does not follow from them.
        """
        return dict(fields)

    @classmethod
    def unet_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of the UNet that follow from those of `complete`."""
        return {}

    @classmethod
    def with_clip(cls, fields: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config's fields with CLIP's text tower, which makes vectors of prompts.

        Args:
          fields: The config's "conditioner".
          text: The "conditioner" of a CLIP model, whose parameters become those of this one.

        Raises:
          ValueError: The kind takes no vectors of CLIP, or others.
        """
        raise ValueError(
            f"a conditioner of the kind {fields.get('kind')!r} takes no vectors of CLIP"
        )

    def row_problems(self, rows: "Rows", column: str, few: int) -> Iterator[str]:
        """Yields what is wrong with the conditions of training rows, one line each.

        Args:
          rows: The rows of a data set.
          column: The column that the row condition reads.
          few: Classes with fewer pictures are reported.
        """
        return iter(())

    def check_size(self, size: tuple[int, int], latent: tuple[int, int]) -> None:
        """Raises ValueError where the conditions do not fit pictures of ``size`` (H, W)."""

    def with_kernels(self, kernels: Any) -> "Conditioner":
        """Returns the conditioner with its network's operations in the forms of ``kernels``."""
        module = getattr(self, "module", None)
        if module is None:
            return self
        changes: dict[str, Any] = {"module": module.clone(kernels=kernels)}
        return dataclasses.replace(self, **changes)

    # --------------------------------------------------------------------------------- the network

    @property
    def concat_channels(self) -> int:
        """The number of channels that are concatenated to the latents."""
        return 0

    @property
    def towers(self) -> Mapping[str, Any]:
        """The conditioners of text that it consists of, by name, each with a ``module``.

        The name is also that of the tower's section in the config and of its parameters; a sole
        tower has the name "", and its parameters are those of the conditioner.
        """
        return {}

    @property
    def vocabulary(self) -> int:
        """The number of values of `Cond.tokens`."""
        return 0

    def init(self, key: jax.Array) -> dict:
        """Returns fresh parameters; {} where there are none."""
        module = getattr(self, "module", None)
        return {} if module is None else dict(module.init(key, self.encode_null(1))["params"])

    def encode(self, values: Sequence[Any]) -> Any:
        """Encodes conditions on the host.

        Args:
          values: One condition for each picture, as `parse` returns them.

        Returns:
          An array [b, ...] or a pytree of them.

        Raises:
          ValueError: A value does not fit.
        """
        raise NotImplementedError

    def encode_null(self, n: int) -> Any:
        """Returns ``n`` rows of the null condition, in the form that `__call__` takes."""
        raise NotImplementedError

    def null_row(self, encoded: Any = None) -> Any:
        """Returns one row that replaces ``encoded`` where a condition is dropped or guided from."""
        return self.encode_null(1)

    def drop(self, encoded: Any, null: Any, drop: jax.Array) -> Any:
        """Replaces the rows ``drop`` [b] of ``encoded`` by ``null``, the result of `null_row`."""
        return jax.tree.map(
            lambda null, e: jnp.where(drop.reshape(-1, *(1,) * (e.ndim - 1)), null, e),
            null,
            encoded,
        )

    def aligned(self, encoded: Sequence[Any]) -> list[Any]:
        """Returns results of `encode` that enter one program, brought to the same shapes."""
        return list(encoded)

    def with_picture(
        self, encoded: Any, first_stage: Any, image: jax.Array | None, mask: jax.Array | None
    ) -> Any:
        """Adds the part of the condition that is made of a picture. Runs inside the program.

        Args:
          encoded: The result of `encode`.
          first_stage: The model's `FirstStage`.
          image: Pixels [b, H, W, 3] in [-1, 1].
          mask: uint8 [b, H, W, 1], 1 where the picture is to be painted.

        Returns:
          What `__call__` takes.
        """
        return encoded

    def __call__(
        self, params: Any, encoded: Any, *, train: bool = False, rngs: dict | None = None
    ) -> Cond:
        """Returns the condition of b pictures."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------ sampling

    def check_request(self, request: Any) -> None:
        """Raises RequestError where a request lacks the condition or has one of another kind."""
        sentence = (
            "this model takes no condition"
            if self.field is None
            else f"this model is conditioned on {self.field}"
        )
        for name in REQUEST_FIELDS:
            if name != self.field and getattr(request, name) is not None:
                raise RequestError(f"{sentence}, not {name}")
        for name in REQUEST_OPTIONS:
            if name not in (self.field, *self.options) and getattr(request, name) is not None:
                raise RequestError(f"{sentence}, which takes no {name}")
        if self.field is not None and not as_list(getattr(request, self.field)):
            raise RequestError(f"{sentence}: give at least one")

    def resolve(self, params: Any, request: Any, mesh: jax.sharding.Mesh) -> Any:
        """Returns a checked request with what is looked up before sampling, such as neighbours.

        Args:
          params: The conditioner's parameters.
          request: The request.
          mesh: The devices of the pipeline.

        Raises:
          RequestError: Something does not fit.
        """
        return request

    def canvas(self, request: Any, geometry: "Geometry") -> "Canvas":
        """Returns the size of the picture to make, and the image and mask that it starts from."""
        from ldm_jax.conditioning.pictures import edit_canvas

        return edit_canvas(request.image, request.mask, request.outpaint, geometry)

    def parse(self, value: Any, canvas: "Canvas", geometry: "Geometry") -> list[Any]:
        """Checks the value of the request's field and returns a list that `encode` takes.

        Raises:
          RequestError: The value does not fit.
        """
        return as_list(value)

    def from_request(
        self,
        encoded: Any,
        request: Any,
        canvas: "Canvas",
        *,
        seeds: Sequence[int],
        negative: bool = False,
    ) -> Any:
        """Adds what the fields `options` of a request give to encoded conditions.

        Args:
          encoded: The result of `encode` or `null_row`, of one picture or all.
          request: The request with all settings.
          canvas: The picture to make.
          seeds: One for each picture.
          negative: Whether the condition is guided away from.

        Raises:
          RequestError: A value does not fit.
        """
        return encoded

    def labels(self, names: Sequence[str] | None) -> list[str]:
        """Returns the labels that a form lets users choose from, [] where there are none.

        Args:
          names: The names of the model's classes.
        """
        return []

    def signature(self, names: Sequence[str] | None) -> dict[str, Any]:
        """Returns entries for an exported program's signature.json."""
        return {}

    def tokenizer_json(self) -> str | None:
        """Returns the content of an exported program's tokenizer.json; None if it needs none."""
        return None

    # ------------------------------------------------------------------------------------ training

    def encode_rows(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes a loader's batch.

        Args:
          raw: "caption", "condition" as the `RowCondition` makes it, or, from a latent cache,
            "encoded".

        Returns:
          "encoded", the result of `encode`, and, for conditions made of a masked picture, "mask".
        """
        if "encoded" in raw:
            return {name: raw[name] for name in ("encoded", "mask") if name in raw}
        return {"encoded": self.encode(raw["condition"])}

    def example_rows(self, size: tuple[int, int]) -> dict[str, Any]:
        """Returns what `encode_rows` does for one picture of ``size``, without data."""
        return {"encoded": self.null_row()}

    def cache_fields(self) -> dict[str, dict[str, Any]]:
        """Returns what a latent cache keeps of a row: name -> {"dtype", "shape"}."""
        return {}

    def cache_key(self) -> dict[str, Any]:
        """Returns what the cached conditions depend on."""
        return {}


# The fields of a Request that hold conditions; "condition" is for kinds outside of this package.
REQUEST_FIELDS = ("prompts", "classes", "semantic_map", "layout", "embeddings", "condition")
# Fields of a Request that only some kinds of condition take, beside their condition.
REQUEST_OPTIONS = (
    "neighbors",
    "database",
    "original_size",
    "crop",
    "target_size",
    "aesthetic_score",
    "negative_aesthetic_score",
    "depth",
    "noise_level",
)


def as_list(value: Any) -> list[Any]:
    """Returns one or several values as a list; None is the empty one.

    Arrays, strings and paths count as one value.
    """
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def column_of(row: Mapping[str, Any], column: str) -> Any:
    """Returns a row's value in ``column``; raises DataError where there is no such column."""
    if column not in row:
        known = ", ".join(key for key in row if key != "image")
        raise DataError(f"data.condition: there is no column {column!r}: there are {known}")
    return row[column]


def label_number(label: Any, names: Sequence[str], what: str) -> int:
    """Returns the number of a training label: its place in ``names``, or itself."""
    if names and isinstance(label, str):
        if label not in names:
            raise DataError(
                f"{what} {label!r} is not in model.classes: add it there, or exclude these rows "
                "by data.where"
            )
        return names.index(label)
    if isinstance(label, int | np.integer) and not isinstance(label, bool):
        return int(label)
    raise DataError(f"{what} {label!r} is neither a whole number nor one of model.classes")


def check_kinds(kinds: Sequence[str], known: Mapping[str, Any], what: str) -> None:
    """Raises DataError where a config's "data.condition.kinds" are unknown or missing."""
    for kind in kinds:
        if kind not in known:
            raise DataError(f"{what} {kind!r} does not exist{did_you_mean(kind, known)}")
    if not kinds:
        raise DataError(f"kinds of {what} are missing: choose from {', '.join(known)}")


def some(names: Sequence[str], most: int = 3) -> str:
    """Returns the first of many names, as "a, b, c ..."."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
