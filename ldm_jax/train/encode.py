"""Latent caches: the frozen networks of a training run over the data once."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ldm_jax.data.latents import (
    CacheInfo,
    bucket_part,
    check_key,
    claim,
    count_records,
    fingerprint,
    read_info,
    text_columns,
    write_shard,
)
from ldm_jax.distributed.compile import compile_step
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import ConfigError, did_you_mean
from ldm_jax.io.paths import absolute_path, size_of
from ldm_jax.io.resources import resource_errors
from ldm_jax.kernels import for_platform
from ldm_jax.nn.layers import with_kernels
from ldm_jax.train.config import complete
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.tasks import task_class
from ldm_jax.train.tasks.base import Task

LOG = logging.getLogger(__name__)
BATCH = 64  # pictures encoded at a time
DTYPES = ("float16", "bfloat16")


def check_cache(config: Any, task: Task) -> None:
    """Raises DataError where ``data.cache`` was made from other data or another first stage."""
    check_key(config.data.cache, read_info(config.data.cache), task.cache().key)


def encode(
    config: Any, folder: str | Path, *, dtype: str = "float16", shard_size: int = 1024
) -> Path:
    """Writes the latent cache of a config, resuming where an earlier run stopped.

    Of a picture all posterior moments are kept, so that training draws a new latent each time, and
    with ``data.flip`` those of its mirror image. Several hosts share the work by shards.

    Args:
      config: The config of a diffusion stage.
      folder: The folder of the cache.
      dtype: Of the moments, "float16" or "bfloat16".
      shard_size: Pictures per file, a multiple of 64.

    Returns:
      The folder.

    Raises:
      ConfigError, DataError: The config cannot be cached, or the folder holds something else.
    """
    config = complete(config)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} does not exist{did_you_mean(dtype, DTYPES)}")
    if shard_size < 1 or shard_size % BATCH:
        raise ConfigError(f"shard_size must be a multiple of {BATCH}, not {shard_size}")
    devices = jax.local_devices()
    if BATCH % len(devices):
        raise ConfigError(
            f"{BATCH} pictures do not divide over {len(devices)} devices: use fewer of them"
        )
    folder = absolute_path(folder)
    after = "start the same command again, it resumes from what is complete"
    with resource_errors("fewer devices, or a smaller first stage, take less", folder, after):
        return _encode(config, folder, dtype, shard_size, devices)


def _encode(config: Any, folder: Path, dtype: str, shard_size: int, devices: list[Any]) -> Path:
    """Encodes a complete config."""
    task = task_class(config).from_config(config)
    cache = task.cache(dtype)
    pictures = config.copy_and_resolve_references()
    pictures.batch_size, pictures.data.cache = BATCH, ""
    parts = ["train", *(["validation"] if config.data.get("holdout") else [])]
    whole: dict[str, Any] = {part: make_loader(pictures, part) for part in parts}
    task.check_rows(whole["train"])
    digests = {f"{part} data sha256": fingerprint(whole[part].source) for part in parts}
    loaders: dict[str, Any] = {}
    moments: dict[str, tuple[int, ...]] = {}
    for part, loader in whole.items():
        for size, alone in loader.by_bucket().items():
            pixels = jax.ShapeDtypeStruct((1, *size, 3), np.uint8)
            loaders[name := bucket_part(part, size)] = alone
            moments[name] = jax.eval_shape(cache.encode, cache.params, pixels).shape[1:]
    loaders = loaders or whole
    fields = {**cache.fields, "valid": {"dtype": "bool", "shape": (1,)}}
    counts = {part: loader.count for part, loader in loaders.items()}
    tables = {part: loader.source.rows for part, loader in loaders.items()}
    columns = text_columns([row for rows in tables.values() for row in rows])
    started = read_info(folder).format if (folder / "cache.json").exists() else 2
    started = 3 if moments else started
    kept = columns if started > 1 else ()  # an older version kept none
    info = CacheInfo(cache.key | digests, fields, counts, shard_size, started, kept, moments)
    claim(folder, info)

    def program(params: Any, image: Any, *, axis_name: str | None = None) -> jax.Array:
        return cache.encode(params, image)

    mesh, shared = make_mesh(devices), (True, False)
    kernels = for_platform(devices[0].platform, mesh, differentiable=False)
    params = with_kernels(cache.params, kernels)
    compiled = compile_step(program, mesh, "jit", shared=shared, out_shared=False)

    def records(part: str, places: range) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
        loader, rows, left = loaders[part], tables[part], len(places)
        for batch in loader.batches(-(-left // BATCH), start=places.start // BATCH):
            moments = np.asarray(compiled(params, batch["image"]))
            if not np.isfinite(moments.astype(np.float32)).all():
                raise ConfigError(
                    f"the first stage gives values that {dtype} cannot hold: try --dtype=bfloat16"
                )
            arrays = {"moments": moments, **cache.host_arrays(batch)}
            arrays["valid"] = batch["valid"][:, None]
            for i in range(min(BATCH, left)):
                caption = batch["caption"][i]
                text = (caption, rows[batch["index"][i]]) if info.format > 1 else caption
                yield {name: array[i] for name, array in arrays.items()}, text
            left -= BATCH

    for part in loaders:
        mine = info.shards(part)[jax.process_index() :: jax.process_count()]
        missing = [(name, at) for name, at in mine if count_records(folder / name) != len(at)]
        if len(missing) < len(mine):
            LOG.info("%s: %d of %d shards exist", part, len(mine) - len(missing), len(mine))
        total = sum(len(places) for _, places in missing)
        with tqdm(total=total, desc=part, unit=" pictures", disable=None) as bar:
            for name, places in missing:
                write_shard(folder / name, records(part, places), info)
                bar.update(len(places))
    LOG.info("the latent cache is in %s (%.0f MB)", folder, size_of(folder) / 1e6)
    return folder
