"""Measures peak host memory of making and restoring a full-size model on simulated devices.

    python -m benchmarks.host_memory [--config txt2img_1p4b] [--devices 8] [--folder DIR] [--json F]

Each run is a process of its own on simulated CPU devices that share the host's memory, with the
mesh's fsdp axis over all of them. "made": the parameters of the training task, drawn as every run
does at its start. "restored": the same from a checkpoint that the first process wrote. Prints the
largest resident set, imports and compiler included, over the bytes of the parameters. Needs disk
for the checkpoint.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GB = 1e9


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(part: str, name: str, folder: Path) -> dict[str, Any]:
    """Makes or restores, and says what it took."""
    import jax

    from ldm_jax.distributed.compile import make_placed
    from ldm_jax.distributed.mesh import make_mesh
    from ldm_jax.distributed.shardings import shardings
    from ldm_jax.io.checkpoint import TrainingCheckpoints
    from ldm_jax.train.tasks.diffusion import DiffusionTask

    config = __import__(f"configs.{name}", fromlist=["get_config"]).get_config()
    # Its first stage is another run's, and frozen: not what is measured.
    task = DiffusionTask.from_config(config, weights=False)
    mesh = make_mesh(fsdp=len(jax.devices()), data=1)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    placed = shardings(shapes, mesh)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    checkpoints = TrainingCheckpoints(folder, keep=1)
    before, began = peak(), time.perf_counter()
    if part == "made":
        state = make_placed(task.init, jax.random.key(0), placed)
    else:
        like = jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, placed
        )
        state = jax.block_until_ready(checkpoints.restore(0, like)[0])
    result = {
        "part": part,
        "bytes": size,
        "peak": peak(),
        "before": before,
        "seconds": time.perf_counter() - began,
    }
    held = {}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    result["largest_device"] = max(held.values())
    if part == "made":
        checkpoints.save(0, state, {})
    checkpoints.close()
    return result


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="txt2img_1p4b")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="for the checkpoint (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--part", choices=("made", "restored"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(child(args.part, args.config, args.folder)))
        return

    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(args.devices),
        }
        for part in ("made", "restored"):
            command = [sys.executable, "-m", "benchmarks.host_memory", "--part", part]
            command += ["--config", args.config, "--folder", folder]
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
            r = results[-1]
            print(
                f"{part}: parameters {r['bytes'] / GB:.2f} GB, at most "
                f"{r['largest_device'] / GB:.2f} GB on one device; peak {r['peak'] / GB:.2f} GB, "
                f"of which {r['before'] / GB:.2f} GB before the start: "
                f"{r['peak'] / r['bytes']:.2f} x the parameters, {r['seconds']:.0f} s",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
