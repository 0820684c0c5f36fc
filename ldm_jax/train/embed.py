"""Databases of embeddings: CLIP's image tower runs over the data once."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ldm_jax.conditioning.base import RowCondition
from ldm_jax.data.embeddings import (
    EmbeddingInfo,
    Embeddings,
    begin_embeddings,
    is_whole,
    write_embeddings,
)
from ldm_jax.data.latents import fingerprint
from ldm_jax.distributed.compile import compile_step
from ldm_jax.distributed.mesh import make_mesh, replicated
from ldm_jax.errors import ConfigError, did_you_mean
from ldm_jax.io.paths import absolute_path
from ldm_jax.io.resources import resource_errors
from ldm_jax.kernels import for_platform
from ldm_jax.models.clip import clip_from_config
from ldm_jax.models.ldm import to_float
from ldm_jax.train.config import complete
from ldm_jax.train.loaders import make_loader

LOG = logging.getLogger(__name__)
BATCH = 64  # pictures embedded at a time
DTYPES = ("float32", "float16")
PARTS = ("train", "validation")


class PatchCoords(RowCondition):
    """The part of its picture that a row shows: int64 [4], left, top, right, bottom in pixels."""

    column = ""

    def __call__(
        self, row: Mapping[str, Any], image: np.ndarray, view: Any, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns the crop."""
        left, top = view.crop.left, view.crop.top
        return np.array([left, top, left + view.crop.width, top + view.crop.height], np.int64)


def embed(
    config: Any,
    clip: tuple[Mapping[str, Any], Mapping[str, Any]],
    folder: str | Path,
    *,
    part: str = "train",
    dtype: str = "float32",
    shard_size: int = 1024,
) -> Path:
    """Writes the embeddings of a config's pictures, resuming where an earlier run stopped.

    A picture is cut as in training, without random crops and flips, and embedded by CLIP's image
    tower. The vectors are not normalised. Several hosts share the work by shards.

    Args:
      config: Any config; its section "data" is read.
      clip: The config and the parameters of a CLIP model.
      folder: The folder of the database.
      part: Of the data: "train" or, where the config holds some out, "validation".
      dtype: Of the vectors on disk, "float32" or "float16".
      shard_size: Pictures per file, a multiple of 64.

    Returns:
      The folder.

    Raises:
      ConfigError, DataError: An argument does not fit, or the folder holds something else.
    """
    config = complete(config)
    for value, known, what in ((dtype, DTYPES, "dtype"), (part, PARTS, "part")):
        if value not in known:
            raise ConfigError(f"{what} {value!r} does not exist{did_you_mean(value, known)}")
    if part == "validation" and not config.data.get("holdout"):
        raise ConfigError("part 'validation' needs data.holdout above 0")
    if shard_size < 1 or shard_size % BATCH:
        raise ConfigError(f"shard_size must be a multiple of {BATCH}, not {shard_size}")
    devices = jax.local_devices()
    if BATCH % len(devices):
        raise ConfigError(
            f"{BATCH} pictures do not divide over {len(devices)} devices: use fewer of them"
        )
    folder = absolute_path(folder)
    after = "start the same command again, it resumes from what is complete"
    with resource_errors("fewer devices, or a smaller CLIP model, take less", folder, after):
        return _embed(config, clip, folder, part, dtype, shard_size, devices)


def _embed(
    config: Any,
    clip: tuple[Mapping[str, Any], Mapping[str, Any]],
    folder: Path,
    part: str,
    dtype: str,
    shard_size: int,
    devices: Sequence[Any],
) -> Path:
    """Embeds the pictures of a complete config."""
    model = clip_from_config(clip[0])
    pictures = config.copy_and_resolve_references()
    pictures.batch_size, pictures.data.cache = BATCH, ""
    with pictures.unlocked():  # the pictures are read without their conditions
        pictures.model.conditioner = ConfigDict({"kind": "none"})
        pictures.data.condition = ConfigDict()
        pictures.data.buckets = ConfigDict()  # CLIP takes one size
    loader: Any = make_loader(pictures, part)
    loader.condition, loader.captions = PatchCoords(), None
    key = {
        "clip sha256": _digest(clip),
        "data sha256": fingerprint(loader.source),
        "part": part,
        **{f"data.{name}": config.data[name] for name in ("size", "crop")},
    }
    dim, count = model.text.projection_dim, loader.count
    assert dim is not None
    info = EmbeddingInfo(key, dim, count, shard_size, dtype)
    begin_embeddings(folder, info)

    mesh = make_mesh(devices)
    params = jax.device_put({"vision": clip[1]["vision"]}, replicated(mesh))
    model = model.with_kernels(for_platform(devices[0].platform, mesh, differentiable=False))

    def program(params: Any, image: Any, *, axis_name: str | None = None) -> jax.Array:
        return model.encode_image(params, to_float(image))

    compiled = compile_step(program, mesh, "jit", shared=(True, False), out_shared=False)
    shards = info.shards()[jax.process_index() :: jax.process_count()]
    missing = [(name, places) for name, places in shards if not is_whole(folder / name)]
    if len(missing) < len(shards):
        LOG.info("%d of %d shards exist", len(shards) - len(missing), len(shards))
    total = sum(len(places) for _, places in missing)
    with tqdm(total=total, unit=" pictures", disable=None) as bar:
        for name, places in missing:
            found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
            left = len(places)
            for batch in loader.batches(-(-left // BATCH), start=places.start // BATCH):
                vectors = np.asarray(compiled(params, batch["image"]))
                if not np.isfinite(vectors.astype(dtype)).all():
                    raise ConfigError(f"CLIP gives vectors that {dtype} cannot hold")
                # Not the rows that fill up a batch, nor those of pictures that cannot be read.
                kept = np.flatnonzero(batch["valid"][:left])
                names = np.array([loader.source.name(i) for i in batch["index"][kept].tolist()])
                found.append((vectors[kept].astype(dtype), names, batch["condition"][kept]))
                left -= BATCH
            arrays = (np.concatenate(parts) for parts in zip(*found, strict=True))
            write_embeddings(folder / name, Embeddings(*arrays))
            bar.update(len(places))
    LOG.info("the embeddings of %d pictures are in %s", count, folder)
    return folder


def _digest(clip: tuple[Mapping[str, Any], Mapping[str, Any]]) -> str:
    """Returns the SHA-256 of the image tower."""
    found = hashlib.sha256(json.dumps(clip[0]["vision"], sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(clip[1]["vision"]):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return found.hexdigest()
