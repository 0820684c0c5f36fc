"""The loaders of a config: of pictures, or of the latents in a cache."""

import contextlib
from typing import Any

from ldm_jax.conditioning.config import row_condition, source_settings
from ldm_jax.data import ImageTransform, LatentLoader, Loader, make_source
from ldm_jax.data.buckets import make_buckets
from ldm_jax.data.captions import configured_captions
from ldm_jax.data.mixed import MixedLoader
from ldm_jax.data.pixels import pixel_format
from ldm_jax.train.tasks.base import plain

AnyLoader = Loader | LatentLoader | MixedLoader


def make_loader(config: Any, part: str, process: tuple[int, int] = (0, 1)) -> AnyLoader:
    """Makes the loader of one part of the data.

    Args:
      config: A training config.
      part: "train" or "validation", which without held-out pictures reads those of training.
      process: (index, count), to share every batch among processes.
    """
    data = plain(config.data)
    prior = data.pop("prior", None)
    if part == "train" and prior and prior["path"]:
        return _mixed(config, prior, process)
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
    flip, captions = transform.flip, configured_captions(data)
    if data["cache"]:
        return LatentLoader(data["cache"], part, flip=flip, caption=captions, **share)
    return Loader(
        make_source({**source_settings(data), "part": part}),
        transform,
        caption=captions,
        condition=row_condition(plain(config)),
        buckets=make_buckets(data),
        pixels=pixel_format(data),
        num_workers=data["num_workers"] if part == "train" else 0,
        **share,
    )


def _mixed(config: Any, prior: dict[str, Any], process: tuple[int, int]) -> MixedLoader:
    """Makes the loader of batches of which half are the pictures of "data.prior"."""
    weight = prior.pop("weight")
    half = config.copy_and_resolve_references()
    half.batch_size = config.batch_size // 2
    half.data.prior.path = ""
    other = half.copy_and_resolve_references()
    with other.unlocked():
        other.data.update({"caption_templates": (), **prior})
    return MixedLoader(
        make_loader(half, "train", process), make_loader(other, "train", process), weight
    )


def first_batches(loader: AnyLoader, n: int) -> list[dict[str, Any]]:
    """Returns the first ``n`` batches in the order of the data."""
    with contextlib.closing(loader.batches(n)) as batches:
        return list(batches)
