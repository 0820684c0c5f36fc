"""Times the UNet's forward pass, ours and PyTorch's.

    python -m benchmarks.unet_forward [--case emoji sd_v1_quarter] [--batch 1 8] [--json out.json]

Same weights, same inputs; the results are compared before anything is timed. On a CPU our side
divides the rows of a batch among the cores, as the pipeline does. Needs PyTorch:
pip install -e ".[parity]".
"""

from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.side_by_side import (
    as_numpy,
    check_same,
    compare,
    in_torch,
    jitted,
    run_cases,
    summary,
)
from benchmarks.unets import CASES, pair


def measure(name: str, batch: int, args: Any) -> dict[str, Any]:
    """One case at one batch."""
    made = pair(name, batch, args.dtype)
    run = lambda p, *a: made.unet.apply({"params": p}, *a)  # noqa: E731
    ours, flops, out = jitted(run, made.params, *made.inputs, by_rows=True)
    twin = made.twin.eval().requires_grad_(False)
    check_same(out, as_numpy(twin(*made.torch_inputs)), 1e-4 if args.dtype == "float32" else 5e-2)
    sides = {"ours": ours, "eager": in_torch(lambda: twin(*made.torch_inputs))}
    if args.compile:
        faster = torch.compile(twin)
        sides["torch.compile"] = in_torch(lambda: faster(*made.torch_inputs))
    what = f"{name} forward, batch {batch}, {args.dtype}"
    return summary(what, sides, compare(sides, args.repeats), flops)


if __name__ == "__main__":
    run_cases(__doc__, CASES, ["emoji", "sd_v1_quarter"], measure)
