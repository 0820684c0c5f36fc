"""The one training loop."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ldm_jax.distributed.parallel import (
    ROWS,
    Preemption,
    barrier,
    compile_step,
    global_rows,
    is_first,
    make_mesh,
    make_placed,
    row_shards,
    shardings,
    state_shardings,
)
from ldm_jax.errors import (
    CheckpointError,
    ConfigError,
    TrainingDiverged,
    TrainingStopped,
    did_you_mean,
)
from ldm_jax.io.checkpoint import BestCheckpoints, TrainingCheckpoints, read_config, save_model
from ldm_jax.models.ldm import DTYPES, REMATS
from ldm_jax.nn.layers import rows_over, shapes_of
from ldm_jax.train.encode import check_cache
from ldm_jax.train.initial import adopted, begin_with
from ldm_jax.train.loaders import AnyLoader, first_batches, make_loader
from ldm_jax.train.optim import KINDS, learning_rate, make_optimizer, scaled, told_rate
from ldm_jax.train.report import Report, find_wandb
from ldm_jax.train.state import TrainState, create_state
from ldm_jax.train.tasks.base import TASKS, Task, plain

LOG = logging.getLogger(__name__)

# Settings that a resumed run may change: they alter how long and how loud it runs, not what a step computes. (Where the learning rate decays,
# `steps` is also the end of the decay.)
FREE = (
    "init",  # it has begun
    "init_strict",
    "steps",
    "log_every",
    "save_every",
    "eval_every",
    "eval_batches",
    "preview_every",
    "keep",
    "best.keep",
    "best.metric",
    "best.mode",
    "wandb.project",
    "data.num_workers",
    "adversary.alarm",
    "parallel",
    "remat",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.zero1",
)


def train(config: Any, workdir: str | Path) -> Path:
    """Trains ``config`` in ``workdir``, going on where an earlier run there stopped; returns the finished model's directory.

    In ``workdir``: config.json, checkpoints/, previews/*.png, TensorBoard's events, metrics.jsonl, and at the end model/; where ``config.best.keep``
    says so also best/, the checkpoints of the best validations, and at the end model_best/, made of the best of them; with ``config.wandb.project``
    wandb_id.txt and wandb/.
    """
    workdir = Path(workdir).absolute()
    check_config(config)
    model_dir = workdir / "model"
    check_workdir(workdir, plain(config))

    # ------------------------------------------------------------------------------------------------ data
    here = jax.process_index(), jax.process_count()
    train_loader, eval_loader = (
        make_loader(config, "train", here),
        make_loader(config, "validation", here),
    )
    # A preview is of whole batches, the same in every process.
    preview_loader = eval_loader if here[1] == 1 else make_loader(config, "validation")
    LOG.info(
        "%d pictures to train on, %d held out, batches of %d",
        train_loader.count,
        eval_loader.count,
        config.batch_size,
    )

    # ------------------------------------------------------------------------------------------- the model
    meant = config.copy_and_resolve_references()
    meant.optim = optim = scaled(config.optim, config.batch_size)
    task = TASKS[config.task](meant)
    if config.data.cache:
        check_cache(config, task)
    tx = make_optimizer(optim, config.steps)
    mesh = mesh_of(config)

    def init(key: jax.Array) -> TrainState:
        return create_state(task.init(key), tx, ema=config.ema > 0, extra=task.extra(key))

    shapes = shapes_of(init, jax.random.key(config.seed))
    placed = state_shardings(shapes, mesh, config.mesh.zero1)

    if config.best.keep:
        batch = task.host_batch(first_batches(eval_loader, 1)[0])
        told = jax.eval_shape(task.evaluate, task.weights(shapes), task.frozen, batch)
        if config.best.metric not in told:
            raise ConfigError(
                f"best.metric {config.best.metric!r} is nothing that validation tells{did_you_mean(config.best.metric, told)}"
            )

    given = None
    if config.init and not is_run(workdir):
        given = begin_with(config.init, task, shapes.params, config.init_strict)

    # ------------------------------------------------------------------------------------ begin, or resume
    if is_first():  # only now: a mistake above leaves nothing behind that holds on to it
        claim_workdir(workdir, plain(config))
    barrier("claimed")
    checkpoints = TrainingCheckpoints(workdir, config.keep)
    best = BestCheckpoints(workdir, **config.best) if config.best.keep else None
    like = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, placed
    )
    first = checkpoints.latest()
    if first is None:
        # Every process measures on all rows, and so gets the same.
        first, prepared = 0, task.prepare(lambda n: first_batches(make_loader(config, "train"), n))
        state = make_placed(init, jax.random.key(config.seed), placed)
        if given is not None:
            state = adopted(state, given)
        checkpoints.save(0, state, prepared)
    else:
        prepared = checkpoints.info(first)
        state = checkpoints.restore(first, like)
        LOG.info("resuming from step %d", first)
    task.use(prepared)
    frozen_placed = shardings(task.frozen, mesh)
    frozen = jax.device_put(task.frozen, frozen_placed)
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part))
        for name, part in state.params.items()
    }
    LOG.info(told_rate(config.optim, config.batch_size))
    LOG.info(
        "%.2f M parameters (%s)",
        sum(counts.values()) / 1e6,
        ", ".join(f"{k} {v / 1e6:.2f}" for k, v in counts.items()),
    )
    step = task.make_step(tx, seed=config.seed, ema=config.ema, parts=config.optim.accumulate)
    if config.parallel == "pmap":
        step_fn = compile_step(
            step, mesh, "pmap", shared=(True, True, False), donate=(0,), out_shared=(True, True)
        )
    else:
        step_fn = compile_step(
            over_rows(step, mesh),
            mesh,
            "jit",
            shared=(placed, frozen_placed, False),
            donate=(0,),
            out_shared=(placed, True),
        )
    weights_placed = task.weights(placed)
    evaluate = compile_step(
        over_rows(task.evaluate, mesh), mesh, "jit", shared=(weights_placed, frozen_placed, False)
    )
    rate = learning_rate(optim, config.steps)

    # ------------------------------------------------------------------------------------------------ loop
    local = config.batch_size // here[1]

    def run(first: int, state: TrainState, preemption: Preemption) -> TrainState:
        """From step ``first`` to the last; TrainingDiverged before anything is saved that is no good."""
        report = Report(workdir, config, first)
        asked = False  # to save as soon as there is something good
        unread: tuple[int, dict] | None = (
            None  # the metrics of the step before: read while the device runs the next
        )
        batches = train_loader.iterate(first)
        with contextlib.closing(batches), contextlib.closing(report):
            for step in range(first + 1, config.steps + 1):
                # While the device is at the step before: a batch is read, encoded and brought there behind its back.
                with report.waiting(None if unread is None else unread[1]):
                    batch = global_rows(task.host_batch(next(batches), here[0] * local), mesh)
                with (
                    report.pause() if step == first + 1 else contextlib.nullcontext()
                ):  # the first call compiles
                    state, metrics = step_fn(state, frozen, batch)
                if unread is not None:
                    report.step(*unread, rate, checkpoints)
                unread = (step, metrics)

                stopping = preemption.reached(step)
                asked = preemption.save_wanted(step % config.log_every == 0) or asked
                saving = step % config.save_every == 0 or step == config.steps or stopping or asked
                if saving or step % config.eval_every == 0 or step % config.preview_every == 0:
                    report.step(
                        *unread, rate, checkpoints
                    )  # nothing is saved or shown before its loss was seen
                    unread = None
                weights = task.weights(state)
                with report.pause():
                    if saving and (not report.doubt or step == config.steps):
                        checkpoints.save(step, state, prepared)
                        if asked:
                            LOG.info("SIGUSR1: step %d is saved", step)
                        asked = False
                    if stopping and step < config.steps:
                        saved = checkpoints.latest()  # an earlier one, where there was a doubt
                        raise TrainingStopped(
                            f"stopped at step {step}, and step {saved} is saved; the same command goes on from there"
                        )
                    if step % config.eval_every == 0 or step == config.steps:
                        means = run_evaluation(
                            evaluate, weights, frozen, task, eval_loader, config, mesh
                        )
                        report.evaluation(step, means)
                        if best is not None and best.offer(step, weights, prepared, means):
                            LOG.info(
                                "the best so far: %s %.4f at step %d",
                                best.metric,
                                means[best.metric],
                                step,
                            )
                    if step % config.preview_every == 0 or step == config.steps:
                        report.preview(
                            step, task.preview(weights, frozen, first_batches(preview_loader, 1)[0])
                        )
        return state

    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.closing(checkpoints))
        if best is not None:
            opened.enter_context(contextlib.closing(best))
        preemption = opened.enter_context(Preemption().watch())
        rollbacks = task.rollbacks(state)
        while True:
            try:
                state = run(first, state, preemption)
                break
            except TrainingDiverged as error:
                # Every step is a function of state and step number: a run killed after this comes to the same point again.
                good, rollbacks = checkpoints.latest(), rollbacks + 1
                if good is None or rollbacks > task.most_rollbacks:
                    raise
                first, state = good, task.recover(checkpoints.restore(good, like), rollbacks)
                LOG.warning(
                    "%s: back to step %d with less weight on the adversary (%d of at most %d times)",
                    error.reason,
                    good,
                    rollbacks,
                    task.most_rollbacks,
                )

        # ------------------------------------------------------------------------------------------- export
        checkpoints.latest()  # waits: what is still being written is in memory
        export(task, model_dir, int(state.step), lambda: task.weights(state))
        if best is not None and (step := best.best()) is not None:
            export(
                task, workdir / "model_best", step, lambda: best.restore(step, task.weights(like))
            )
            LOG.info(
                "the best by %s, of step %d, is in %s", best.metric, step, workdir / "model_best"
            )
    LOG.info("finished: the model is in %s", model_dir)
    return model_dir


def export(task: Task, model_dir: Path, trained: int, weights: Callable[[], Any]) -> None:
    """Writes ``weights()`` as a model of ``trained`` steps, in the place of one of other steps; leaves one of as many as it is."""
    if exported_steps(model_dir) == trained:
        return
    barrier("export")
    if is_first():
        shutil.rmtree(model_dir, ignore_errors=True)
    barrier("removed")
    exported, arrays = task.export(weights())
    save_model(model_dir, {**exported, "trained_steps": trained}, arrays)


def mesh_of(config: Any) -> jax.sharding.Mesh:
    """The mesh that the config asks for; ConfigError where the devices or the batch do not fit it."""
    axes = plain(config.mesh)
    zero1 = axes.pop("zero1")
    if config.parallel == "pmap" and (
        axes["fsdp"] != 1 or axes["tensor"] != 1 or zero1 or jax.process_count() > 1
    ):
        raise ConfigError(
            "parallel='pmap' is one host with all of the model on every device: use 'jit' with this mesh"
        )
    mesh = make_mesh(**axes)
    check_rows(config, row_shards(mesh))
    return mesh


def check_rows(config: Any, shards: int) -> None:
    """ConfigError where the batch does not divide over a mesh that cuts it into ``shards``."""
    parts = shards * config.optim.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of {parts}: the mesh cuts it into {shards}, "
            f"optim.accumulate into {config.optim.accumulate}"
        )


def over_rows(step: Callable[..., Any], mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """``step``, traced with its activations split by rows."""
    if mesh.size == 1:
        return step
    rows = NamedSharding(mesh, ROWS)

    def traced(*args: Any, **options: Any) -> Any:
        with rows_over(rows):
            return step(*args, **options)

    return traced


def check_config(config: Any) -> None:
    """ConfigError for what would fail only later."""
    if config.task not in TASKS:
        raise ConfigError(f"task {config.task!r} does not exist{did_you_mean(config.task, TASKS)}")
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
    for name, value in [(name, config[name]) for name in least_one] + [
        ("optim.accumulate", config.optim.accumulate)
    ]:
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if config.best.keep < 0:
        raise ConfigError(f"best.keep must be at least 0, not {config.best.keep}")
    choices = {
        "dtype": DTYPES,
        "remat": REMATS,
        "optim.kind": KINDS,
        "optim.mu_dtype": ("float32", "bfloat16"),
        "parallel": ("jit", "pmap"),
        "best.mode": ("min", "max"),
        "loss.kind": ("l1", "l2"),
        "loss.posterior": ("sample", "mode"),
    }
    there = flatten(plain(config))
    for name, value, known in [
        (name, there[name], known) for name, known in choices.items() if name in there
    ]:
        if value not in known:
            raise ConfigError(f"{name} {value!r} does not exist{did_you_mean(value, known)}")
    if config.wandb.project:
        find_wandb()
    if config.data.cache and config.task != "diffusion":
        raise ConfigError(
            "data.cache holds latents, which only a diffusion stage trains on: leave it empty"
        )


def check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """ConfigError where ``workdir`` holds another run, or something else."""
    file = workdir / "config.json"
    if file.exists():
        try:
            there, here = flatten(json.loads(file.read_text())), flatten(config)
        except (ValueError, AttributeError):
            raise ConfigError(f"{file} is damaged: give another --workdir") from None
        differing = [
            k for k in sorted({*there, *here}) if there.get(k) != here.get(k) and k not in FREE
        ]
        if differing:
            k = differing[0]
            more = f" (and {len(differing) - 1} more settings)" if len(differing) > 1 else ""
            raise ConfigError(
                f"{workdir} holds a run with {k}={there.get(k)!r}, not {here.get(k)!r}{more}: give another --workdir, or its own settings"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(
            f"{workdir} is not empty and holds no run of ours: give another --workdir"
        )


def is_run(workdir: Path) -> bool:
    """Whether ``workdir`` holds a step to go on from."""
    return any(path.name.isdigit() for path in (workdir / TrainingCheckpoints.folder).glob("*"))


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
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def run_evaluation(
    evaluate: Any,
    weights: Any,
    frozen: Any,
    task: Any,
    loader: AnyLoader,
    config: Any,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Mean metrics over ``config.eval_batches`` batches; every batch draws its own noise, the same at every evaluation."""
    results = []
    for i, raw in enumerate(first_batches(loader, config.eval_batches)):
        first_row = i * config.batch_size + jax.process_index() * len(raw["caption"])
        results.append(
            jax.device_get(
                evaluate(weights, frozen, global_rows(task.host_batch(raw, first_row), mesh))
            )
        )
    return {k: float(np.mean([r[k] for r in results])) for k in results[0]}


__all__ = ["CheckpointError", "TrainingDiverged", "train"]
