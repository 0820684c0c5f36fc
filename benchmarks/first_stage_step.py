"""Times a training step of a first stage, fused and as the original computes it.

    python -m benchmarks.first_stage_step [--config configs/photos_kl_gan.py]
        [--size 64] [--batch 4] [--dtype float32] [--remat none] [--repeats 10]
        [--vgg VGG --heads HEADS] [--json out.json]

Both steps are compiled in one process and take turns; a time is that of a whole step. Printed are
the medians, and the ratio of the fused step to updates="parity", which runs the autoencoder and the
discriminator's view of it twice. The images are noise: no step depends on their content. Without
weights the perceptual term is left out of both.
"""

import argparse
import json
import runpy
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.kernels.heap import keep_large_blocks
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.state import create_state
from ldm_jax.train.tasks.autoencoder import AutoencoderTask


def prepared(config: Any, updates: str, batch: Any) -> tuple[Any, Any, Any]:
    """(compiled step, state, frozen) of a config under one kind of updates."""
    config = config.copy_and_resolve_references()
    config.updates = updates
    task, key = AutoencoderTask.from_config(config), jax.random.key(0)
    tx = make_optimizer(config.optim, config.steps)
    state = jax.jit(
        lambda key: create_state(task.init(key), tx, ema=config.ema > 0, extra=task.extra(key))
    )(key)
    step = task.make_step(tx, parts=1)
    frozen = jax.device_put(task.frozen)
    return jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile(), state, frozen


def measure(config: Any, repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns, by kind of update, the seconds of each step and the compiler's FLOPs of one."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (config.batch_size, *config.data.size, 3)).astype(np.uint8)
    batch = {"image": images, "row": np.arange(config.batch_size, dtype=np.int32)}
    runs = {update: prepared(config, update, batch) for update in ("parity", "fused")}
    states = {update: state for update, (_, state, _) in runs.items()}
    seconds: dict[str, list[float]] = {update: [] for update in runs}
    for repeat in range(repeats + 1):  # the first warms up
        for update, (step, _, frozen) in runs.items():
            began = time.perf_counter()
            states[update], metrics = step(states[update], frozen, batch)
            jax.block_until_ready((states[update], metrics))
            if repeat:
                seconds[update].append(time.perf_counter() - began)
    return seconds, {
        update: step.cost_analysis().get("flops", float("nan"))
        for update, (step, _, _) in runs.items()
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="configs/photos_kl_gan.py", help="a config with an adversary"
    )
    parser.add_argument("--size", type=int, default=64, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="", help="float32 or bfloat16, if not the config's")
    parser.add_argument(
        "--remat",
        default="",
        help="none or blocks, if not the config's: blocks are computed again in backward passes",
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--vgg", default="", help="VGG16's weights, for the perceptual term")
    parser.add_argument("--heads", default="", help="LPIPS' heads")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()

    config = runpy.run_path(args.config)["get_config"]()
    config.batch_size, config.data.size = args.batch, (args.size, args.size)
    config.loss.vgg16, config.loss.lpips_heads = args.vgg, args.heads
    config.dtype, config.remat = args.dtype or config.dtype, args.remat or config.remat
    keep_large_blocks()
    seconds, flops = measure(config, args.repeats)
    medians = {update: statistics.median(times) for update, times in seconds.items()}
    result = {
        "config": args.config,
        "device": jax.devices()[0].device_kind,
        "size": args.size,
        "batch": args.batch,
        "dtype": config.dtype,
        "remat": config.remat,
        "perceptual": bool(args.vgg),
        "repeats": args.repeats,
        "seconds": {update: round(median, 4) for update, median in medians.items()},
        "spread": {
            update: [round(min(times), 4), round(max(times), 4)]
            for update, times in seconds.items()
        },
        "ratio": round(medians["fused"] / medians["parity"], 3),
        "ratio_of_operations": round(flops["fused"] / flops["parity"], 3),
    }
    print(
        f"fused {medians['fused']:.3f} s, parity {medians['parity']:.3f} s a step: "
        f"ratio {result['ratio']:.3f}"
    )
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
