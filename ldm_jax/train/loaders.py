"""The loaders of a config: of pictures, or of the latents in a cache."""

import contextlib
from typing import Any

from ldm_jax.conditioning import conditioner_class
from ldm_jax.conditioning.config import row_condition, source_settings
from ldm_jax.data import ImageTransform, LatentLoader, Loader, make_source
from ldm_jax.data.captions import Captions, configured_captions
from ldm_jax.data.sources import Source
from ldm_jax.errors import DataError
from ldm_jax.train.tasks.base import plain

AnyLoader = Loader | LatentLoader


def make_loader(config: Any, part: str, process: tuple[int, int] = (0, 1)) -> AnyLoader:
    """Makes the loader of one part of the data.

    Args:
      config: A training config.
      part: "train" or "validation", which without held-out pictures reads those of training.
      process: (index, count), to share every batch among processes.
    """
    data = plain(config.data)
    transform = ImageTransform(
        tuple(data["size"]), data["crop"], data["flip"], min_crop=data.get("min_crop", 1.0)
    )
    if part == "validation" and not data.get("holdout"):
        part = "train"
    share = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "process_index": process[0],
        "process_count": process[1],
    }
    if data["cache"]:
        flip, captions = transform.flip, configured_captions(data)
        return LatentLoader(data["cache"], part, flip=flip, caption=captions, **share)
    source, captions = (
        make_source({**source_settings(data), "part": part}),
        configured_captions(data),
    )
    if conditioner_class(plain(config.model).get("conditioner", {})).field == "prompts":
        check_captions(source, captions)
    return Loader(
        source,
        transform,
        caption=captions,
        condition=row_condition(plain(config)),
        num_workers=data["num_workers"] if part == "train" else 0,
        **share,
    )


def check_captions(source: Source, captions: Captions | None) -> None:
    """Raises DataError if a model that reads captions would be trained on empty ones alone."""
    if getattr(source, "window", 0):  # streamed: its rows are not known
        return
    if captions is None or not any(captions(row).strip() for row in source.rows):
        columns = ", ".join(source.rows[0]) if len(source) else "none"
        raise DataError(
            f"{source.path}: every caption is empty: set data.text to the column of captions, or "
            f"data.caption to a template over the columns {columns}"
        )


def first_batches(loader: AnyLoader, n: int) -> list[dict[str, Any]]:
    """Returns the first ``n`` batches in the order of the data."""
    with contextlib.closing(loader.batches(n)) as batches:
        return list(batches)
