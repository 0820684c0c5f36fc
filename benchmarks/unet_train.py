"""Times the UNet's forward and backward pass, ours and PyTorch's.

    python -m benchmarks.unet_train [--case emoji sd_v1_quarter] [--batch 1 8] [--json out.json]

The gradients of a mean square by all parameters; same weights, same inputs, one gradient of the two
compared before anything is timed. Needs PyTorch: pip install -e ".[parity]".
"""

from typing import Any

import jax
import jax.numpy as jnp
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.side_by_side import check_same, compare, in_torch, jitted, run_cases, summary
from benchmarks.unets import CASES, pair


def measure(name: str, batch: int, args: Any) -> dict[str, Any]:
    """One case at one batch."""
    made = pair(name, batch, args.dtype)

    def loss(params: Any, *inputs: Any) -> Any:
        out: Any = made.unet.apply({"params": params}, *inputs)
        return jnp.square(out).mean()

    def backward(module: torch.nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        module(*made.torch_inputs).square().mean().backward()

    ours, flops, grads = jitted(jax.grad(loss), made.params, *made.inputs)
    backward(made.twin)
    first: Any = made.twin.input_blocks_0_0
    theirs = first.weight.grad.float().cpu().permute(2, 3, 1, 0).numpy()
    check_same(
        grads["input_blocks_0_0"]["kernel"], theirs, 1e-3 if args.dtype == "float32" else 1e-1
    )
    sides = {"ours": ours, "eager": in_torch(lambda: backward(made.twin))}
    if args.compile:
        faster: Any = torch.compile(made.twin)
        sides["torch.compile"] = in_torch(lambda: backward(faster))
    what = f"{name} forward and backward, batch {batch}, {args.dtype}"
    return summary(what, sides, compare(sides, args.repeats), flops)


if __name__ == "__main__":
    run_cases(__doc__, CASES, ["emoji", "sd_v1_quarter"], measure)
