"""Training configs: completed, checked, and compared with that of a run folder."""

import json
import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.data.buckets import make_buckets
from ldm_jax.data.pixels import pixel_format
from ldm_jax.errors import ConfigError
from ldm_jax.io.atomic import write_atomic
from ldm_jax.io.paths import check_writable, is_bucket
from ldm_jax.models.build import DTYPES, REMATS
from ldm_jax.train.optim import KINDS
from ldm_jax.train.report import find_wandb
from ldm_jax.train.tasks import task_class
from ldm_jax.train.tasks.base import check_choices, flatten, plain

LOG = logging.getLogger(__name__)

# Settings that a resumed run may change: they do not alter what a step computes. (Where the
# learning rate decays, `steps` is also the end of the decay.) A task adds its `free_settings`.
FREE_SETTINGS = (
    *("init", "init_strict"),  # they matter at step 0 alone
    *("steps", "log_every", "save_every", "eval_every", "eval_batches", "preview_every", "keep"),
    *("best.keep", "best.metric", "best.mode", "wandb.project", "data.num_workers"),
    *("parallel", "remat", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.zero1"),
)
POSITIVE_SETTINGS = (
    *("steps", "batch_size", "save_every", "eval_every", "eval_batches", "preview_every"),
    *("log_every", "keep", "optim.accumulate"),
)


def complete(config: Any) -> Any:
    """Returns a copy of a config with the defaults of the fields that it lacks.

    Such a config is older than the package: the defaults of new fields keep its meaning. What the
    task reads from a model that the config names is filled in, too.
    """
    from ldm_jax.configs.common import base

    missing: list[str] = []

    def fill(fields: Any, defaults: Any, prefix: str = "") -> None:
        for name, value in defaults.items():
            if name not in fields:
                fields[name] = value
                missing.append(prefix + name)
            elif isinstance(value, ConfigDict) and isinstance(fields[name], ConfigDict):
                fill(fields[name], value, f"{prefix}{name}.")

    if "task" not in config:
        raise ConfigError("the config has no field 'task'")
    task_class(config)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        fill(config, base(config.task))
        task_class(config).complete_config(config)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        LOG.warning("the config lacks %s%s: the defaults are used", missing[0], more)
    return config


def check_config(config: Any) -> None:
    """Raises ConfigError for a setting that would fail only later."""
    task = task_class(config)
    settings = flatten(plain(config))
    for name in POSITIVE_SETTINGS:
        if settings[name] < 1:
            raise ConfigError(f"{name} must be at least 1, not {settings[name]}")
    if config.best.keep < 0:
        raise ConfigError(f"best.keep must be at least 0, not {config.best.keep}")
    choices = {
        "dtype": DTYPES,
        "remat": REMATS,
        "optim.kind": KINDS,
        "optim.mu_dtype": ("float32", "bfloat16"),
        "parallel": ("jit", "pmap"),
        "best.mode": ("min", "max"),
    }
    check_choices(config, choices)
    if make_buckets(plain(config.data)) is not None and not task.any_size:
        raise ConfigError(
            f"the task {config.task!r} trains on pictures of one size: leave data.buckets empty"
        )
    if not pixel_format(plain(config.data)).is_plain and not task.any_pixels:
        raise ConfigError(
            f"the task {config.task!r} trains on 8-bit RGB pictures: "
            "leave data.channels at 3 and data.values empty"
        )
    task.check_config(config)
    if config.wandb.project:
        find_wandb()


def check_rows(config: Any, shards: int) -> None:
    """Raises ConfigError where the batch does not divide over a mesh of ``shards`` row parts."""
    accumulate, batch = config.optim.accumulate, config.batch_size
    if batch % (shards * accumulate):
        raise ConfigError(
            f"batch_size {batch} must be a multiple of {shards * accumulate}: "
            f"the mesh cuts it into {shards}, optim.accumulate into {accumulate}"
        )


def check_workdir(workdir: Path, config: Any) -> None:
    """Raises ConfigError where ``workdir`` holds another run, or something else.

    A run of an older version lacks the newer fields, and was made with their defaults.
    """
    from ldm_jax.configs.common import base

    file = workdir / "config.json"
    if not file.exists():
        if workdir.exists() and any(workdir.iterdir()):
            raise ConfigError(
                f"{workdir} is not empty and holds no training run: give another --workdir"
            )
        return
    try:
        there = flatten(json.loads(file.read_text()))
    except (ValueError, AttributeError):
        raise ConfigError(f"{file} is damaged: give another --workdir") from None
    here, defaults = flatten(plain(config)), flatten(plain(base(config.task)))
    new = [name for name in defaults if name not in there]
    there = {name: defaults[name] for name in new} | there
    free = {*FREE_SETTINGS, *task_class(config).free_settings}
    differing = [k for k in {*there, *here} - free if there.get(k) != here.get(k)]
    if differing:
        k = min(differing, key=lambda name: (name != "task", name))
        more = f" (and {len(differing) - 1} more settings)" if len(differing) > 1 else ""
        raise ConfigError(
            f"{workdir} holds a run with {k}={there.get(k)!r}, not {here.get(k)!r}{more}: "
            "give another --workdir, or its own settings"
        )
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        LOG.warning("%s lacks %s%s: the run had the defaults", file, new[0], more)


def claim_workdir(workdir: Path, config: Any) -> None:
    """Creates ``workdir`` and writes the config there."""
    if is_bucket(workdir):
        check_writable(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomic(workdir / "config.json", json.dumps(plain(config), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--workdir {workdir} cannot be written: {error.strerror}") from None
