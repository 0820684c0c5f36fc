"""One static object that says how the operations of a network are computed.

`REFERENCE`, the default of every module, is plain JAX. Whoever compiles a program gives the modules
the forms of its platform: ``model.with_kernels(for_platform("cpu"))``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from typing_extensions import override

from ldm_jax.kernels.cpu import CpuKernels
from ldm_jax.kernels.gpu import GpuKernels, compute_capability
from ldm_jax.kernels.reference import SAVED, Kernels
from ldm_jax.kernels.tpu import TpuKernels

REFERENCE = Kernels()

_PLATFORMS: dict[str, type[Kernels]] = {"cpu": CpuKernels, "gpu": GpuKernels, "tpu": TpuKernels}


def for_platform(
    platform: str,
    mesh: Mesh | None = None,
    *,
    differentiable: bool = True,
    cores: Mesh | None = None,
) -> Kernels:
    """The fastest forms of a platform.

    Args:
      platform: "cpu", "gpu" or "tpu", as `jax.default_backend()` and ``device.platform`` name it;
        any other has plain forms.
      mesh: The mesh over which `jax.jit` splits the rows of a batch; None where each device has a
        program of its own (`jax.shard_map`).
      differentiable: False if no gradient is taken, which makes tracing faster.
      cores: CPU cores that divide the rows of each call; see `ldm_jax.kernels.cores`.
    """
    kind = _PLATFORMS.get(platform, Kernels)
    options = {"capability": compute_capability(mesh)} if kind is GpuKernels else {}
    mesh = None if mesh is None or mesh.size == 1 else mesh
    return kind(mesh, cores, differentiable, **options)


@dataclasses.dataclass(frozen=True)
class PortableKernels(Kernels):
    """Inference on any platform: a lowering for CPU has the CPU's forms, others the plain ones."""

    @override
    def attention(self, q: Any, k: Any, v: Any, scale: float, mask: Any = None) -> jax.Array:
        return self._on_cpu("attention", (q, k, v), scale, mask)

    @override
    def group_norm(
        self, x: Any, scale: Any, bias: Any, groups: int, eps: float, silu: bool
    ) -> jax.Array:
        return self._on_cpu("group_norm", (x, scale, bias), groups, eps, silu)

    @override
    def conv(self, x: Any, w: Any, strides: Any, padding: Any) -> jax.Array:
        return self._on_cpu("conv", (x, w), strides, padding)

    @override
    def gelu(self, x: Any) -> jax.Array:
        return self._on_cpu("gelu", (x,))

    @override
    def geglu(self, x: Any) -> jax.Array:
        return self._on_cpu("geglu", (x,))

    def _on_cpu(self, operation: str, arrays: tuple[Any, ...], *static: Any) -> jax.Array:
        def form(kernels: Kernels) -> Callable[..., jax.Array]:
            return lambda *arrays: getattr(kernels, operation)(*arrays, *static)

        cpu = CpuKernels(differentiable=False)
        return jax.lax.platform_dependent(*arrays, cpu=form(cpu), default=form(REFERENCE))


PORTABLE = PortableKernels(differentiable=False)

__all__ = ["PORTABLE", "REFERENCE", "SAVED", "Kernels", "for_platform"]
