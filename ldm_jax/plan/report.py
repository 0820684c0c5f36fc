"""A plan as text, as a row of a table, and as JSON."""

from collections.abc import Iterable
from typing import Any

from ldm_jax.plan.chips import GIB
from ldm_jax.plan.planner import Plan
from ldm_jax.plan.roofline import Kernel

TITLES = {"train": "", "forward": ", a call of the UNet", "decode": ", decoding"}
COLUMNS = (
    "config | chips | mesh | pictures a chip | fits | GiB a chip | of it state | "
    "collectives a step, GiB whole | step, ms | sending, ms | MFU"
)
HEAD = f"| {COLUMNS} |\n|{'---|' * len(COLUMNS.split('|'))}"
# Share of a GPU's memory that JAX takes by default.
_PREALLOCATED = 0.75
_DEAREST = 10


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything known, in plain types: bytes, seconds, FLOPs."""
    compiled, report = plan.compiled, None
    if compiled is not None:
        reduced = [c.size for c in compiled.collectives if c.kind == "all-reduce"]
        report = {
            "fits": compiled.fits,
            "bytes": compiled.needed,
            "temporary": compiled.temporary,
            "seconds": compiled.seconds,
            "kernel_seconds": compiled.pallas_seconds,
            "sending_seconds": plan.sending,
            "collectives": {
                kind: {"count": count, "bytes": size}
                for kind, (count, size) in collectives_by_kind(plan).items()
            },
            "largest_all_reduce": max(reduced, default=0),
            "kernels": _kernel_figures(compiled.kernels),
        }
    return {
        "config": plan.config,
        "what": plan.what,
        "topology": plan.topology.text,
        "chips": plan.topology.size,
        "mesh": plan.mesh,
        "zero1": plan.zero1,
        "batch": plan.batch,
        "accumulate": plan.accumulate,
        "per_chip": plan.rows,
        "cached": plan.cached,
        "parameters": plan.parameters,
        "flops": plan.flops,
        "useful_flops": plan.useful,
        "bytes": plan.bytes,
        "compiled": report,
        "uncompiled": plan.uncompiled,
        "mfu": plan.utilisation(True),
        "mfu_not_overlapped": plan.utilisation(False),
        "largest_per_chip": plan.largest,
        "verdict": verdict(plan),
    }


def _kernel_figures(kernels: Iterable[Kernel]) -> dict[str, Any]:
    """By kind, the dearest, transposes, and float32 arrays made from 16-bit ones."""
    kernels = sorted(kernels, key=lambda k: -k.total)
    kinds: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        figures = kinds.setdefault(kernel.kind, dict.fromkeys(("count", "seconds", "bytes"), 0))
        figures["count"] += kernel.times
        figures["seconds"] += kernel.total
        figures["bytes"] += kernel.times * kernel.nbytes
    widened = [k for k in kernels if k.widened]
    return {
        "launches": sum(k.times for k in kernels),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["seconds"])),
        "dearest": [k._asdict() | {"total": k.total} for k in kernels[:_DEAREST]],
        "float32_copies": {
            "count": sum(k.times for k in widened),
            "bytes": sum(k.times * k.widened for k in widened),
            "seconds": sum(k.total for k in widened),
        },
    }


def collectives_by_kind(plan: Plan) -> dict[str, tuple[int, int]]:
    """Collectives of a step: kind -> (count, bytes of the whole arrays)."""
    total: dict[str, tuple[int, int]] = {}
    for c in plan.compiled.collectives if plan.compiled else ():
        count, size = total.get(c.kind, (0, 0))
        total[c.kind] = count + c.times, size + c.times * c.size
    return dict(sorted(total.items()))


def verdict(plan: Plan) -> str:
    """One line: whether it fits and what limits it."""
    topology, compiled, needed = plan.topology, plan.compiled, plan.needed / GIB
    chip = topology.chip
    if chip is None:
        devices = f"each of {topology.size} devices"
        return f"needs {needed:.2f} GiB on {devices}; the memory of a CPU is not known here"
    size = f"{needed:.1f} GiB of {chip.memory / GIB:.1f} on a chip"
    if not (compiled.fits if compiled else plan.needed <= chip.memory):
        unsure = "may not fit (the bound counts what a compiler fuses away)"
        return f"{'does not fit' if compiled else unsure}: {size}; {_remedy(plan)}"
    text = f"{'fits' if compiled else 'fits by the analytic bound'}: {size}"
    if topology.platform == "gpu" and plan.needed > _PREALLOCATED * chip.memory:
        text += f" (set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes {_PREALLOCATED:.0%})"
    mfu, least = plan.utilisation(True), plan.utilisation(False)
    if compiled is None or compiled.seconds is None or mfu is None or least is None:
        return text
    at_peak = sum(plan.flops.values()) / topology.size / chip.peak
    limits = {
        "the collectives": plan.sending or 0.0,
        "memory traffic and what is not a product": compiled.seconds - at_peak,
        "arithmetic": at_peak,
    }
    return (
        f"{text}, estimated MFU {mfu:.0%} ({least:.0%} if no collective is hidden), "
        f"limited by {max(limits, key=lambda name: limits[name])}"
    )


def _remedy(plan: Plan) -> str:
    """What to change so that it fits."""
    chip = plan.topology.chip
    if plan.what != "train":
        return "put fewer pictures on a chip (per_chip)"
    fixed = plan.needed if plan.compiled is None else sum(plan.bytes.values())
    if chip is not None and fixed - plan.bytes["activations"] > 0.9 * chip.memory:
        return "split the state (mesh.fsdp, mesh.zero1) or choose a smaller optimiser"
    text = "put fewer pictures on a chip (batch_size, optim.accumulate)"
    return text + (" or set remat='blocks'" if plan.remat == "none" else "")


def as_text(plan: Plan) -> str:
    """The whole report."""
    topology, chip, compiled = plan.topology, plan.topology.chip, plan.compiled
    flops, unit = sum(plan.flops.values()), "a step" if plan.what == "train" else "in all"
    axes = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    devices = f"{topology.size} x {chip.name if chip else 'CPU device'}"
    accumulated = f" x {plan.accumulate} in turn" if plan.accumulate > 1 else ""
    cached = ", from cached latents" if plan.cached else ""
    kinds = (f"{kind} {n / flops:.1%}" for kind, n in plan.flops.items())
    parameters = (f"{name} {n / 1e6:.2f} M" for name, n in plan.parameters.items())
    held = (f"{name} {n / GIB:.3f}" for name, n in plan.bytes.items())
    lines = {
        plan.config + TITLES[plan.what]: f"on {topology.text}: {devices}, {axes}"
        + (" with ZeRO-1" if plan.zero1 else ""),
        "batch": f"{plan.batch} pictures, {plan.rows} on a chip at a time{accumulated}{cached}",
        "parameters": ", ".join(parameters),
        "arithmetic": f"{flops / 1e12:.3g} TFLOP {unit}, {plan.useful / 1e12:.3g} of it useful: "
        + ", ".join(kinds),
        "bytes a chip": f"{', '.join(held)} GiB (activations: a bound)",
    }
    if compiled is None:
        lines["compiler"] = f"not used: {plan.uncompiled}"
    elif compiled.temporary is None:
        lines["compiled"] = f"{compiled.needed / GIB:.2f} GiB a chip would be needed"
    else:
        lines["compiled"] = (
            f"{compiled.needed / GIB:.2f} GiB a chip, {compiled.temporary / GIB:.2f} of it "
            "temporary (activations, gradients, gathered weights)"
        )
        sent = (
            f"{n} {kind} of {b / GIB:.3f} GiB" for kind, (n, b) in collectives_by_kind(plan).items()
        )
        lines["collectives"] = "; ".join(sent) or "none"
    if compiled is not None and compiled.seconds is not None and plan.sending is not None:
        estimate = "a roofline of each kernel" if compiled.kernels else "the compiler's estimate"
        pallas = f", {1e3 * compiled.pallas_seconds:.1f} ms of it kernels at the chip's peak"
        lines["speed"] = (
            f"{_milliseconds(compiled.seconds)} ms {unit} by {estimate}, not measured"
            f"{pallas if compiled.pallas_seconds else ''}; "
            f"{_milliseconds(plan.sending)} ms of sending at full speed"
        )
    elif chip is not None:
        at_peak = 1e3 * flops / topology.size / chip.peak
        lines["speed"] = f"{at_peak:.1f} ms {unit} at the chips' peak, which nothing reaches"
    if compiled is not None and compiled.kernels:
        lines |= _kernel_lines(_kernel_figures(compiled.kernels))
    if plan.largest is not None:
        bound = "" if compiled else " (a bound)"
        lines["largest batch"] = f"{plan.largest} pictures on a chip at a time{bound}"
    lines["verdict"] = verdict(plan)
    (title, rest), *others = lines.items()
    return "\n".join([f"{title} {rest}", *(f"{name:15}{text}" for name, text in others)])


def _kernel_lines(figures: dict[str, Any]) -> dict[str, str]:
    kinds = (
        f"{f['count']} {kind} {1e3 * f['seconds']:.2f} ms" for kind, f in figures["kinds"].items()
    )
    dearest = (
        f"\n{1e6 * k['total']:9.1f} us  {k['times']} x {k['kind']} {k['name']} {k['source'][-60:]}"
        for k in figures["dearest"]
    )
    moved = figures["kinds"].get("transpose", {"count": 0, "bytes": 0, "seconds": 0})
    copied = figures["float32_copies"]
    return {
        "kernels": f"{figures['launches']} launches: {', '.join(kinds)}",
        "dearest": "".join(dearest),
        "transposes": f"{moved['count']}, {moved['bytes'] / 2 / GIB:.3f} GiB, "
        f"{1e3 * moved['seconds']:.2f} ms",
        "float32 copies": f"{copied['count']} arrays made from 16-bit ones, "
        f"{copied['bytes'] / GIB:.3f} GiB, {1e3 * copied['seconds']:.2f} ms",
    }


def as_row(plan: Plan) -> str:
    """One row of the table that begins with `HEAD`."""
    mfu, least, compiled = plan.utilisation(True), plan.utilisation(False), plan.compiled
    parts = ("parameters", "average", "optimiser", "frozen")
    state = sum(plan.bytes.get(name, 0.0) for name in parts)
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    sent = (f"{n} {kind} {b / GIB:.2f}" for kind, (n, b) in collectives_by_kind(plan).items())
    largest = f" (of {plan.largest})" if plan.largest is not None else ""
    seconds = None if compiled is None else compiled.seconds
    sending = None if seconds is None else plan.sending
    cells = [
        plan.config + TITLES[plan.what],
        plan.topology.text,
        mesh + (", ZeRO-1" if plan.zero1 else ""),
        f"{plan.rows}{largest}",
        "not compiled" if compiled is None else "yes" if compiled.fits else "no",
        f"{plan.needed / GIB:.1f}",
        f"{state / GIB:.2f}",
        "; ".join(sent) or "-",
        "-" if seconds is None else _milliseconds(seconds),
        "-" if sending is None else _milliseconds(sending),
        "-" if mfu is None or least is None else f"{mfu:.0%} ({least:.0%})",
    ]
    return "| " + " | ".join(cells) + " |"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.2f}"
