"""Compares training from images with training from their cached moments, taking turns.

    python -m benchmarks.latent_cache [--batch 64] [--json out.json]

Takes configs/emoji.py with the bundled first stage and images. Prints the time of a step with its
batch made and fetched as in a run, and of the step alone; the ratios with their quartiles; and the
encoder's share of the image step's products. With small batches the optimiser's passes over the
parameters, which do not depend on the cache, weigh more.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.configs import emoji
from ldm_jax.distributed.flops import PRODUCTS, count_flops
from ldm_jax.kernels.heap import keep_large_blocks
from ldm_jax.train.encode import encode
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.state import create_state
from ldm_jax.train.tasks.diffusion import DiffusionTask


class Run:
    """A training run, step by step."""

    def __init__(self, config: Any) -> None:
        self.task = DiffusionTask.from_config(config).with_measured({"scale_factor": 1.0})
        tx = make_optimizer(config.optim, config.steps)
        self.state = jax.jit(lambda key: create_state(self.task.init(key), tx, ema=True))(
            jax.random.key(0)
        )
        self.frozen = jax.device_put(self.task.frozen)
        self.batches = make_loader(config, "train").iterate()
        self.ready = self.task.host_batch(next(self.batches))
        step = self.task.make_step(tx, parts=1)
        given = self.state, self.frozen, self.ready
        counted = count_flops(
            jax.make_jaxpr(step)(*given).jaxpr
        )  # the compiler's own count has loops' bodies once
        self.flops = sum(counted[kind] for kind in PRODUCTS)
        self.step = jax.jit(step, donate_argnums=0).lower(*given).compile()

    def seconds(self, steps: int, fetch: bool) -> float:
        """Of one of so many steps."""
        began = time.perf_counter()
        for _ in range(steps):
            batch = self.task.host_batch(next(self.batches)) if fetch else self.ready
            self.state, _ = jax.block_until_ready(self.step(self.state, self.frozen, batch))
        return (time.perf_counter() - began) / steps


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    keep_large_blocks()  # as train.py does

    config: Any = emoji.get_config()
    config.batch_size = args.batch
    config.model.first_stage.path = "pkg:assets/emoji"
    config.data.path = "pkg:assets/emoji_subset.zip"
    with tempfile.TemporaryDirectory() as folder:
        cached = config.copy_and_resolve_references()
        cached.data.cache = str(encode(config, Path(folder) / "cache"))
        runs = {"pictures": Run(config), "cache": Run(cached)}
        times: dict[bool, dict[str, list[float]]] = {}
        with closing(runs["pictures"].batches), closing(runs["cache"].batches):
            for fetch in (True, False):
                times[fetch] = {name: [] for name in runs}
                for turn in range(args.rounds + 1):  # the first warms up
                    for name, run in runs.items():
                        seconds = run.seconds(args.steps, fetch)
                        times[fetch][name] += [seconds] if turn else []

    share = 1 - runs["cache"].flops / runs["pictures"].flops
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "batch": args.batch,
        "encoder_share": share,
    }
    for fetch, label in ((True, "training, with its data"), (False, "the step alone")):
        ratios = sorted(
            b / a for a, b in zip(times[fetch]["pictures"], times[fetch]["cache"], strict=True)
        )
        low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(
            f"{label}: {1 / ratio - 1:.1%} faster from a cache, in {ratio:.3f} of the time "
            f"({low:.3f} to {high:.3f})"
        )
        for name, seconds in times[fetch].items():
            middle = statistics.median(seconds)
            print(
                f"    from {name:9} {middle * 1e3:7.1f} ms a step, "
                f"{args.batch / middle:6.1f} images/s"
            )
        results[label] = {"seconds": times[fetch], "ratio": ratio}
    print(f"encoding is {share:.1%} of the picture step's arithmetic")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
