"""A plan as a person reads it, as a row of a table, and as JSON."""

from collections import defaultdict
from typing import Any

from ldm_jax.plan.chips import GIB
from ldm_jax.plan.planner import Plan

NAMES = {
    "train": "",
    "forward": ", a call of the UNet",
    "decode": ", decoding",
}  # of what is planned
COLUMNS = (
    "config",
    "chips",
    "mesh",
    "pictures a chip",
    "fits",
    "GiB a chip",
    "of it state",
    "collectives a step, GiB whole",
    "step, ms",
    "sending, ms",
    "MFU",
)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything that is known, in plain types; bytes, seconds, FLOPs."""
    compiled = plan.compiled
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
        "compiled": None
        if compiled is None
        else {
            "fits": compiled.fits,
            "bytes": compiled.needed,
            "temporary": compiled.temporary,
            "seconds": compiled.seconds,
            "kernel_seconds": compiled.kernels,
            "sending_seconds": plan.sending,
            "collectives": {
                kind: {"count": count, "bytes": size}
                for kind, (count, size, _) in by_kind(plan).items()
            },
            "largest_all_reduce": max(
                (c.size for c in compiled.collectives if c.kind == "all-reduce"), default=0
            ),
        },
        "uncompiled": plan.uncompiled,
        "mfu": plan.utilisation(True),
        "mfu_not_overlapped": plan.utilisation(False),
        "largest_per_chip": plan.largest,
        "verdict": verdict(plan),
    }


def by_kind(plan: Plan) -> dict[str, tuple[int, int, float]]:
    """Collectives of a step: kind -> (count, bytes of the whole arrays, bytes sent by a chip)."""
    total: dict[str, tuple[int, int, float]] = defaultdict(lambda: (0, 0, 0.0))
    for c in plan.compiled.collectives if plan.compiled else ():
        count, size, sent = total[c.kind]
        total[c.kind] = count + c.times, size + c.times * c.size, sent + c.sent
    return dict(sorted(total.items()))


def verdict(plan: Plan) -> str:
    """One line: whether it fits and what limits it."""
    chip, needed = plan.topology.chip, plan.needed / GIB
    sure = plan.compiled is not None
    if chip is None:
        return f"needs {needed:.2f} GiB on each of {plan.topology.size} devices; how much a CPU has is not known here"
    room = chip.memory / GIB
    fits = plan.compiled.fits if plan.compiled else plan.needed <= chip.memory
    if not fits:
        fixed = (
            plan.needed - plan.bytes["activations"]
            if not sure
            else sum(plan.bytes.values()) - plan.bytes["activations"]
        )
        cause = (
            "put fewer pictures on a chip (per_chip)"
            if plan.what != "train"
            else "split the state (mesh.fsdp, mesh.zero1) or choose a smaller optimiser"
            if fixed > 0.9 * chip.memory
            else "put fewer pictures on a chip (batch_size, optim.accumulate)"
            + (" or set remat='blocks'" if plan.remat == "none" else "")
        )
        may = (
            "does not fit" if sure else "may not fit (the bound counts what a compiler fuses away)"
        )
        return f"{may}: {needed:.1f} GiB of {room:.1f} on a chip; {cause}"
    text = f"{'fits' if sure else 'fits by the analytic bound'}: {needed:.1f} GiB of {room:.1f} on a chip"
    mfu, least = plan.utilisation(True), plan.utilisation(False)
    if (
        mfu is None
        or least is None
        or plan.compiled is None
        or plan.compiled.seconds is None
        or plan.sending is None
    ):
        return text
    seconds, at_peak = (
        plan.compiled.seconds,
        sum(plan.flops.values()) / plan.topology.size / chip.peak,
    )
    limits = {
        "the collectives": plan.sending,
        "memory traffic and what is not a product": seconds - at_peak,
        "arithmetic": at_peak,
    }
    most = max(limits, key=lambda name: limits[name])
    return f"{text}, estimated MFU {100 * mfu:.0f} % ({100 * least:.0f} % if no collective is hidden), limited by {most}"


def as_text(plan: Plan) -> str:
    """The whole report."""
    count, chip, compiled = plan.topology.size, plan.topology.chip, plan.compiled
    per_step, of = sum(plan.flops.values()), "a step" if plan.what == "train" else "in all"
    axes = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) + (
        " with ZeRO-1" if plan.zero1 else ""
    )
    accumulated = f" x {plan.accumulate} in turn" if plan.accumulate > 1 else ""
    lines = [
        f"{plan.config}{NAMES[plan.what]} on {plan.topology.text}: {count} x {chip.name if chip else 'CPU device'}, {axes}",
        f"batch          {plan.batch} pictures, {plan.rows} on a chip at a time{accumulated}{', from cached latents' if plan.cached else ''}",
        "parameters     "
        + ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in plan.parameters.items()),
        f"arithmetic     {per_step / 1e12:.3g} TFLOP {of}, {plan.useful / 1e12:.3g} of it useful: "
        + ", ".join(f"{kind} {100 * n / per_step:.1f} %" for kind, n in plan.flops.items()),
        "bytes a chip   "
        + ", ".join(f"{name} {n / GIB:.3f}" for name, n in plan.bytes.items())
        + " GiB (activations: a bound)",
    ]
    if compiled is None:
        lines.append(f"compiler       nothing: {plan.uncompiled}")
    elif compiled.temporary is None:
        lines.append(f"compiled       {compiled.needed / GIB:.2f} GiB a chip would be needed")
    else:
        lines.append(
            f"compiled       {compiled.needed / GIB:.2f} GiB a chip, {compiled.temporary / GIB:.2f} of it temporary"
            " (activations, gradients, gathered weights)"
        )
        kinds = [
            f"{n} {kind} of {size / GIB:.3f} GiB" for kind, (n, size, _) in by_kind(plan).items()
        ]
        lines.append("collectives    " + ("; ".join(kinds) or "none"))
    if compiled is not None and compiled.seconds is not None and plan.sending is not None:
        lines.append(
            f"speed          {1e3 * compiled.seconds:.1f} ms {of} by the compiler's estimate"
            + (
                f", {1e3 * compiled.kernels:.1f} ms of it kernels at the chip's peak"
                if compiled.kernels
                else ""
            )
            + f"; {1e3 * plan.sending:.1f} ms of sending at full speed"
        )
    elif chip is not None:
        lines.append(
            f"speed          {1e3 * per_step / count / chip.peak:.1f} ms {of} at the chips' peak, which nothing reaches"
        )
    if plan.largest is not None:
        lines.append(
            f"largest batch  {plan.largest} pictures on a chip at a time{'' if compiled else ' (a bound)'}"
        )
    return "\n".join([*lines, f"verdict        {verdict(plan)}"])


def as_row(plan: Plan) -> str:
    """One row of the table whose head is `HEAD`."""
    mfu, least, compiled = plan.utilisation(True), plan.utilisation(False), plan.compiled
    state = sum(
        plan.bytes.get(name, 0.0) for name in ("parameters", "average", "optimiser", "frozen")
    )
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) + (
        ", ZeRO-1" if plan.zero1 else ""
    )
    sent = "; ".join(f"{n} {kind} {size / GIB:.2f}" for kind, (n, size, _) in by_kind(plan).items())
    seconds = None if compiled is None else compiled.seconds
    sending = None if seconds is None else plan.sending
    cells = [
        plan.config + NAMES[plan.what],
        plan.topology.text,
        mesh,
        f"{plan.rows}" + (f" (of {plan.largest})" if plan.largest is not None else ""),
        "not compiled" if compiled is None else "yes" if compiled.fits else "no",
        f"{plan.needed / GIB:.1f}",
        f"{state / GIB:.2f}",
        sent or "-",
        "-" if seconds is None else f"{1e3 * seconds:.0f}",
        "-" if sending is None else f"{1e3 * sending:.0f}",
        "-" if mfu is None or least is None else f"{100 * mfu:.0f} % ({100 * least:.0f} %)",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)
