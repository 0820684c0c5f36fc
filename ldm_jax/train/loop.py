"""The one training loop."""

import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax import pictures
from ldm_jax.checkpoint import CheckpointError, TrainingCheckpoints, read_config, save_model
from ldm_jax.data import ImageTransform, Loader, make_source
from ldm_jax.latent import DTYPES, ConfigError, nearest
from ldm_jax.parallel import compile_step, make_mesh
from ldm_jax.train.optim import learning_rate, make_optimizer
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


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number; the message names the last good checkpoint."""


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
    tx = make_optimizer(config.optim, config.steps)
    mesh = make_mesh()
    replicated = NamedSharding(mesh, PartitionSpec())

    def init(key: jax.Array) -> TrainState:
        return create_state(task.init(key), tx, ema=config.ema > 0)

    # ------------------------------------------------------------------------------------ begin, or resume
    claim_workdir(
        workdir, plain(config)
    )  # only now: a mistake in the settings above leaves nothing behind that holds on to them
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
    evaluate = jax.jit(task.evaluate)
    rate = learning_rate(config.optim, config.steps)

    # ------------------------------------------------------------------------------------------------ loop
    report = Report(workdir, config, first)
    unread: tuple[int, dict] | None = None  # the metrics of the step before: read while the device runs the next
    with contextlib.closing(train_loader.iterate(first)) as batches, contextlib.closing(report):
        for step, raw in zip(range(first + 1, config.steps + 1), batches, strict=False):
            state, metrics = step_fn(state, frozen, task.host_batch(raw))
            if unread is not None:
                report.step(*unread, rate, checkpoints)
            unread = (step, metrics)

            saving = step % config.save_every == 0 or step == config.steps
            if saving or step % config.eval_every == 0 or step % config.preview_every == 0:
                report.step(*unread, rate, checkpoints)  # nothing is saved or shown before its loss was seen
                unread = None
            params = state.params if state.ema is None else state.ema
            if step % config.eval_every == 0 or step == config.steps:
                report.evaluation(
                    step, run_evaluation(evaluate, params, frozen, task, eval_loader, config.eval_batches)
                )
            if step % config.preview_every == 0 or step == config.steps:
                report.preview(step, task.preview(params, frozen, next(iter(first_batches(eval_loader, 1, raw=True)))))
            if saving:
                checkpoints.save(step, state, prepared)
    checkpoints.close()

    # ----------------------------------------------------------------------------------------------- export
    if not (model_dir / "config.json").exists():
        params = state.params if state.ema is None else state.ema
        exported, arrays = task.export(params)
        save_model(model_dir, exported, arrays)
    LOG.info("finished: the model is in %s", model_dir)
    return model_dir


def check_config(config: Any) -> None:
    """ConfigError for what would fail only later."""
    if config.task not in TASKS:
        raise ConfigError(f"task {config.task!r} does not exist{nearest(config.task, TASKS)}")
    for name in ("steps", "batch_size", "save_every", "eval_every", "preview_every", "log_every"):
        if config[name] < 1:
            raise ConfigError(f"{name} must be at least 1, not {config[name]}")
    devices = jax.device_count()
    if config.batch_size % (devices * config.optim.accumulate):
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of {devices} devices x {config.optim.accumulate} accumulated parts"
        )


def claim_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Makes ``workdir`` this config's; refuses one that holds another run."""
    file = workdir / "config.json"
    if file.exists():
        there, here = flatten(json.loads(file.read_text())), flatten(config)
        differing = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k) and k.split(".")[-1] not in FREE]
        if differing:
            k = differing[0]
            more = f" (and {len(differing) - 1} more settings)" if len(differing) > 1 else ""
            raise ConfigError(
                f"{workdir} holds a run with {k}={there.get(k)!r}, not {here.get(k)!r}{more}: give another --workdir, or its own settings"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(f"{workdir} is not empty and holds no run of ours: give another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config, indent=1))
    except OSError as error:
        raise ConfigError(f"--workdir {workdir} cannot be written: {error.strerror}") from None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"a.b.c": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def make_loader(config: Any, part: str) -> Loader:
    """The loader of one part of the data; without a held-out part, validation looks at the training pictures."""
    data = plain(config.data)
    transform = ImageTransform(tuple(data.pop("size")), data.pop("crop"), data.pop("flip"))
    caption, workers = data.pop("caption"), data.pop("num_workers")
    if part == "validation" and not data.get("holdout"):
        part = "train"
    source = make_source({**data, "part": part})
    return Loader(
        source,
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        caption=caption,
        num_workers=workers if part == "train" else 0,
    )


def first_batches(loader: Loader, n: int, raw: bool = False) -> list[Any]:
    """The first ``n`` batches in the source's order, whole (with ``raw``) or the pictures alone."""
    with contextlib.closing(loader.batches(n)) as batches:
        return [batch if raw else batch["image"] for batch in batches]


def run_evaluation(evaluate: Any, params: Any, frozen: Any, task: Any, loader: Loader, n: int) -> dict[str, float]:
    """Mean metrics over ``n`` batches; every batch draws its own noise, the same at every evaluation."""
    results = []
    for i, raw in enumerate(first_batches(loader, n, raw=True)):
        results.append(jax.device_get(evaluate(params, frozen, task.host_batch(raw, first_row=i * len(raw["image"])))))
    return {k: float(np.mean([r[k] for r in results])) for k in results[0]}


class Report:
    """Says how it goes: a progress line, TensorBoard, metrics.jsonl, preview pictures."""

    def __init__(self, workdir: Path, config: Any, first: int):
        import tensorboardX
        from tqdm import tqdm

        self.workdir, self.config, self.previews = workdir, config, workdir / "previews"
        self.previews.mkdir(exist_ok=True)
        self.board = tensorboardX.SummaryWriter(str(workdir), purge_step=first + 1 if first else None, flush_secs=30)
        self.jsonl = (workdir / "metrics.jsonl").open("a")
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=config.steps, initial=first, unit="step", disable=not self.terminal, dynamic_ncols=True)
        self.since, self.last = time.perf_counter(), first

    def step(self, step: int, metrics: dict[str, jax.Array], rate: Any, checkpoints: TrainingCheckpoints) -> None:
        """Takes one step's metrics; raises TrainingDiverged on a loss that is not finite."""
        if step <= self.last:
            return
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise TrainingDiverged(
                f"the loss is {loss} at step {step}; the last good step is {checkpoints.latest()}, in {checkpoints.path}: "
                "lower optim.lr, or clip with optim.clip, and run the same command to go on from there"
            )
        self.bar.update(step - self.bar.n)
        if step % self.config.log_every and step != self.config.steps:
            return
        now = time.perf_counter()
        per_second = (step - self.last) * self.config.batch_size / (now - self.since)
        left = (self.config.steps - step) * self.config.batch_size / per_second
        self.since, self.last = now, step
        values = {k: float(v) for k, v in metrics.items()} | {
            "learning_rate": float(rate(step - 1)),
            "images_per_second": per_second,
        }
        self._write(step, "train", values)
        line = f"loss {loss:.4f}, {per_second:.1f} images/s, {clock(left)} left"
        if self.terminal:
            self.bar.set_postfix_str(line)
        else:
            LOG.info("step %d/%d: %s", step, self.config.steps, line)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Takes a validation's means."""
        self._write(step, "validation", values)
        shown = {k: v for k, v in values.items() if k in ("loss", "loss_simple", "psnr")}
        LOG.info("validation at step %d: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in shown.items()))
        self.since = time.perf_counter()

    def preview(self, step: int, image: np.ndarray) -> None:
        """Takes a picture."""
        pictures.save_png(self.previews / f"{step:07d}.png", image)
        self.board.add_image("preview", image, step, dataformats="HWC")
        self.since = time.perf_counter()

    def _write(self, step: int, part: str, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.board.add_scalar(f"{part}/{key}", value, step)
        self.jsonl.write(
            json.dumps({"step": step, "part": part, **{k: round(v, 6) for k, v in values.items()}}) + os.linesep
        )
        self.jsonl.flush()

    def close(self) -> None:
        self.bar.close()
        self.board.close()
        self.jsonl.close()


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


__all__ = ["CheckpointError", "TrainingDiverged", "train"]
