"""Runs the page's requests: one at a time, with previews, into PNGs that carry their settings."""

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.cli.sample import (
    common_settings,
    describe,
    fingerprints,
    next_number,
    pictures_of,
    requests_of,
    sheet,
    title,
)
from ldm_jax.errors import RequestError
from ldm_jax.io import png
from ldm_jax.io.atomic import atomic_path

MOST_PICTURES = 64  # of one run
PREVIEWS = 8  # of a batch


class Flags(dict):
    """Flags of `ldm-sample` by name, as attributes; those that are not given are None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a run has to show.

    Attributes:
      done: The fraction of the run that is done.
      images: The pictures so far, predicted or finished, uint8 [H, W, 3] each.
      paths: The finished pictures.
      extra: Files of all pictures together, at the end: a grid, an animation.
    """

    done: float
    images: list[np.ndarray]
    paths: list[Path]
    extra: list[Path] = dataclasses.field(default_factory=list)


class Warnings(logging.Handler):
    """Collects the warnings that this thread logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the message."""
        if record.thread == self._thread:
            self.texts.append(record.getMessage())

    def __enter__(self) -> "Warnings":
        logging.getLogger("ldm_jax").addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        logging.getLogger("ldm_jax").removeHandler(self)


class Studio:
    """A model, and the folder that its pictures are written to.

    Attributes:
      pipe: The pipeline.
      model: The settings by which it was loaded, as `ldm_jax.cli.sample.MODEL` names them.
      out: Folder of the pictures; "inputs" in it keeps uploads by their hash, for --replay.
      labels: The labels of the model's classes, maps or boxes.
    """

    def __init__(self, pipe: Any, model: Mapping[str, Any], out: Path):
        self.pipe, self.model, self.out = pipe, dict(model), out
        self.conditioner = pipe.model.conditioner
        self.labels: list[str] = self.conditioner.labels(pipe.model.config.get("classes"))
        self._lock = threading.Lock()

    def keep(self, data: bytes, suffix: str) -> str:
        """Writes an input to the folder of inputs, once, and returns its path."""
        folder = (self.out / "inputs").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
        if not path.exists():
            with atomic_path(path) as temporary:
                Path(temporary).write_bytes(data)
        return str(path)

    def kept(self, path: Any) -> str | None:
        """Returns a path from a picture's settings if it is one of the kept inputs, else None.

        A picture may name any file of this machine, and the page would show it.
        """
        folder = (self.out / "inputs").absolute()
        if not isinstance(path, str) or "\0" in path or Path(path).parent != folder:
            return None
        return path if Path(path).is_file() else None

    def requests(self, flags: Mapping[str, Any]) -> list[Any]:
        """Returns the requests of flags, one for each number of steps.

        Raises:
          RequestError: The flags do not fit.
        """
        requests = requests_of(Flags(flags))
        total = sum(map(pictures_of, requests))
        if total > MOST_PICTURES:
            raise RequestError(
                f"{total} pictures at once: the page makes at most {MOST_PICTURES}; use ldm-sample"
            )
        return [
            dataclasses.replace(one, batch=one.batch or min(pictures_of(one), 8))
            for one in requests
        ]

    def run(self, flags: Mapping[str, Any]) -> Iterator[Frame]:
        """Checks the flags at once and returns an iterator over what the run has to show.

        Only one part of one run is computed at a time; a run that is not iterated stops.
        """
        requests = self.requests(flags)
        own = [self.pipe.complete(request) for request in requests]
        streams = [
            self.pipe.watch(request, max(1, settings.steps // PREVIEWS))
            for request, settings in zip(requests, own, strict=True)
        ]

        def frames() -> Iterator[Frame]:
            total = sum(map(pictures_of, requests))
            images: list[np.ndarray] = []
            paths: list[Path] = []
            for request, settings, stream in zip(requests, own, streams, strict=True):
                common = common_settings(self.model, request, settings) | fingerprints(request)
                common["dtype"] = self.pipe.dtype
                while True:
                    with self._lock:
                        batch = next(stream, None)
                    if batch is None:
                        break
                    shown = [*images, *batch.images]
                    done = (len(images) + batch.done * len(batch.images)) / total
                    if batch.done == 1:
                        images = shown
                        rows = [common | request.row(place) for place in batch.places]
                        paths = [*paths, *self._write(batch.images, rows)]
                    yield Frame(done, shown, paths)
            yield Frame(1.0, images, paths, self._together(flags, requests, own, images))

        return frames()

    def _write(self, images: Sequence[np.ndarray], rows: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Writes pictures with their settings; returns their paths."""
        self.out.mkdir(parents=True, exist_ok=True)
        with self._lock:
            first = next_number(self.out)
            paths = [self.out / f"{first + i:05d}-{title(row)}.png" for i, row in enumerate(rows)]
            for path, image, row in zip(paths, images, rows, strict=True):
                png.save_png(path, image, row)
        return paths

    def _together(
        self, flags: Mapping[str, Any], requests: Any, own: Any, images: list[np.ndarray]
    ) -> list[Path]:
        """Writes a grid of several pictures, and an animation of an interpolation."""
        if len(images) < 2:
            return []
        with self._lock:
            first = next_number(self.out)
            paths = [self.out / f"{first:05d}-grid.png"]
            png.save_png(paths[0], sheet(requests, images), describe(requests, own[0]))
            if flags.get("interpolate"):
                paths.append(self.out / f"{first:05d}-interpolation.gif")
                png.save_gif(paths[1], images, seconds=0.1 * len(images))
        return paths
