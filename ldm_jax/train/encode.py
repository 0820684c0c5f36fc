"""Makes the latent cache of a diffusion config: its frozen first stage and tokenizer run over the data once."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ldm_jax.conditioning.columns import Vectors
from ldm_jax.data import Loader
from ldm_jax.data.latents import (
    CacheInfo,
    check_key,
    claim,
    count_records,
    fingerprint,
    read_info,
    write_shard,
)
from ldm_jax.distributed.parallel import compile_step, make_mesh
from ldm_jax.errors import ConfigError
from ldm_jax.models.ldm import to_float
from ldm_jax.train.loaders import check_cached, make_loader
from ldm_jax.train.tasks.base import DiffusionTask, plain

LOG = logging.getLogger(__name__)
BATCH = 64  # pictures encoded at a time
DTYPES = ("float16", "bfloat16")


def cache_key(config: Any, task: DiffusionTask) -> dict[str, Any]:
    """What the latents of a run depend on; the same for encoding and for training."""
    # Where pictures lie and how they are read changes nothing. flip says what training draws from the cache, not what a record is.
    data = {
        k: v for k, v in plain(config.data).items() if k not in ("cache", "num_workers", "flip")
    }
    data["path"] = Path(data["path"]).name
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(task.model.first_stage.params):
        array = np.asarray(leaf)
        digest.update(
            f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes()
        )
    conditioner, condition = task.model.conditioner, task.conditions.condition
    vectors = (
        {"vectors": [condition.count, condition.dim]} if isinstance(condition, Vectors) else {}
    )
    return {
        **{f"data.{name}": value for name, value in data.items()},
        "model.classes": task.model_config.get("classes"),
        "model.conditioner.kind": task.model_config["conditioner"]["kind"],
        "tokens per caption": getattr(conditioner, "max_length", None),
        "first stage sha256": digest.hexdigest(),
        **vectors,
    }


def check_cache(config: Any, task: DiffusionTask) -> None:
    """DataError where ``config.data.cache`` was made from other data, another transform or another first stage."""
    check_key(config.data.cache, read_info(config.data.cache), cache_key(config, task))


def encode(
    config: Any, folder: str | Path, *, dtype: str = "float16", shard_size: int = 1024
) -> Path:
    """Writes the latent cache of ``config``, going on where an earlier run stopped; returns its folder.

    Every picture's posterior moments are kept, so that training draws a new latent each time, and with ``config.data.flip`` those of its mirror
    image. ``shard_size``: pictures per file, a multiple of 64. Several hosts share the work by shards.

    Raises:
      ConfigError, DataError: the config cannot be cached, or the folder holds something else.
    """
    if config.task != "diffusion":
        raise ConfigError(
            f"task {config.task!r} has no latents: encode takes the config of a diffusion stage"
        )
    if config.data.crop == "random":
        raise ConfigError(
            "data.crop='random' makes a new picture each time: a latent cache needs 'center' or 'none'"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} does not exist: choose {' or '.join(DTYPES)}")
    if shard_size < 1 or shard_size % BATCH:
        raise ConfigError(f"shard_size must be a multiple of {BATCH}, not {shard_size}")
    devices = jax.local_devices()
    if BATCH % len(devices):
        raise ConfigError(
            f"{BATCH} pictures do not divide over {len(devices)} devices: use fewer of them"
        )
    folder, task = Path(folder), DiffusionTask(config)
    if task.model.first_stage.module is None:
        raise ConfigError("model.first_stage is the identity: there is nothing to encode")

    check_cached(task.conditions.condition)
    pictures = config.copy_and_resolve_references()
    pictures.batch_size, pictures.data.cache = BATCH, ""
    parts = ["train", *(["validation"] if config.data.get("holdout") else [])]
    loaders: dict[str, Any] = {part: make_loader(pictures, part) for part in parts}
    key = cache_key(config, task)
    key |= {f"{part} data sha256": fingerprint(loader.source) for part, loader in loaders.items()}

    def moments(first_stage: Any, image: jax.Array, *, axis_name: str | None = None) -> jax.Array:
        sides = [image, image[:, :, ::-1]] if config.data.flip else [image]
        return jnp.stack([first_stage.moments(to_float(side)) for side in sides], axis=1).astype(
            dtype
        )

    program = compile_step(
        moments, make_mesh(devices), "jit", shared=(True, False), out_shared=False
    )
    shapes = jax.eval_shape(
        moments, task.model.first_stage, jnp.zeros((1, *config.data.size, 3), jnp.uint8)
    )
    encoded = (
        task.model.conditioner.encode([""])
        if hasattr(task.model.conditioner, "max_length")
        else None
    )
    fields: dict[str, Any] = {"moments": {"dtype": dtype, "shape": shapes.shape[1:]}}
    if encoded is not None:
        fields["encoded"] = {"dtype": str(encoded.dtype), "shape": encoded.shape[1:]}
    if isinstance(
        condition := task.conditions.condition, Vectors
    ):  # of more than are asked for, one choice for good
        fields["condition"] = {"dtype": "float32", "shape": (condition.count, condition.dim)}
    elif condition is not None:
        fields["condition"] = {"dtype": "int64", "shape": ()}  # a class
    fields["valid"] = {"dtype": "bool", "shape": (1,)}
    info = CacheInfo(
        key, fields, {part: loader.count for part, loader in loaders.items()}, shard_size
    )
    claim(folder, info)

    def records(loader: Loader, places: range) -> Iterator[tuple[dict[str, np.ndarray], str]]:
        left = len(places)
        batches = loader.batches(-(-left // BATCH), start=places.start // BATCH)
        for batch in batches:
            arrays = {"moments": np.asarray(program(task.model.first_stage, batch["image"]))}
            if not np.isfinite(arrays["moments"].astype(np.float32)).all():
                raise ConfigError(
                    f"the first stage gives values that {dtype} cannot hold: try --dtype=bfloat16"
                )
            if encoded is not None:
                arrays["encoded"] = task.model.conditioner.encode(batch["caption"])
            if "condition" in fields:
                arrays["condition"] = batch["condition"]
            arrays["valid"] = batch["valid"][:, None]
            for i in range(min(BATCH, left)):
                yield {name: array[i] for name, array in arrays.items()}, batch["caption"][i]
            left -= BATCH

    for part, loader in loaders.items():
        mine = info.shards(part)[jax.process_index() :: jax.process_count()]
        missing = [
            (name, places) for name, places in mine if count_records(folder / name) != len(places)
        ]
        if len(missing) < len(mine):
            LOG.info(
                "%s: %d of %d shards are there already", part, len(mine) - len(missing), len(mine)
            )
        with tqdm(
            total=sum(len(places) for _, places in missing),
            desc=part,
            unit=" pictures",
            disable=None,
        ) as bar:
            for name, places in missing:
                write_shard(folder / name, records(loader, places), info)
                bar.update(len(places))
    size = sum(file.stat().st_size for file in folder.glob("*.array_record"))
    LOG.info("the latent cache is in %s (%.0f MB)", folder, size / 1e6)
    return folder
