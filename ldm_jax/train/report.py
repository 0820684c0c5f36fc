"""The record of a run: progress line, TensorBoard, metrics.jsonl, Weights & Biases, previews."""

import contextlib
import importlib
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from ldm_jax.distributed.processes import is_first
from ldm_jax.errors import ConfigError, TrainingDiverged
from ldm_jax.io import png
from ldm_jax.train.tasks.base import Task

LOG = logging.getLogger(__name__)


class Report:
    """Writes down how a run goes, and stops it when it diverges.

    Processes other than the first write nothing, and only watch for divergence.

    Args:
      workdir: The run folder.
      config: The config.
      task: Says which metrics are watched, and what is wrong with them.
      first: The step that the run starts after; later records of a killed run are dropped.
      rate: The learning rate by step.

    Attributes:
      suspect: Whether the last step was close to divergence: its state must not be saved.
    """

    def __init__(
        self, workdir: Path, config: Any, task: Task, first: int, rate: Callable[[int], Any]
    ):
        import tensorboardX
        from tqdm import tqdm

        self.config, self.task, self.rate = config, task, rate
        self.previews = workdir / "previews"
        self.writes = is_first()
        if self.writes:
            self.previews.mkdir(exist_ok=True)
            purge = first + 1 if first else None
            self.board = tensorboardX.SummaryWriter(str(workdir), purge_step=purge, flush_secs=30)
            self.jsonl = reopen_metrics(workdir / "metrics.jsonl", first)
            self.wandb = open_wandb(workdir, config)
        self.terminal = self.writes and sys.stderr.isatty()
        self.bar = tqdm(
            total=config.steps,
            initial=first,
            unit="step",
            disable=not self.terminal,
            dynamic_ncols=True,
        )
        self.since, self.logged, self.waited = time.perf_counter(), first, 0.0
        self.suspect, self.warned = False, False

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Records the metrics of one step; TrainingDiverged where the task sees a problem."""
        names = [name for name in self.task.watched if name in metrics]
        watched = {k: float(v) for k, v in jax.device_get({k: metrics[k] for k in names}).items()}
        if problem := self.task.problem(watched):
            advice = "lower optim.lr or set optim.clip, with another --workdir"
            raise TrainingDiverged(f"{problem} at step {step}", advice)
        self.suspect, warning = self.task.is_suspect(watched), self.task.warning(watched)
        if warning and not self.warned:
            LOG.warning("step %d: %s", step, warning)
        self.warned = bool(warning)
        self.bar.update(step - self.bar.n)
        if self.writes and (step % self.config.log_every == 0 or step == self.config.steps):
            self._log(step, {k: float(v) for k, v in metrics.items()})

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        per_second = (step - self.logged) * self.config.batch_size / seconds
        waited = min(self.waited / seconds, 1.0)
        left = (self.config.steps - step) * self.config.batch_size / max(per_second, 1e-9)
        self.since, self.logged, self.waited = now, step, 0.0
        values = metrics | {
            "learning_rate": float(self.rate(step - 1)),
            "images_per_second": per_second,
            "waited_for_data": waited,
        }
        self._write(step, "train", values)
        line = f"loss {metrics['loss']:.4f}, {per_second:.1f} images/s, {clock(left)} left"
        if waited > 0.05:
            line += f"; waits {100 * waited:.0f} % of the time for data"
        if self.terminal:
            self.bar.set_postfix_str(line)
        else:
            LOG.info("step %d/%d: %s", step, self.config.steps, line)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Records the means of a validation."""
        if self.writes:
            self._write(step, "validation", values)
            shown = (f"{k} {v:.4f}" for k, v in values.items() if k in self.task.headline)
            LOG.info("validation at step %d: %s", step, ", ".join(shown))

    def preview(self, step: int, image: np.ndarray) -> None:
        """Records a picture uint8 [H, W, 3]."""
        if self.writes:
            png.save_png(self.previews / f"{step:07d}.png", image)
            self.board.add_image("preview", image, step, dataformats="HWC")
            if self.wandb is not None:
                self.wandb.log({"preview": find_wandb().Image(image), "step": step})

    @contextlib.contextmanager
    def waiting(self, running: Any) -> Iterator[None]:
        """Counts the time inside as waiting for data, unless the device was busy throughout.

        Args:
          running: Results of the step on the device: where they are there before the batch is, the
            device has waited, for a part at least of the time that is counted.
        """
        began = time.perf_counter()
        yield
        if running is None or all(leaf.is_ready() for leaf in jax.tree.leaves(running)):
            self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Does not count the time inside as training."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def _write(self, step: int, part: str, values: dict[str, float]) -> None:
        named = {f"{part}/{key}": value for key, value in values.items()}
        for key, value in named.items():
            self.board.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(named | {"step": step})
        rounded = {k: float(f"{v:.6g}") for k, v in values.items()}
        self.jsonl.write(json.dumps({"step": step, "part": part, **rounded}) + "\n")
        self.jsonl.flush()

    def close(self) -> None:
        """Closes the files."""
        self.bar.close()
        if self.writes:
            self.board.close()
            self.jsonl.close()
            if self.wandb is not None:
                self.wandb.finish()


def reopen_metrics(file: Path, first: int) -> TextIO:
    """Opens ``file`` to append to, without the lines of steps after ``first``."""
    lines = file.read_text().splitlines() if first and file.exists() else []
    opened = file.open("w")
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line may be incomplete
            if json.loads(line)["step"] <= first:
                opened.write(line + "\n")
    return opened


def find_wandb() -> Any:
    """Imports wandb; ConfigError where it is not installed."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a folder of that name, which its runs leave, imports too
        raise ConfigError(
            "wandb.project: wandb is not installed: pip install wandb, or leave the project empty"
        )
    return wandb


def open_wandb(workdir: Path, config: Any) -> Any:
    """Opens or resumes the Weights & Biases run of ``workdir``; None without a project.

    Points are placed by their own "step": wandb's counter would drop the steps that a killed run
    has logged and this one repeats.
    """
    if not config.wandb.project:
        return None
    wandb, file = find_wandb(), workdir / "wandb_id.txt"
    name = file.read_text().strip() if file.exists() else ""
    if not name:
        name = uuid.uuid4().hex
        file.write_text(name + "\n")
    try:
        run = wandb.init(
            project=config.wandb.project,
            dir=str(workdir),
            name=workdir.name,
            id=name,
            resume="allow",
            config=json.loads(config.to_json_best_effort()),
            allow_val_change=True,  # of the settings that a resumed run may change
        )
    except Exception as error:  # wandb's own errors: no account, no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"wandb.project: wandb cannot start ({reason[:200]}): correct that, or leave it empty"
        ) from None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def clock(seconds: float) -> str:
    """Formats a duration as 1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
