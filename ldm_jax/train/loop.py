"""The training loop, the same for all tasks."""

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.distributed.compile import compile_step, make_placed
from ldm_jax.distributed.mesh import make_mesh, row_shards
from ldm_jax.distributed.preemption import Preemption
from ldm_jax.distributed.processes import barrier, global_rows, is_first
from ldm_jax.distributed.shardings import shardings, state_shardings
from ldm_jax.errors import (
    CheckpointError,
    ConfigError,
    TrainingDiverged,
    TrainingStopped,
    did_you_mean,
)
from ldm_jax.io.checkpoint import BestCheckpoints, TrainingCheckpoints, read_config, save_model
from ldm_jax.io.paths import absolute_path, remove_tree
from ldm_jax.io.resources import resource_errors
from ldm_jax.kernels import cores, for_platform
from ldm_jax.nn.layers import with_kernels
from ldm_jax.train.config import check_config, check_rows, check_workdir, claim_workdir, complete
from ldm_jax.train.encode import check_cache
from ldm_jax.train.loaders import AnyLoader, first_batches, make_loader
from ldm_jax.train.optim import describe_rate, learning_rate, make_optimizer, with_scaled_rate
from ldm_jax.train.page import write_page
from ldm_jax.train.power_ema import save_snapshots, with_averages
from ldm_jax.train.report import Report
from ldm_jax.train.start import load_start, with_parameters
from ldm_jax.train.state import TrainState, create_state
from ldm_jax.train.tasks import task_class
from ldm_jax.train.tasks.base import Task, plain

LOG = logging.getLogger(__name__)


def train(config: Any, workdir: str | Path, *, restore_step: int | None = None) -> Path:
    """Trains a model, resuming where an earlier run in ``workdir`` stopped.

    ``workdir`` then has config.json, checkpoints/, previews/*.png, TensorBoard events,
    metrics.jsonl and at the end report.html and model/; with ``config.best.keep`` also best/, the
    checkpoints of the best validations, and model_best/, made of the best one; with
    ``config.wandb.project`` wandb_id.txt and wandb/.

    Args:
      config: A config of `ldm_jax.configs`.
      workdir: The run folder, on this machine or in a bucket (gs://, s3://).
      restore_step: Resume from this checkpoint; those of later steps are set aside. By default
        from the newest.

    Returns:
      The directory of the finished model.

    Raises:
      ConfigError, DataError, CheckpointError, MeshError: Something cannot be used as given.
      ResourceError, StorageError: The disk is full, memory does not suffice, a bucket refuses.
      TrainingDiverged: The loss is not finite, or the task sees another problem.
      TrainingStopped: SIGTERM; the state is saved.
    """
    workdir, config = absolute_path(workdir), complete(config)
    advice = (
        "a smaller batch_size, a larger optim.accumulate, remat='blocks' or mesh.fsdp take less; "
        "ldm-plan says how much"
    )
    after = "start the same command again, it resumes from what is complete"
    with resource_errors(advice, workdir, after):
        return _train(config, workdir, restore_step)


def _train(config: Any, workdir: Path, restore_step: int | None) -> Path:
    """Trains a complete config."""
    check_config(config)
    check_workdir(workdir, config)
    model_dir = workdir / "model"

    # ------------------------------------------------------------------------------------ data
    process = jax.process_index(), jax.process_count()
    train_loader = make_loader(config, "train", process)
    eval_loader = make_loader(config, "validation", process)
    # A preview needs whole batches, the same in every process.
    preview_loader = eval_loader if process[1] == 1 else make_loader(config, "validation")
    counts = train_loader.count, eval_loader.count, config.batch_size
    LOG.info("%d pictures to train on, %d held out, batches of %d", *counts)
    for line in train_loader.notes:
        LOG.info(line)

    # ----------------------------------------------------------------------------------- model
    scaled = config.copy_and_resolve_references()
    scaled.optim = optim = with_scaled_rate(config.optim, config.batch_size)
    task = task_class(config).from_config(scaled)
    if config.data.cache:
        check_cache(config, task)
    else:
        task.check_rows(train_loader)
    tx, rate = make_optimizer(optim, config.steps, task.decays), learning_rate(optim, config.steps)
    tx = with_averages(tx, config.power_ema)
    mesh = mesh_of(config)

    def init(key: jax.Array) -> TrainState:
        return create_state(task.init(key), tx, ema=config.ema > 0, extra=task.extra(key))

    shapes = jax.eval_shape(init, jax.random.key(config.seed))
    placed = state_shardings(shapes, mesh, config.mesh.zero1)
    if config.best.keep:
        batch = task.host_batch(first_batches(eval_loader, 1)[0])
        means = jax.eval_shape(task.evaluate, task.weights(shapes), task.frozen, batch)
        means = task.summary(dict.fromkeys(means, 1.0))
        if (metric := config.best.metric) not in means:
            raise ConfigError(
                f"best.metric {metric!r} is no validation metric{did_you_mean(metric, means)}"
            )
    given: dict[str, Any] = {}
    if config.init and not TrainingCheckpoints.steps_in(workdir):
        task, given = load_start(config.init, task, shapes.params, config.init_strict)

    # ------------------------------------------------------------------------- start or resume
    # The folder is written only now: a mistake above leaves nothing behind.
    size = sum(
        math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True)
    )
    cores.check_free(mesh, len(mesh.local_devices) * size, "parameters, averages and optimiser")
    if is_first():
        claim_workdir(workdir, config)
    barrier("claimed")
    checkpoints = TrainingCheckpoints(workdir, config.keep, restore_step=restore_step)
    best = BestCheckpoints(workdir, **config.best) if config.best.keep else None
    like = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, placed
    )
    start = checkpoints.latest()
    if start is None:
        # Every process measures on all rows, so that all get the same.
        measured = task.measure(lambda n: first_batches(make_loader(config, "train"), n))
        start, state = 0, make_placed(init, jax.random.key(config.seed), placed)
        state = with_parameters(state, given) if given else state
        checkpoints.save(0, state, measured)
    else:
        state, measured = checkpoints.restore(start, like)
        LOG.info("resuming from step %d", start)
    platform = mesh.devices.flat[0].platform
    task = with_kernels(task.with_measured(measured), for_platform(platform, mesh))
    frozen_placed = shardings(task.frozen, mesh)
    frozen = jax.device_put(task.frozen, frozen_placed)
    parts = {k: sum(leaf.size for leaf in jax.tree.leaves(v)) for k, v in state.params.items()}
    total = sum(parts.values()) / 1e6
    LOG.info(describe_rate(config.optim, config.batch_size))
    by_part = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in parts.items())
    LOG.info("%.2f M parameters (%s)", total, by_part)
    stepper = task
    if config.parallel == "pmap":  # each device has a program of its own
        shared, out = (True, True, False), (True, True)
        stepper = with_kernels(task, for_platform(platform))
    else:
        shared, out = (placed, frozen_placed, False), (placed, True)
    step = stepper.make_step(tx, config.optim.accumulate)
    step_fn = compile_step(step, mesh, config.parallel, shared=shared, donate=(0,), out_shared=out)
    shared = task.weights(placed), frozen_placed, False
    evaluate = compile_step(task.evaluate, mesh, "jit", shared=shared)

    # ------------------------------------------------------------------------------------ loop
    first_row = process[0] * config.batch_size // process[1]
    seen: set[Any] = set()  # shapes of batches that the step is compiled for

    def run(start: int, state: TrainState, preemption: Preemption) -> TrainState:
        """Trains from step ``start`` to the last; TrainingDiverged before a bad state is saved."""
        report, batches = Report(workdir, config, task, start, rate), train_loader.iterate(start)
        # Metrics of the step before, which are read while the device runs the next one.
        pending: tuple[int, dict] | None = None
        save_requested = False  # by SIGUSR1, until a good state is saved
        with contextlib.closing(batches), contextlib.closing(report):
            for step in range(start + 1, config.steps + 1):
                # The host reads, encodes and transfers a batch while the device runs.
                with report.waiting(pending and pending[1]):
                    raw = task.batch_at(next(batches), step - 1)
                    batch = global_rows(task.host_batch(raw, first_row), mesh)
                shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
                compiles = shapes not in seen
                if step == start + 1:
                    report.count(step_fn, state, frozen, batch)
                with report.pause() if compiles else contextlib.nullcontext():
                    if compiles and platform == "cpu":  # others report a lack of memory themselves
                        compiled = step_fn.lower(state, frozen, batch).compile()
                        cores.check_program(compiled, mesh, "a training step")
                    state, metrics = step_fn(state, frozen, batch)
                seen.add(shapes)
                if pending is not None:
                    report.step(*pending)
                pending = step, metrics

                last, stopping = step == config.steps, preemption.reached(step)
                if preemption.save_wanted(step % config.log_every == 0):
                    save_requested = True
                saves = last or stopping or save_requested or step % config.save_every == 0
                evaluates = last or step % config.eval_every == 0
                previews = last or step % config.preview_every == 0
                averages = config.power_ema.stds and (last or step % config.power_ema.every == 0)
                if not (saves or evaluates or previews or averages):
                    continue
                # The loss of a state is checked before the state is saved or shown.
                report.step(*pending)
                pending, weights = None, task.weights(state)
                with report.pause():
                    if saves and (last or not report.suspect):
                        report.publish()
                        checkpoints.save(step, state, measured)
                        if save_requested:
                            LOG.info("SIGUSR1: step %d is saved", step)
                        save_requested = False
                    if averages and (last or not report.suspect):
                        save_snapshots(
                            workdir,
                            config.power_ema,
                            state,
                            step,
                            lambda folder, of: export(
                                task, folder, int(of.step), lambda: task.weights(of)
                            ),
                        )
                    if stopping and not last:
                        saved = checkpoints.latest()  # an earlier one where this is suspect
                        raise TrainingStopped(
                            f"stopped at step {step}, and step {saved} is saved; "
                            "the same command resumes there"
                        )
                    if evaluates:
                        means = run_evaluation(
                            evaluate, weights, frozen, task, eval_loader, config, mesh
                        )
                        report.evaluation(step, means)
                        if best is not None and best.offer(step, weights, measured, means):
                            value = means[best.metric]
                            LOG.info("best so far: %s %.4f at step %d", best.metric, value, step)
                    if previews:
                        raw = first_batches(preview_loader, 1)[0]
                        report.preview(step, task.preview(weights, frozen, raw), raw.get("image"))
        return state

    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.closing(checkpoints))
        if best is not None:
            opened.enter_context(contextlib.closing(best))
        preemption = opened.enter_context(Preemption().watch())
        rollbacks = task.rollbacks(state)
        while True:
            try:
                state = run(start, state, preemption)
                break
            except TrainingDiverged as error:
                # A step is a function of state and step number: a run that is killed after this
                # reaches the same point again.
                good, most, rollbacks = checkpoints.latest(), task.max_rollbacks, rollbacks + 1
                if good is None or rollbacks > most:
                    raise TrainingDiverged(
                        error.reason,
                        f"the last good checkpoint is that of step {good}, in {checkpoints.path}: "
                        "lower optim.lr or set optim.clip, with another --workdir",
                    ) from None
                where = error.reason, good, rollbacks, most
                LOG.warning("%s: back to step %d (%d of at most %d times)", *where)
                start, state = good, task.recover(checkpoints.restore(good, like)[0], rollbacks)

        # ------------------------------------------------------------------------------- export
        checkpoints.latest()  # waits: an asynchronous save holds a copy of the state
        export(task, model_dir, int(state.step), lambda: task.weights(state))
        if best is not None and (top := best.best()) is not None:
            folder = workdir / "model_best"
            export(task, folder, top, lambda: best.restore(top, task.weights(like))[0])
            LOG.info("the best by %s, of step %d, is in %s", best.metric, top, folder)
    if is_first():
        facts = {
            "task": config.task,
            "data": f"{config.data.path}: {counts[0]} pictures to train on, {counts[1]} held out",
            "parameters": f"{total:.2f} M ({by_part})",
        }
        LOG.info("the report is %s", write_page(workdir, config, facts))
    LOG.info("finished: the model is in %s", model_dir)
    return model_dir


def export(task: Task, model_dir: Path, steps: int, weights: Callable[[], Any]) -> None:
    """Writes ``weights()`` as a model directory, unless there is one of as many steps."""
    with contextlib.suppress(CheckpointError):
        if read_config(model_dir).get("trained_steps") == steps:
            return
    barrier("export")
    if is_first():
        remove_tree(model_dir)
    barrier("removed")
    config, params = task.export(weights())
    save_model(model_dir, {**config, "trained_steps": steps}, params)


def run_evaluation(
    evaluate: Any,
    weights: Any,
    frozen: Any,
    task: Task,
    loader: AnyLoader,
    config: Any,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Returns the mean metrics of ``config.eval_batches`` batches.

    Every batch draws its own noise, the same at every evaluation.
    """
    results = []
    for i, raw in enumerate(first_batches(loader, config.eval_batches)):
        first_row = i * config.batch_size + jax.process_index() * len(raw["caption"])
        batch = global_rows(task.host_batch(raw, first_row), mesh)
        results.append(jax.device_get(evaluate(weights, frozen, batch)))
    return task.summary({k: float(np.mean([r[k] for r in results])) for k in results[0]})


def mesh_of(config: Any) -> jax.sharding.Mesh:
    """Makes the mesh of a config; ConfigError where the devices or the batch do not fit it."""
    axes = plain(config.mesh)
    zero1 = axes.pop("zero1")
    split = axes["fsdp"] != 1 or axes["tensor"] != 1 or zero1
    if config.parallel == "pmap" and (split or jax.process_count() > 1):
        raise ConfigError(
            "parallel='pmap' is for one host, with the whole model on every device: "
            "use 'jit' with this mesh"
        )
    mesh = make_mesh(**axes)
    check_rows(config, row_shards(mesh))
    return mesh
