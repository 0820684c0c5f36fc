"""The loaders that a config asks for: pictures, or the latents that were made of them."""

import contextlib
from typing import Any

from ldm_jax.conditioning.columns import ClassOf, Vectors
from ldm_jax.conditioning.training import make_condition, source_settings
from ldm_jax.data import ImageTransform, LatentLoader, Loader, make_source
from ldm_jax.data.transforms import Condition
from ldm_jax.errors import ConfigError
from ldm_jax.train.tasks.base import plain

AnyLoader = Loader | LatentLoader


def make_loader(config: Any, part: str, process: tuple[int, int] = (0, 1)) -> AnyLoader:
    """The loader of one part of the data; without a held-out part, validation looks at the training pictures.

    ``process`` = (index, count) shares every batch among processes.
    """
    data = plain(config.data)
    transform = ImageTransform(
        tuple(data["size"]), data["crop"], data["flip"], min_crop=data.get("min_crop", 1.0)
    )
    condition = make_condition(plain(config))
    if part == "validation" and not data.get("holdout"):
        part = "train"
    share = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "process_index": process[0],
        "process_count": process[1],
    }
    if data["cache"]:
        check_cached(condition)
        return LatentLoader(data["cache"], part, flip=transform.flip, **share)
    source = make_source({**source_settings(data), "part": part})
    return Loader(
        source,
        transform,
        caption=data["caption"],
        condition=condition,
        num_workers=data["num_workers"] if part == "train" else 0,
        **share,
    )


def check_cached(condition: Condition | None) -> None:
    """ConfigError for conditions that a latent cache does not hold."""
    if condition is not None and not isinstance(condition, ClassOf | Vectors):
        raise ConfigError(
            "a latent cache holds captions, classes and vectors only: leave data.cache empty, this condition is made of the pictures"
        )


def first_batches(loader: AnyLoader, n: int) -> list[dict[str, Any]]:
    """The first ``n`` batches in the data's order."""
    with contextlib.closing(loader.batches(n)) as batches:
        return list(batches)
