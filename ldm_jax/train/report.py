"""How a run says how it goes: a progress line, TensorBoard, metrics.jsonl, Weights & Biases, preview pictures, and a stop when it goes wrong."""

import contextlib
import importlib
import json
import logging
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from ldm_jax.distributed.parallel import is_first
from ldm_jax.errors import ConfigError, TrainingDiverged
from ldm_jax.io import png as pictures
from ldm_jax.io.checkpoint import TrainingCheckpoints

LOG = logging.getLogger(__name__)
WATCHED = (
    "loss",
    "grad_norm",
    "disc_loss",
    "disc_grad_norm",
    "rise",
    "d_weight",
    "disc_factor",
)  # looked at after every step


class Report:
    """Says how it goes: a progress line, TensorBoard, metrics.jsonl, Weights & Biases where a project is named, preview pictures."""

    def __init__(self, workdir: Path, config: Any, first: int):
        import tensorboardX
        from tqdm import tqdm

        self.workdir, self.config, self.previews = workdir, config, workdir / "previews"
        self.speaks = is_first()  # the other processes only watch that the loss is a number
        if self.speaks:
            self.previews.mkdir(exist_ok=True)
            purge = first + 1 if first else None
            self.board = tensorboardX.SummaryWriter(str(workdir), purge_step=purge, flush_secs=30)
            self.jsonl = reopen_metrics(workdir / "metrics.jsonl", first)
            self.wandb = open_wandb(workdir, config)
        self.terminal = self.speaks and sys.stderr.isatty()
        self.bar = tqdm(
            total=config.steps,
            initial=first,
            unit="step",
            disable=not self.terminal,
            dynamic_ncols=True,
        )
        self.since, self.last = time.perf_counter(), first
        self.waited = 0.0
        self.rise, self.doubt = config.guard.rise if "guard" in config else 0.0, False
        self.alarm, self.alarmed = config.adversary.alarm if "adversary" in config else 0.0, False

    def step(
        self, step: int, metrics: dict[str, jax.Array], rate: Any, checkpoints: TrainingCheckpoints
    ) -> None:
        """Takes one step's metrics; raises TrainingDiverged where `what_is_wrong` says something.

        ``doubt`` is on while a step is half-way there, and no good to go back to.
        """
        if step <= self.last:
            return
        watched = jax.device_get({name: metrics[name] for name in WATCHED if name in metrics})
        loss = float(watched["loss"])
        if wrong := what_is_wrong(watched, self.rise):
            raise TrainingDiverged(
                f"{wrong} at step {step}",
                f"the last good checkpoint is that of step {checkpoints.latest()}, in {checkpoints.path}: "
                "lower optim.lr or set optim.clip, with another --workdir",
            )
        self.doubt = bool(what_is_wrong(watched, self.rise**0.5))
        self._watch(step, watched)
        self.bar.update(step - self.bar.n)
        if not self.speaks:
            return
        if step % self.config.log_every and step != self.config.steps:
            return
        now = time.perf_counter()
        took = max(now - self.since, 1e-9)
        per_second, waited = (
            (step - self.last) * self.config.batch_size / took,
            min(self.waited / took, 1.0),
        )
        left = (self.config.steps - step) * self.config.batch_size / per_second
        self.since, self.last, self.waited = now, step, 0.0
        values = {k: float(v) for k, v in metrics.items()} | {
            "learning_rate": float(rate(step - 1)),
            "images_per_second": per_second,
            "waited_for_data": waited,
        }
        self._write(step, "train", values)
        line = f"loss {loss:.4f}, {per_second:.1f} images/s, {clock(left)} left"
        if waited > 0.05:
            line += f"; waits {100 * waited:.0f} % of the time for data"
        if self.terminal:
            self.bar.set_postfix_str(line)
        else:
            LOG.info("step %d/%d: %s", step, self.config.steps, line)

    def _watch(self, step: int, metrics: dict[str, Any]) -> None:
        """Says once that d_weight has gone above the alarm while it counts, and again only after it was below."""
        if self.alarm and metrics.get("disc_factor"):
            d_weight = float(metrics["d_weight"])
            if d_weight > self.alarm and not self.alarmed:
                LOG.warning(
                    "step %d: d_weight is %.4g, above adversary.alarm %g: the adversary may ruin the reconstructions; "
                    "adversary.cap bounds it, a lower adversary.weight weakens it",
                    step,
                    d_weight,
                    self.alarm,
                )
            self.alarmed = d_weight > self.alarm

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Takes a validation's means."""
        if not self.speaks:
            return
        self._write(step, "validation", values)
        shown = {k: v for k, v in values.items() if k in ("loss", "loss_simple", "psnr")}
        LOG.info(
            "validation at step %d: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in shown.items())
        )

    def preview(self, step: int, image: np.ndarray) -> None:
        """Takes a picture."""
        if not self.speaks:
            return
        pictures.save_png(self.previews / f"{step:07d}.png", image)
        self.board.add_image("preview", image, step, dataformats="HWC")
        if self.wandb is not None:
            self.wandb.log({"preview": find_wandb().Image(image), "step": step})

    @contextlib.contextmanager
    def waiting(self, running: Any) -> Iterator[None]:
        """A batch is read inside, while the device is at the step whose results are ``running``: it waited if they are there before the batch is.

        Then all the time inside is counted, of which the device may have worked for a part.
        """
        began = time.perf_counter()
        yield
        if running is None or all(leaf.is_ready() for leaf in jax.tree.leaves(running)):
            self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def _write(self, step: int, part: str, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.board.add_scalar(f"{part}/{key}", value, step)
        if self.wandb is not None:
            self.wandb.log(
                {f"{part}/{key}": value for key, value in values.items()} | {"step": step}
            )
        rounded = {k: float(f"{v:.6g}") for k, v in values.items()}
        self.jsonl.write(json.dumps({"step": step, "part": part, **rounded}) + "\n")
        self.jsonl.flush()

    def close(self) -> None:
        self.bar.close()
        if self.speaks:
            self.board.close()
            self.jsonl.close()
            if self.wandb is not None:
                self.wandb.finish()


def what_is_wrong(metrics: dict[str, Any], rise: float = 0.0) -> str:
    """Why a step's metrics say that training diverged, "" where they do not: a loss or gradient, of either network, that is not finite, or a
    reconstruction loss that has risen more than ``rise`` times above its lowest (0: any).
    """
    for loss, norm, whose in (
        ("loss", "grad_norm", ""),
        ("disc_loss", "disc_grad_norm", "discriminator's "),
    ):
        if loss in metrics and not (
            np.isfinite(float(metrics[loss])) and np.isfinite(float(metrics[norm]))
        ):
            return f"the {whose}loss is {float(metrics[loss])} and its gradient's norm {float(metrics[norm])}"
    if rise and float(metrics.get("rise", 0.0)) > rise:
        return f"the reconstruction loss is {float(metrics['rise']):.2f} times its lowest"
    return ""


def reopen_metrics(file: Path, first: int) -> TextIO:
    """``file`` to append to, without the lines of steps after ``first``, which a killed run wrote and this one takes again."""
    lines = file.read_text().splitlines() if first and file.exists() else []
    opened = file.open("w")
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line may be a half
            if json.loads(line)["step"] <= first:
                opened.write(line + "\n")
    return opened


def find_wandb() -> Any:
    """The module; ConfigError where it is not installed."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a folder of that name, as its runs leave behind, imports too
        raise ConfigError(
            "wandb.project: wandb is not installed: pip install wandb, or leave the project empty"
        )
    return wandb


def open_wandb(workdir: Path, config: Any) -> Any:
    """The run of this ``workdir`` in the project that the config names, gone on with where it is one already; None without a project.

    Points are placed by their own "step": its counter would drop those of steps that a killed run has told and this one takes again.
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
            allow_val_change=True,  # of what a resumed run may change
        )
    except Exception as error:  # its own errors: no account, no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"wandb.project: wandb cannot start ({reason[:200]}): see to it, or leave it empty"
        ) from None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
