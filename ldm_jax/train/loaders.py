"""The loaders that a config asks for: pictures, or the latents that were made of them."""

import contextlib
from typing import Any

from ldm_jax.data import ImageTransform, LatentLoader, Loader, make_source
from ldm_jax.train.tasks import plain

AnyLoader = Loader | LatentLoader


def make_loader(config: Any, part: str, process: tuple[int, int] = (0, 1)) -> AnyLoader:
    """The loader of one part of the data; without a held-out part, validation looks at the training pictures.

    ``process`` = (index, count) shares every batch among processes.
    """
    data = plain(config.data)
    size, min_crop = tuple(data.pop("size")), data.pop("min_crop", 1.0)
    transform = ImageTransform(size, data.pop("crop"), data.pop("flip"), min_crop=min_crop)
    caption, workers, cache = data.pop("caption"), data.pop("num_workers"), data.pop("cache")
    if part == "validation" and not data.get("holdout"):
        part = "train"
    share = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "process_index": process[0],
        "process_count": process[1],
    }
    if cache:
        return LatentLoader(cache, part, flip=transform.flip, **share)
    source = make_source({**data, "part": part})
    return Loader(
        source,
        transform,
        caption=caption,
        num_workers=workers if part == "train" else 0,
        **share,
    )


def first_batches(loader: AnyLoader, n: int) -> list[dict[str, Any]]:
    """The first ``n`` batches in the data's order."""
    with contextlib.closing(loader.batches(n)) as batches:
        return list(batches)
