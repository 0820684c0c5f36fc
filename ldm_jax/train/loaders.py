"""The loaders that a config asks for: pictures, or the latents that were made of them."""

import contextlib
from typing import Any

from ldm_jax.data import ImageTransform, LatentLoader, Loader, make_source
from ldm_jax.train.tasks import plain

AnyLoader = Loader | LatentLoader


def make_loader(config: Any, part: str) -> AnyLoader:
    """The loader of one part of the data; without a held-out part, validation looks at the training pictures."""
    data = plain(config.data)
    transform = ImageTransform(tuple(data.pop("size")), data.pop("crop"), data.pop("flip"))
    caption, workers, cache = data.pop("caption"), data.pop("num_workers"), data.pop("cache")
    if part == "validation" and not data.get("holdout"):
        part = "train"
    if cache:
        return LatentLoader(cache, part, flip=transform.flip, batch_size=config.batch_size, seed=config.seed)
    source = make_source({**data, "part": part})
    return Loader(
        source,
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        caption=caption,
        num_workers=workers if part == "train" else 0,
    )


def first_batches(loader: AnyLoader, n: int) -> list[dict[str, Any]]:
    """The first ``n`` batches in the data's order."""
    with contextlib.closing(loader.batches(n)) as batches:
        return list(batches)
