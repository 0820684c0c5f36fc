"""Compares ours with PyTorch's in one process, taking turns.

    python -m benchmarks.side_by_side forward.json train.json ...

prints the table of docs/performance.md from what the benchmarks wrote with --json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from jax.sharding import PartitionSpec

from ldm_jax.distributed.flops import PRODUCTS, count_flops
from ldm_jax.kernels import cores

# Peak bfloat16 TFLOP/s for utilisation: the H200's as sustained by large products, else the
# manufacturer's figure.
PEAKS = {"H200": 790.0, "H100": 989.0, "A100": 312.0}


class Side(NamedTuple):
    """One side of a comparison.

    Attributes:
      run: Does the work and waits for it.
      temporary: Bytes needed besides weights and inputs; None if unknown.
    """

    run: Callable[[], Any]
    temporary: float | None = None


def compare(sides: Mapping[str, Side], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each run, by side; the order turns round every time."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-warmup, repeats):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            began = time.perf_counter()
            sides[name].run()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(
    what: str, sides: Mapping[str, Side], seconds: Mapping[str, list[float]], flops: float
) -> dict[str, Any]:
    """Returns medians, ratios ours / theirs (median, quartiles), memory and FLOP/s."""
    ours, *others = seconds
    peak = next((p for name, p in PEAKS.items() if name in jax.devices()[0].device_kind), None)
    result: dict[str, Any] = {
        "what": what,
        "device": device_name(),
        "gflop": round(flops / 1e9, 2),
        "sides": {},
    }
    for name, times in seconds.items():
        median = statistics.median(times)
        entry: dict[str, Any] = {
            "ms": round(1e3 * median, 2),
            "gflop_per_s": round(flops / median / 1e9, 1),
        }
        if peak is not None:
            entry["utilisation"] = round(flops / median / 1e12 / peak, 3)
        if (temporary := sides[name].temporary) is not None:
            entry["temporary_mib"] = round(temporary / 2**20, 1)
        if name != ours:
            ratios = sorted(a / b for a, b in zip(seconds[ours], times, strict=True))
            entry["ratio"] = round(statistics.median(ratios), 3)
            entry["ratio_quartiles"] = [
                round(float(q), 3) for q in np.quantile(ratios, [0.25, 0.75])
            ]
        result["sides"][name] = entry
    if not others:
        raise ValueError("compare: one side alone")
    return result


def device_name() -> str:
    """What both sides ran on."""
    return (
        f"{torch.get_num_threads()} CPU cores"
        if jax.default_backend() == "cpu"
        else jax.devices()[0].device_kind
    )


def show(results: list[dict[str, Any]], path: Path | None) -> None:
    """A markdown table of the results, and the same as JSON at ``path``."""
    print(table(results))
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


def table(results: list[dict[str, Any]]) -> str:
    """One row for each pair."""
    head = "| | against | ours, ms | theirs, ms | ratio (quartiles) | ours, GFLOP/s "
    head += "| temporary MiB, ours / theirs |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for result in results:
        (_, ours), *others = result["sides"].items()
        for name, other in others:
            low, high = other["ratio_quartiles"]
            memory = " / ".join(str(side.get("temporary_mib", "?")) for side in (ours, other))
            speed = f"{ours['gflop_per_s']}" + (
                f" ({100 * ours['utilisation']:.0f} %)" if "utilisation" in ours else ""
            )
            lines.append(
                f"| {result['what']} | {name} | {ours['ms']} | {other['ms']} "
                f"| {other['ratio']} ({low} to {high}) | {speed} | {memory} |"
            )
    return "\n".join(lines)


def jitted(
    function: Callable[..., Any], *args: Any, by_rows: bool = False
) -> tuple[Side, float, Any]:
    """Compiles a function for ``args``.

    Args:
      function: Takes parameters and arrays with a leading batch axis.
      *args: The parameters, then the arrays.
      by_rows: Divide the arrays' rows among the CPU cores, as a pipeline does.

    Returns:
      (side, FLOPs of its products, result).
    """
    params, *rows = args
    count = cores.fewest(len(rows[0]), len(cores.devices()) or 1) if by_rows else 1
    if len(rows[0]) % count or count == 1:
        count = 1
        step: Any = jax.jit(function)
    else:
        mesh = cores.mesh_of(cores.devices()[:count])
        split = PartitionSpec(cores.AXIS)
        specs = (PartitionSpec(), *(split for _ in rows))
        step = jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
        )
        args = (cores.replicate(params, mesh), *(np.asarray(a) for a in rows))
    compiled = step.lower(*args).compile()
    memory = compiled.memory_analysis()
    temporary = None if memory is None else float(count * memory.temp_size_in_bytes)

    def run() -> Any:
        return jax.block_until_ready(compiled(*args))

    return Side(run, temporary), products(function, *args), run()


def products(function: Callable[..., Any], *args: Any) -> float:
    """Returns FLOPs of convolutions and products, from the trace: compilers count loops once."""
    counted = count_flops(jax.make_jaxpr(function)(*args).jaxpr)
    return float(sum(counted[kind] for kind in PRODUCTS))


def in_torch(function: Callable[[], Any]) -> Side:
    """Returns a side in PyTorch, with the peak memory of one run above its start."""
    cuda = torch.cuda.is_available()

    def run() -> None:
        function()
        if cuda:
            torch.cuda.synchronize()

    run()
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return Side(run, float(torch.cuda.max_memory_allocated() - before))
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return Side(run, float(max(0, np.cumsum([size for _, size in changes]).max(initial=0))))


def as_torch(array: Any, dtype: Any = None) -> torch.Tensor:
    """Copies an array to PyTorch; [b, h, w, c] becomes [b, c, h, w] in channels_last memory."""
    tensor = torch.from_numpy(np.array(array))
    if tensor.ndim == 4:
        tensor = tensor.permute(0, 3, 1, 2)  # strides of channels_last already
    if dtype is not None:
        tensor = tensor.to(dtype)
    return tensor.cuda() if torch.cuda.is_available() else tensor


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Back, [b, c, h, w] as [b, h, w, c]."""
    tensor = tensor.detach().float().cpu()
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).numpy()


def check_same(ours: Any, theirs: np.ndarray, tolerance: float) -> None:
    """Raises ValueError where the two results differ by more than ``tolerance``."""
    ours = np.asarray(ours, np.float32)
    off = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not off <= tolerance:
        raise ValueError(
            f"the two differ by {off:.2g} of the largest value, more than {tolerance:.2g}"
        )


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every pair."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="PyTorch's side through torch.compile as well as eager",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="PyTorch's threads (default: the cores of this process)",
    )
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    return parser


def run_cases(
    description: str | None,
    cases: Iterable[str],
    default: list[str],
    measure: Callable[[str, int, Any], dict[str, Any]],
) -> None:
    """The command of a benchmark that is ``measure(case, batch, arguments)`` for each of both."""
    parser = common_arguments(description)
    parser.add_argument("--case", nargs="+", choices=list(cases), default=default)
    args = parser.parse_args()
    set_up(args)
    show([measure(name, batch, args) for name in args.case for batch in args.batch], args.json)


def set_up(args: argparse.Namespace) -> None:
    """One number of threads for both, and TF32 for neither."""
    cores.use_cores()
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = False


if __name__ == "__main__":
    print(table([result for path in sys.argv[1:] for result in json.loads(Path(path).read_text())]))
