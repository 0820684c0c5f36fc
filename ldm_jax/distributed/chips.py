"""Accelerators and their published limits."""

from typing import NamedTuple

GIB = 2.0**30


class Chip(NamedTuple):
    """Published limits of one chip.

    Attributes:
      name: As people write it.
      memory: Bytes.
      bandwidth: Of the memory, bytes/s.
      peak: Dense bfloat16 FLOP/s.
      link: Bytes/s that a chip sends to others.
    """

    name: str
    memory: float
    bandwidth: float
    peak: float
    link: float


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (between chips, v5e: 1600 Gbit/s, v5p: 4800,
# v6e: 3200). GPUs: NVIDIA's data sheets of the SXM modules, dense arithmetic; their NVLink figures
# count both directions, `link` counts one.
TPUS = {
    "v4": Chip("TPU v4", 32 * GIB, 1.2e12, 275e12, 300e9),
    "v5e": Chip("TPU v5e", 16 * GIB, 0.819e12, 197e12, 200e9),
    "v5p": Chip("TPU v5p", 95 * GIB, 2.765e12, 459e12, 600e9),
    "v6e": Chip("TPU v6e", 32 * GIB, 1.6e12, 918e12, 400e9),
}
GPUS = {
    "a100": Chip("NVIDIA A100", 80e9, 2.0e12, 312e12, 300e9),
    "h100": Chip("NVIDIA H100", 80e9, 3.35e12, 989e12, 450e9),
    "h200": Chip("NVIDIA H200", 141e9, 4.8e12, 989e12, 450e9),
}
CHIPS = TPUS | GPUS

# What JAX names the devices -> key of `CHIPS`.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the limits of a device by its ``device_kind``; None where they are not known."""
    if device_kind in _KINDS:
        return CHIPS[_KINDS[device_kind]]
    words = device_kind.lower().replace("-", " ").split()  # "NVIDIA A100-SXM4-80GB"
    sxm = "pcie" not in words and "nvl" not in words  # their limits are lower
    return next((chip for name, chip in GPUS.items() if name in words and sxm), None)
