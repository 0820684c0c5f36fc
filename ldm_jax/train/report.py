"""The record of a run: progress line, TensorBoard, metrics.jsonl, Weights & Biases, previews.

TensorBoard and Weights & Biases have the groups train/ and eval/, bins/ (validation by parts, see
`Task.bins`), speed/, data/ and previews/.
"""

import contextlib
import importlib
import json
import logging
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from ldm_jax.data.pixels import as_rgb
from ldm_jax.distributed.chips import chip_of
from ldm_jax.distributed.flops import PRODUCTS, count_flops
from ldm_jax.distributed.processes import is_first
from ldm_jax.errors import ConfigError, TrainingDiverged
from ldm_jax.io import png
from ldm_jax.io.mirror import Mirror
from ldm_jax.train.tasks.base import Task

LOG = logging.getLogger(__name__)

PARTS = {"train": "train", "validation": "eval"}  # part of metrics.jsonl -> group
# Metrics of this module -> group; the others are the task's.
GROUPS = {
    "images_per_second": "speed",
    "mfu": "speed",
    "memory_gib": "speed",
    "waited_for_data": "data",
}


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
      useful: FLOPs of a step that count for the MFU; 0 where they or the peak are not known.
    """

    def __init__(
        self, workdir: Path, config: Any, task: Task, first: int, rate: Callable[[int], Any]
    ):
        import tensorboardX
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.config, self.task, self.rate = config, task, rate
        self.writes = is_first()
        self.terminal = self.writes and sys.stderr.isatty()
        self.opened = contextlib.ExitStack()
        if self.writes:
            self.files = Mirror(workdir)
            local = self.files.local
            self.previews = local / "previews"
            self.previews.mkdir(exist_ok=True)
            purge = first + 1 if first else None
            self.board = tensorboardX.SummaryWriter(str(local), purge_step=purge, flush_secs=30)
            self.jsonl = reopen_metrics(self.files.fetch("metrics.jsonl"), first)
            self.files.fetch("wandb_id.txt")
            self.wandb = open_wandb(local, config, workdir.name)
            shown = f"{workdir / 'previews'}; {workdir / 'metrics.jsonl'}"
            LOG.info("progress: tensorboard --logdir %s; %s", workdir, shown)
        # A line that is redrawn and cut to the terminal's width; a log file has a line a record.
        self.bar = tqdm(
            total=config.steps,
            initial=first,
            bar_format="{percentage:3.0f} % |{bar:8}| {n_fmt}/{total_fmt}{desc}",
            disable=not self.terminal,
            dynamic_ncols=True,
        )
        if self.terminal:
            self.opened.enter_context(logging_redirect_tqdm([logging.getLogger("ldm_jax")]))
        self.since, self.logged, self.waited = time.perf_counter(), first, 0.0
        self.suspect = self.warned = self.shown = False
        self.useful, self.peak = 0.0, 0.0

    def count(self, step: Any, *arguments: Any) -> None:
        """Counts the FLOPs of a compiled step, where the peak of the devices is known.

        With ``config.remat`` no MFU is recorded: the step as traced computes more than is useful.
        """
        chip = chip_of(jax.devices()[0].device_kind)
        if self.writes and chip is not None and self.config.remat == "none":
            flops = count_flops(step.trace(*arguments).jaxpr.jaxpr)
            # The body of a program of mode "pmap" is that of one device.
            devices = 1 if self.config.parallel == "pmap" else jax.device_count()
            self.useful, self.peak = sum(flops[kind] for kind in PRODUCTS), devices * chip.peak

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
            self.files.push_sometimes()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        per_second = (step - self.logged) * self.config.batch_size / seconds
        waited = min(self.waited / seconds, 1.0)
        left = (self.config.steps - step) * self.config.batch_size / max(per_second, 1e-9)
        mfu = self.useful * (step - self.logged) / seconds / self.peak if self.useful else None
        self.since, self.logged, self.waited = now, step, 0.0
        values = metrics | {
            "learning_rate": float(self.rate(step - 1)),
            "images_per_second": per_second,
            "waited_for_data": waited,
            "memory_gib": memory() / 2**30,
        }
        values |= {} if mfu is None else {"mfu": mfu}
        self._write(step, "train", values)
        # The most important first: a narrow terminal cuts the end off.
        parts = [
            f"loss {metrics['loss']:.4f}",
            f"{per_second:.1f} images/s",
            f"{clock(left)} left",
            f"waits {100 * waited:.0f} % of the time for data" if waited > 0.05 else "",
            "" if mfu is None else f"MFU {100 * mfu:.0f} %",
            f"{values['memory_gib']:.1f} GiB",
        ]
        line = ", ".join(filter(None, parts))
        if self.terminal:
            self.bar.set_description_str(f": {line}")
        else:
            LOG.info("step %d/%d: %s", step, self.config.steps, line)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Records the means of a validation."""
        if self.writes:
            self._write(step, "validation", values)
            shown = (f"{k} {v:.4f}" for k, v in values.items() if k in self.task.headline)
            LOG.info("validation at step %d: %s", step, ", ".join(shown))

    def preview(self, step: int, made: np.ndarray, real: np.ndarray | None = None) -> None:
        """Records a picture uint8 [H, W, 3] of the progress.

        Args:
          step: The step.
          made: The picture.
          real: The held-out pictures that it belongs to, [n, H, W, c]; recorded once.
        """
        if not self.writes:
            return
        png.save_png(self.previews / f"{step:07d}.png", made)
        shown = {"previews/made": made}
        if real is not None and not self.shown:
            shown["previews/real"] = png.grid(as_rgb(real[:16]))
        self.shown = True
        for name, image in shown.items():
            self.board.add_image(name, image, step, dataformats="HWC")
            if self.wandb is not None:
                self.wandb.log({name: find_wandb().Image(image), "step": step})

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
        named = {f"{self._group(part, name)}/{name}": value for name, value in values.items()}
        for key, value in named.items():
            self.board.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(named | {"step": step})
        rounded = {k: float(f"{v:.6g}") for k, v in values.items()}
        self.jsonl.write(json.dumps({"step": step, "part": part, **rounded}) + "\n")
        self.jsonl.flush()

    def _group(self, part: str, name: str) -> str:
        """Returns the group of a metric."""
        of_part = "bins" if part == "validation" and name in self.task.bins else PARTS[part]
        return GROUPS.get(name, of_part)

    def publish(self) -> None:
        """Copies the files to a run folder in a bucket, so that a saved step has its record."""
        if self.writes:
            self.board.flush()
            self.files.push()

    def close(self) -> None:
        """Closes the files."""
        self.opened.close()
        self.bar.close()
        if self.writes:
            self.board.close()
            self.jsonl.close()
            if self.wandb is not None:
                self.wandb.finish()
            self.files.close()


def memory() -> int:
    """Returns the most bytes used so far: of the first device, or of this process on a CPU."""
    found = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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


def open_wandb(workdir: Path, config: Any, title: str) -> Any:
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
            name=title,
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
