"""Sets of pictures to evaluate: files, data, samples of a model, reconstructions.

A set has ``count``, ``read(start, stop)`` -> uint8 [h, w, 3] pictures, and ``protocol``, what a
result depends on beside the pixels. Pictures that are no 8-bit RGB are float32 [h, w, c] from -1 to
1.
"""

import dataclasses
import io
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data import ImageTransform, Source, caption_template, to_rgb
from ldm_jax.data.pixels import PixelFormat
from ldm_jax.errors import DataError, EvaluationError
from ldm_jax.models.ldm import FirstStage, to_float, to_uint8

Images = Sequence[np.ndarray] | np.ndarray


class Pictures(Protocol):
    """A set of pictures in a fixed order."""

    count: int
    protocol: dict[str, Any]

    def read(self, start: int, stop: int, /) -> Images:
        """Pictures ``start`` to ``stop``."""
        ...


@dataclasses.dataclass
class ArrayPictures:
    """Pictures uint8 [n, h, w, 3] in memory."""

    images: np.ndarray
    format: str = "array"

    def __post_init__(self) -> None:
        self.count = len(self.images)
        self.protocol = {"format": self.format, "size": _size(self.images.shape), "crop": None}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Pictures ``start`` to ``stop``."""
        return self.images[start:stop]


class NpzPictures:
    """``arr_0`` uint8 [n, h, w, 3] of an .npz file, as ADM's suite and ldm-sample write it.

    The array is read piece by piece, since 50,000 pictures may exceed the memory.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._open() as (_, shape, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise EvaluationError(
                    f"{path}: arr_0 is {dtype} {shape}, expected pictures uint8 [n, h, w, 3]"
                )
        self.count, self.shape = shape[0], shape[1:]
        self.protocol = {"format": "npz", "size": _size(shape), "crop": None}

    def _open(self) -> "_Member":
        return _Member(self.path)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Pictures ``start`` to ``stop``."""
        size = int(np.prod(self.shape))
        with self._open() as (file, _, _):
            file.seek(start * size, io.SEEK_CUR)
            data = file.read((stop - start) * size)
        if len(data) != (stop - start) * size:
            raise EvaluationError(f"{self.path} ends after {start} of its {self.count} pictures")
        return np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape)


class _Member:
    """The open array ``arr_0`` of an .npz file, after its header: (file, shape, dtype)."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> tuple[Any, tuple[int, ...], np.dtype]:
        try:
            self.archive = zipfile.ZipFile(self.path)
            self.file = self.archive.open("arr_0.npy")
            version = np.lib.format.read_magic(self.file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = header(self.file)
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
            raise EvaluationError(f"{self.path} holds no pictures arr_0: {error}") from None
        if fortran:
            raise EvaluationError(f"{self.path}: arr_0 is in Fortran order; save it in C order")
        return self.file, shape, dtype

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.archive.close()


class SourcePictures:
    """Pictures of a data source; with ``size`` cropped and resized as training does."""

    def __init__(
        self,
        source: Source,
        *,
        size: Sequence[int] | None = None,
        crop: str = "center",
        resample: str = "bicubic",
        num: int | None = None,
        threads: int = 4,
        pixels: PixelFormat | None = None,
    ):
        self.source, self._threads = source, threads
        self._pixels = pixels or PixelFormat()
        self.count = len(source) if num is None else min(num, len(source))
        self._transform = (
            None if size is None else ImageTransform((size[0], size[1]), crop, resample=resample)  # pyright: ignore[reportArgumentType]
        )
        self.protocol = {
            "format": _formats(source, self.count),
            "size": "own" if size is None else f"{size[0]}x{size[1]}",
            "crop": None if size is None else f"{crop}, {resample}",
        }
        if not self._pixels.is_plain:
            self.protocol["pixels"] = dataclasses.asdict(self._pixels)

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Metadata of the pictures."""
        return self.source.rows[: self.count]

    def captions(self, template: str) -> list[str]:
        """The caption of each picture."""
        return [caption_template(template, row) for row in self.rows]

    def read(self, start: int, stop: int) -> list[np.ndarray]:
        """Pictures ``start`` to ``stop``; DataError names one that cannot be read."""
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._read, range(start, stop)))

    def _read(self, index: int) -> np.ndarray:
        try:
            read = to_rgb if self._pixels.is_plain else self._pixels
            image = read(self.source[index]["image"])
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.source.path}: {self.source.name(index)} cannot be read ({reason}); "
                "an evaluation leaves no picture out: remove or replace it"
            ) from None
        image = image if self._transform is None else self._transform(image, _UNUSED)
        return image if self._pixels.is_plain else image / np.float32(127.5) - 1


_UNUSED = np.random.default_rng(0)  # a centre crop draws numbers and does not use them


def _formats(source: Source, count: int) -> str:
    """The formats of the files, by their suffixes: JPEG's artefacts change FID."""
    suffixes = {Path(str(source.name(i))).suffix.lower().lstrip(".") for i in range(count)}
    return ", ".join(sorted(suffixes - {""})) or "unknown"


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[2]}"


class SampledPictures:
    """Samples of a pipeline: picture i has the seed ``seed`` + i and the i-th of each condition.

    Args:
      pipe: What `ldm_jax.load` returns.
      num: Number of pictures.
      seed: Of the first picture.
      conditions: Fields of the request with one value for each picture, repeated from the first
        after the last: ``{"prompts": [...]}`` or ``{"classes": [...]}``.
      batch: Pictures that are sampled at a time.
      settings: Further fields of the request: steps, sampler, guidance, eta ...; None is the
        model's own.
    """

    def __init__(
        self,
        pipe: Any,
        num: int,
        *,
        seed: int = 0,
        conditions: Mapping[str, Sequence[Any]] | None = None,
        batch: int = 64,
        settings: Mapping[str, Any] | None = None,
    ):
        self._pipe, self.count, self._seed, self._batch = pipe, num, seed, batch
        self._conditions = {
            name: [values[i % len(values)] for i in range(num)]
            for name, values in (conditions or {}).items()
        }
        self._settings = {k: v for k, v in (settings or {}).items() if v is not None}
        self.protocol = {"format": "uint8 of the model", "crop": None}

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of each picture."""
        return self._conditions.get("prompts")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples pictures ``start`` to ``stop``."""
        part = {name: values[start:stop] for name, values in self._conditions.items()}
        prompts = part.pop("prompts", None)
        seeds = list(range(self._seed + start, self._seed + stop))
        return self._pipe(prompts, seeds=seeds, batch=self._batch, **part, **self._settings)


class Reconstructions:
    """Pictures through a first stage and back to what they were; the posterior's mode, no noise."""

    def __init__(self, first_stage: FirstStage, pictures: Pictures, batch: int = 16):
        self._pictures, self._stage, self._batch = pictures, first_stage, batch
        self.count = pictures.count
        self.protocol = pictures.protocol | {"reconstructed": "mode"}

        @jax.jit
        def run(stage: FirstStage, x: jax.Array) -> jax.Array:
            if x.dtype == jnp.uint8:
                return to_uint8(stage.decode(stage.encode(to_float(x))))
            return jnp.clip(stage.decode(stage.encode(x)), -1, 1)

        self._run = run

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reconstructs pictures ``start`` to ``stop``."""
        images = self._pictures.read(start, stop)
        if len({image.shape for image in images}) > 1:
            raise EvaluationError("reconstructed pictures need one size: give --size HEIGHTxWIDTH")
        images, parts = np.asarray(images), []
        if images.shape[1] % self._stage.downsampling or images.shape[2] % self._stage.downsampling:
            raise EvaluationError(
                f"pictures of {_size(images.shape)} are no multiple of the first stage's "
                f"{self._stage.downsampling} pixels: give --size HEIGHTxWIDTH"
            )
        for i in range(0, len(images), self._batch):
            part = images[i : i + self._batch]
            filled = np.resize(part, (self._batch, *part.shape[1:]))
            parts.append(np.asarray(self._run(self._stage, filled))[: len(part)])
        return np.concatenate(parts)
