"""The one training loop."""

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.checkpoint import CheckpointError, TrainingCheckpoints, read_config, save_model
from ldm_jax.latent import DTYPES, ConfigError, nearest
from ldm_jax.parallel import compile_step, make_mesh
from ldm_jax.train.encode import check_cache
from ldm_jax.train.loaders import AnyLoader, first_batches, make_loader
from ldm_jax.train.optim import learning_rate, make_optimizer, scaled
from ldm_jax.train.report import Report, TrainingDiverged
from ldm_jax.train.state import TrainState, create_state
from ldm_jax.train.tasks import TASKS, plain

LOG = logging.getLogger(__name__)

# Settings that a resumed run may change: they alter how long and how loud it runs, not what a step computes. (Where the learning rate decays,
# `steps` is also the end of the decay.)
FREE = (
    "steps",
    "log_every",
    "save_every",
    "eval_every",
    "eval_batches",
    "preview_every",
    "keep",
    "data.num_workers",
    "parallel",
)


def train(config: Any, workdir: str | Path) -> Path:
    """Trains ``config`` in ``workdir``, going on where an earlier run there stopped; returns the finished model's directory.

    In ``workdir``: config.json, checkpoints/, previews/*.png, TensorBoard's events, metrics.jsonl, and at the end model/.
    """
    workdir = Path(workdir).absolute()
    check_config(config)
    model_dir = workdir / "model"
    check_workdir(workdir, plain(config))

    # ------------------------------------------------------------------------------------------------ data
    train_loader, eval_loader = make_loader(config, "train"), make_loader(config, "validation")
    LOG.info(
        "%d pictures to train on, %d held out, batches of %d",
        len(train_loader.source),
        len(eval_loader.source),
        config.batch_size,
    )

    # ------------------------------------------------------------------------------------------- the model
    task = TASKS[config.task](config)
    if config.data.cache:
        check_cache(config, task)
    optim = scaled(config.optim, config.batch_size)
    tx = make_optimizer(optim, config.steps)
    mesh = make_mesh()
    replicated = NamedSharding(mesh, PartitionSpec())

    def init(key: jax.Array) -> TrainState:
        return create_state(task.init(key), tx, ema=config.ema > 0)

    # ------------------------------------------------------------------------------------ begin, or resume
    claim_workdir(workdir, plain(config))  # only now: a mistake above leaves nothing behind that holds on to it
    checkpoints = TrainingCheckpoints(workdir, config.keep)
    first = checkpoints.latest()
    if first is None:
        first, prepared = 0, task.prepare(lambda n: first_batches(train_loader, n))
        state = jax.jit(init, out_shardings=replicated)(jax.random.key(config.seed))
        checkpoints.save(0, state, prepared)
    else:
        prepared = checkpoints.info(first)
        shapes = jax.eval_shape(init, jax.random.key(config.seed))
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated), shapes)
        state = checkpoints.restore(first, like)
        LOG.info("resuming from step %d", first)
    task.use(prepared)
    frozen = jax.device_put(task.frozen, replicated)
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in state.params.items()}
    LOG.info(
        "%.2f M parameters (%s)", sum(counts.values()) / 1e6, ", ".join(f"{k} {v / 1e6:.2f}" for k, v in counts.items())
    )
    step_fn = compile_step(
        task.make_step(tx, seed=config.seed, ema=config.ema, parts=config.optim.accumulate),
        mesh,
        config.parallel,
        shared=(True, True, False),
        donate=(0,),
        out_shared=(True, True),
    )
    evaluate = compile_step(task.evaluate, mesh, "jit", shared=(True, True, False))
    rate = learning_rate(optim, config.steps)

    # ------------------------------------------------------------------------------------------------ loop
    report = Report(workdir, config, first)
    unread: tuple[int, dict] | None = None  # the metrics of the step before: read while the device runs the next
    batches = train_loader.iterate(first)
    with contextlib.closing(checkpoints), contextlib.closing(batches), contextlib.closing(report):
        for step, raw in zip(range(first + 1, config.steps + 1), batches, strict=False):
            with report.pause() if step == first + 1 else contextlib.nullcontext():  # the first call compiles
                state, metrics = step_fn(state, frozen, task.host_batch(raw))
            if unread is not None:
                report.step(*unread, rate, checkpoints)
            unread = (step, metrics)

            saving = step % config.save_every == 0 or step == config.steps
            if saving or step % config.eval_every == 0 or step % config.preview_every == 0:
                report.step(*unread, rate, checkpoints)  # nothing is saved or shown before its loss was seen
                unread = None
            params = state.params if state.ema is None else state.ema
            with report.pause():
                if saving:
                    checkpoints.save(step, state, prepared)
                if step % config.eval_every == 0 or step == config.steps:
                    means = run_evaluation(evaluate, params, frozen, task, eval_loader, config.eval_batches)
                    report.evaluation(step, means)
                if step % config.preview_every == 0 or step == config.steps:
                    report.preview(step, task.preview(params, frozen, first_batches(eval_loader, 1)[0]))

    # ----------------------------------------------------------------------------------------------- export
    trained = int(state.step)
    if exported_steps(model_dir) != trained:  # there is none yet, or that of a shorter run
        shutil.rmtree(model_dir, ignore_errors=True)
        exported, arrays = task.export(state.params if state.ema is None else state.ema)
        save_model(model_dir, {**exported, "trained_steps": trained}, arrays)
    LOG.info("finished: the model is in %s", model_dir)
    return model_dir


def check_config(config: Any) -> None:
    """ConfigError for what would fail only later."""
    if config.task not in TASKS:
        raise ConfigError(f"task {config.task!r} does not exist{nearest(config.task, TASKS)}")
    least_one = (
        "steps",
        "batch_size",
        "save_every",
        "eval_every",
        "eval_batches",
        "preview_every",
        "log_every",
        "keep",
    )
    for name, value in [(name, config[name]) for name in least_one] + [("optim.accumulate", config.optim.accumulate)]:
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    choices = {
        "dtype": DTYPES,
        "parallel": ("jit", "pmap"),
        "loss.kind": ("l1", "l2"),
        "loss.posterior": ("sample", "mode"),
    }
    there = flatten(plain(config))
    for name, value, known in [(name, there[name], known) for name, known in choices.items() if name in there]:
        if value not in known:
            raise ConfigError(f"{name} {value!r} does not exist{nearest(value, known)}")
    if config.data.cache and config.task != "diffusion":
        raise ConfigError("data.cache holds latents, which only a diffusion stage trains on: leave it empty")
    devices = jax.device_count()
    if config.batch_size % (devices * config.optim.accumulate):
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of {devices} devices x {config.optim.accumulate} accumulated parts"
        )


def check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """ConfigError where ``workdir`` holds another run, or something else."""
    file = workdir / "config.json"
    if file.exists():
        try:
            there, here = flatten(json.loads(file.read_text())), flatten(config)
        except (ValueError, AttributeError):
            raise ConfigError(f"{file} is damaged: give another --workdir") from None
        differing = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k) and k not in FREE]
        if differing:
            k = differing[0]
            more = f" (and {len(differing) - 1} more settings)" if len(differing) > 1 else ""
            raise ConfigError(
                f"{workdir} holds a run with {k}={there.get(k)!r}, not {here.get(k)!r}{more}: give another --workdir, or its own settings"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(f"{workdir} is not empty and holds no run of ours: give another --workdir")


def claim_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Makes ``workdir`` this config's."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = workdir / ".config.json"  # renamed when whole: a run may be killed at any moment
        partial.write_text(json.dumps(config, indent=1) + "\n")
        partial.replace(workdir / "config.json")
    except OSError as error:
        raise ConfigError(f"--workdir {workdir} cannot be written: {error.strerror}") from None


def exported_steps(model_dir: Path) -> int | None:
    """How many steps the exported model was trained for; None where there is none."""
    try:
        return read_config(model_dir).get("trained_steps")
    except CheckpointError:
        return None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"a.b.c": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def run_evaluation(evaluate: Any, params: Any, frozen: Any, task: Any, loader: AnyLoader, n: int) -> dict[str, float]:
    """Mean metrics over ``n`` batches; every batch draws its own noise, the same at every evaluation."""
    results = []
    for i, raw in enumerate(first_batches(loader, n)):
        results.append(
            jax.device_get(evaluate(params, frozen, task.host_batch(raw, first_row=i * len(raw["caption"]))))
        )
    return {k: float(np.mean([r[k] for r in results])) for k in results[0]}


__all__ = ["CheckpointError", "TrainingDiverged", "train"]
