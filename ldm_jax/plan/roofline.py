"""Estimates the time of each kernel of a compiled GPU program by a roofline.

The CUDA compiler gives no time for a program. A kernel here takes the longer of its bytes over the
bandwidth and its FLOPs over the peak, plus a launch: a lower bound. What a library does inside a
call (algorithm, workspace, tuning) and how well a kernel fills the GPU is not visible in the text.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ldm_jax.plan.chips import Chip
from ldm_jax.plan.hlo import COLLECTIVES, Array, Instruction, Program, run_counts

LAUNCH_SECONDS = 1.5e-6
_LARGE = 2**16  # elements from which a float32 array counts as an activation

# Opcodes that launch nothing: they name, group or wait for values.
_FREE = re.compile(
    "parameter|constant|bitcast|tuple|get-tuple-element|while|conditional|call|after-all"
    "|opt-barrier|partition-id|replica-id|domain|.*-(update|done)|(" + "|".join(COLLECTIVES) + ").*"
)
_SLICES = ("slice", "dynamic-slice", "gather")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_LIBRARIES = {"conv": "convolution", "cublas": "product", "fmha": "attention"}


class Kernel(NamedTuple):
    """One kernel of a program.

    Attributes:
      kind: "convolution", "product", "attention", "reduction", "transpose", "elementwise", "copy",
        or the opcode or custom call that it is.
      name: Of the instruction.
      source: Where in the model it comes from (op_name of its metadata).
      nbytes: Bytes read and written.
      flops: FLOPs of its products.
      seconds: Of one launch.
      times: Launches in one run of the program.
      widened: Bytes of float32 arrays that it writes from 16-bit arrays.
    """

    kind: str
    name: str
    source: str
    nbytes: float
    flops: float
    seconds: float
    times: int
    widened: int = 0

    @property
    def total(self) -> float:
        """Seconds of all launches."""
        return self.times * self.seconds


def kernels(program: Program, chip: Chip) -> list[Kernel]:
    """The kernels of a CUDA program, without collectives, in the order of the text."""
    found = []
    for computation, times in run_counts(program, launched=True).items():
        body = program[computation]
        shapes = {i.name: i.results for i in body}
        for instruction in body:
            if not _FREE.fullmatch(instruction.opcode):
                found.append(_kernel(instruction, shapes, program, chip, times))
    return found


def _kernel(
    instruction: Instruction,
    shapes: dict[str, tuple[Array, ...]],
    program: Program,
    chip: Chip,
    times: int,
) -> Kernel:
    inputs = [a for name in instruction.operands for a in shapes.get(name, ())]
    outputs = list(instruction.results)
    fused = next((program[c] for _, c in instruction.called if c in program), None)
    if instruction.opcode == "fusion" and fused is not None:
        kind, nbytes, flops = _fusion(fused)
    else:
        if instruction.opcode == "custom-call" and len(outputs) > 1 and outputs[-1].dtype in "u8s8":
            outputs.pop()  # the library's workspace
        kind, flops = _call(instruction, [shapes.get(n, ()) for n in instruction.operands])
        nbytes = sum(a.nbytes for a in (*inputs, *outputs))
    half = any(a.bits == 16 for a in inputs)
    # Float32 products run as TF32, at half the rate of bfloat16, on all the GPUs of `CHIPS`.
    peak = chip.peak if half else chip.peak / 2
    seconds = max(nbytes / chip.bandwidth, flops / peak)
    wide = [a for a in outputs if a.dtype == "f32" and a.size >= _LARGE]
    widest_input = max((a.size for a in inputs if a.dtype == "f32"), default=0)
    halves = [a.size for a in inputs if a.bits == 16 and a.size >= _LARGE]
    copies = [a for a in wide if a.size > widest_input and any(n <= 2 * a.size for n in halves)]
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Kernel(
        kind,
        instruction.name,
        source[1] if source else "",
        nbytes,
        flops,
        seconds + LAUNCH_SECONDS,
        times,
        sum(a.nbytes for a in copies),
    )


# ------------------------------------------------------------------------------------------ fusions


def _fusion(body: Sequence[Instruction]) -> tuple[str, float, float]:
    """(kind, bytes, FLOPs) of a fusion. Of sliced or updated arrays only the slice counts."""
    by_name = {i.name: i for i in body}
    users: dict[str, list[Instruction]] = {}
    for instruction in body:
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)

    def read(instruction: Instruction) -> float:
        """Bytes read of a value: all of it, unless every user takes a slice or overwrites one."""
        whole, parts = sum(a.nbytes for a in instruction.results), 0.0
        for user in users.get(instruction.name, ()):
            if user.opcode == "bitcast":
                parts += read(user)
            elif user.opcode in _SLICES and user.operands[0] == instruction.name:
                parts += sum(a.nbytes for a in user.results)
            elif not _updates(user, instruction.name):
                return whole
        return min(whole, parts)

    def written(instruction: Instruction) -> float:
        if instruction.opcode == "tuple":
            return sum(written(by_name[name]) for name in instruction.operands)
        if instruction.opcode == "bitcast" and instruction.operands[0] in by_name:
            return written(by_name[instruction.operands[0]])
        if instruction.opcode == "dynamic-update-slice":
            return sum(a.nbytes for a in by_name[instruction.operands[1]].results)
        return sum(a.nbytes for a in instruction.results)

    nbytes = sum(read(i) for i in body if i.opcode == "parameter")
    nbytes += sum(written(i) for i in body if i.is_root)
    flops = sum(_dot_flops(i, by_name) for i in body if i.opcode == "dot")
    opcodes = {i.opcode for i in body if i.results and i.results[0].size > 1}
    kinds = {"dot": "product", "reduce": "reduction", "transpose": "transpose"}
    kind = next((kind for opcode, kind in kinds.items() if opcode in opcodes), "elementwise")
    if opcodes <= {"parameter", "bitcast", "copy"}:
        kind = "transpose"  # of a layout
    return kind, nbytes, flops


def _updates(user: Instruction, name: str) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name


def _dot_flops(instruction: Instruction, by_name: dict[str, Instruction]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    (lhs, *_) = by_name[instruction.operands[0]].results
    dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
    return 2 * instruction.results[0].size * math.prod(lhs.shape[d] for d in dims)


# ------------------------------------------------------------------------------------ library calls


def _call(instruction: Instruction, operands: Sequence[tuple[Array, ...]]) -> tuple[str, float]:
    """(kind, FLOPs) of a kernel that is no fusion."""
    match = _TARGET.search(instruction.rest)
    if match is None:
        layouts = instruction.opcode == "copy"
        return "copy" if layouts else instruction.opcode, 0.0
    kind = next((k for part, k in _LIBRARIES.items() if part in match[1]), match[1])
    if kind == "convolution":
        return kind, _conv_flops(match[1], instruction, operands)
    if kind == "product":
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
        dims = [int(d) for d in re.findall(r"\d+", found[1])] if found else []
        contracted = math.prod(operands[0][0].shape[d] for d in dims)
        return kind, 2.0 * instruction.results[0].size * contracted
    if kind == "attention":
        found = re.search(
            r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', instruction.rest
        )
        weights = math.prod(int(d) for d in re.findall(r"\d+", found[1])) if found else 0
        products = 5 if "Backward" in match[1] else 2
        return kind, 2.0 * products * weights * operands[0][0].shape[-1]
    return kind, 0.0


def _conv_flops(
    target: str, instruction: Instruction, operands: Sequence[tuple[Array, ...]]
) -> float:
    """2 x elements of y x taps x input channels, whichever of input, filter and y is computed."""
    window = re.search(r"window=\{[^}]*size=([\dx]+)", instruction.rest)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    groups = re.search(r"feature_group_count=(\d+)", instruction.rest)
    assert labels is not None
    taps = math.prod(int(n) for n in window[1].split("x")) if window else 1
    result = instruction.results[0]
    if "BackwardFilter" in target:
        x, y = operands[0][0], operands[1][0]
        channels = x.shape[labels[1].index("f")] // (int(groups[1]) if groups else 1)
    elif "BackwardInput" in target:
        y = operands[0][0]
        channels = result.shape[labels[1].index("f")] // (int(groups[1]) if groups else 1)
    else:
        y = result
        channels = operands[1][0].shape[labels[2].index("i")]
    return 2.0 * y.size * taps * channels
