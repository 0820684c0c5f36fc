"""Times the compilation of text to image, cold and from the cache.

    python -m benchmarks.compile_time [--case sd_v1] [--steps 50] [--json out.json]

Each time is a process of its own: importing the project, finding the shapes of the weights (loading
a model does that too, to check it), tracing, and compiling or reading the persistent cache that the
first process filled. No weights are needed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def child(case: str, steps: int, batch: int, dtype: str) -> dict[str, float]:
    """Seconds of each part, in this process."""
    began = time.perf_counter()
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.models import bare
    from ldm_jax.diffusion.grids import time_grid
    from ldm_jax.diffusion.samplers import SAMPLERS
    from ldm_jax.kernels import cores, for_platform
    from ldm_jax.sampling.inputs import Inputs
    from ldm_jax.sampling.program import SamplingConfig, Steps, generate

    imported = time.perf_counter()
    cores.use_cores()
    count = cores.fewest(2 * batch, len(cores.devices()) or 1)
    model, size = bare(case, dtype)
    sampler = SAMPLERS["ddim"]
    schedule = jax.device_get(model.schedule)
    plan = Steps(sampler.nodes(schedule, time_grid("uniform", steps, schedule)))
    encoded = model.conditioner.encode_null(batch)
    rows = Inputs(np.zeros(batch, np.uint32), encoded, encoded, np.full(batch, 5.0, np.float32))
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), (model, plan, rows)
    )
    shaped = time.perf_counter()

    mesh = None if count == 1 else cores.mesh_of(cores.devices()[:count])
    kernels = for_platform(jax.default_backend(), differentiable=False, cores=mesh)

    def run(model: Any, plan: Steps, rows: Inputs) -> Any:
        return generate(model.with_kernels(kernels), sampler, plan, rows, SamplingConfig(size))

    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    step = jax.jit(run, in_shardings=whole, out_shardings=whole)
    lowered = step.lower(*shapes)
    traced = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    times = {
        "import": imported - began,
        "shapes": shaped - imported,
        "trace": traced - shaped,
        "compile": done - traced,
    }
    return {**times, "all": done - began}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=["emoji", "sd_v1"], default="sd_v1")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.case, args.steps, args.batch, args.dtype)))
        return
    results: dict[str, Any] = {
        "case": args.case,
        "steps": args.steps,
        "batch": args.batch,
        "dtype": args.dtype,
    }
    with tempfile.TemporaryDirectory() as cache:
        for turn in ("cold", "cached"):
            # JAX's variables override the project's own cache settings.
            settings = {
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            made = subprocess.run(
                [sys.executable, "-m", "benchmarks.compile_time", "--child", *sys.argv[1:]],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, **settings},
            )
            results[turn] = {
                name: round(s, 2) for name, s in json.loads(made.stdout.splitlines()[-1]).items()
            }
            print(
                f"{turn:7} " + ", ".join(f"{name} {s:.1f} s" for name, s in results[turn].items()),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
