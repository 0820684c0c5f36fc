"""What a latent cache saves: a training step from pictures beside one from cached moments, interleaved in one run.

    python -m benchmarks.latent_cache

Takes configs/emoji.py with the first stage that ships with the package, on random pictures (what they show costs nothing). Prints both times, the
ratio with its spread, and the share of the picture step's arithmetic that the encoder has by the compiler's own count.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import numpy as np

from configs import emoji
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.state import create_state
from ldm_jax.train.tasks import DiffusionTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()

    config: Any = emoji.get_config()
    config.model.first_stage.path = "pkg:assets/emoji"
    task = DiffusionTask(config)
    task.use({"scale_factor": 1.0})
    tx = make_optimizer(config.optim, config.steps)
    state = jax.jit(lambda key: create_state(task.init(key), tx, ema=True))(jax.random.key(0))
    step = jax.jit(task.make_step(tx, seed=0, ema=config.ema, parts=1))

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (args.batch, *config.data.size, 3)).astype(np.uint8)
    shared = {
        "row": np.arange(args.batch, dtype=np.int32),
        "encoded": task.model.conditioner.encode(["red apple"] * args.batch),
    }
    encode = jax.jit(lambda stage, x: stage.moments(x / np.float32(127.5) - 1))
    moments = np.asarray(encode(task.model.first_stage, image), np.float16)
    batches = {"pictures": {"image": image, **shared}, "cache": {"moments": moments, **shared}}

    flops = {}
    for name, batch in batches.items():
        compiled = step.lower(state, task.frozen, batch).compile()
        flops[name] = (compiled.cost_analysis() or {})["flops"]
        jax.block_until_ready(step(state, task.frozen, batch))
    times: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(args.rounds):
        for name, batch in batches.items():
            began = time.perf_counter()
            jax.block_until_ready(step(state, task.frozen, batch))
            times[name].append(time.perf_counter() - began)

    ratios = sorted(b / a for a, b in zip(times["pictures"], times["cache"], strict=True))
    low, ratio, high = (ratios[int(q * (len(ratios) - 1))] for q in (0.25, 0.5, 0.75))
    share = 1 - flops["cache"] / flops["pictures"]
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(
            f"from {name:9} {middle * 1e3:7.1f} ms a step, {args.batch / middle:6.1f} pictures/s, {flops[name] / 1e9:.1f} GFLOP"
        )
    print(f"the cached step takes {ratio:.2f} of the other's time (middle half {low:.2f} to {high:.2f})")
    print(f"encoding is {share:.0%} of the picture step's arithmetic")
    if args.json:
        told = {"batch": args.batch, "seconds": times, "flops": flops, "ratio": ratio, "encoder_share": share}
        with open(args.json, "w") as file:
            json.dump({"device": jax.devices()[0].device_kind, **told}, file, indent=1)


if __name__ == "__main__":
    main()
