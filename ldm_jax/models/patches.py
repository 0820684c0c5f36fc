"""Networks over pictures larger than they, or the memory, take: patch by patch, blended.

The original's split_input_params. Overlapping patches are cut out, pass through the network, are
weighted by their distance to the border, added up and divided by the sum of the weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import ConfigError

Array = Any  # jax.Array or np.ndarray


@dataclasses.dataclass(frozen=True)
class PatchPlan:
    """How pictures are cut; names are the original's.

    Attributes:
      ks: (height, width) of a patch, in places of the array that is cut.
      stride: (vertical, horizontal) distance of neighbouring patches.
      tie_braker: Whether patches weigh less the nearer they are to the picture's border.
      clip_min_weight: The least weight of a place in its patch.
      clip_max_weight: The largest.
      clip_min_tie_weight: The least weight of a patch.
      clip_max_tie_weight: The largest.
    """

    ks: tuple[int, int]
    stride: tuple[int, int]
    tie_braker: bool = False
    clip_min_weight: float = 0.01
    clip_max_weight: float = 0.5
    clip_min_tie_weight: float = 0.01
    clip_max_tie_weight: float = 0.5

    def __post_init__(self) -> None:
        if min(*self.ks, *self.stride) < 1:
            raise ConfigError(f"patches: ks {self.ks} and stride {self.stride} must be at least 1")
        if self.stride[0] > self.ks[0] or self.stride[1] > self.ks[1]:
            raise ConfigError(f"patches: a stride of {self.stride} leaves gaps at ks {self.ks}")

    def fitted(self, height: int, width: int) -> "PatchPlan":
        """The plan with patches no larger than the picture."""
        ks = min(self.ks[0], height), min(self.ks[1], width)
        stride = min(self.stride[0], height), min(self.stride[1], width)
        return dataclasses.replace(self, ks=ks, stride=stride)

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches that cover a picture; the last ones end at its edge."""
        rows, columns = (
            -(-(n - k) // step) + 1
            for n, k, step in zip((height, width), self.ks, self.stride, strict=True)
        )
        return rows, columns

    def scaled(self, factor: float) -> "PatchPlan":
        """The plan of what comes out where a network changes sizes by ``factor``."""
        ks, stride = (
            (int(pair[0] * factor), int(pair[1] * factor)) for pair in (self.ks, self.stride)
        )
        return dataclasses.replace(self, ks=ks, stride=stride)


def border_distance(height: int, width: int) -> np.ndarray:
    """Distance to the nearest border in parts of the side, float32 [height, width], at most 0.5."""
    with np.errstate(invalid="ignore"):
        rows, columns = (np.arange(n, dtype=np.float32) / (n - 1) for n in (height, width))
    rows, columns = (np.minimum(at, 1 - at) for at in (rows, columns))
    return np.minimum(rows[:, None], columns[None])


def weights(plan: PatchPlan, rows: int, columns: int) -> np.ndarray:
    """The weights of every patch's places, float32 [rows * columns, *plan.ks], row by row."""
    inside = np.clip(border_distance(*plan.ks), plan.clip_min_weight, plan.clip_max_weight)
    each = np.ones(rows * columns, np.float32)
    if plan.tie_braker:
        among = border_distance(rows, columns).reshape(-1)
        each = np.clip(among, plan.clip_min_tie_weight, plan.clip_max_tie_weight)
    return each[:, None, None] * inside


def corners(plan: PatchPlan, height: int, width: int) -> np.ndarray:
    """(top, left) of every patch of a picture, int32 [patches, 2], row by row."""
    at = [
        np.minimum(np.arange(count) * step, n - k)
        for count, step, n, k in zip(
            plan.counts(height, width), plan.stride, (height, width), plan.ks, strict=True
        )
    ]
    return np.stack(np.meshgrid(*at, indexing="ij"), -1).reshape(-1, 2).astype(np.int32)


def normalization(plan: PatchPlan, height: int, width: int) -> np.ndarray:
    """The sum of all patches' weights at every place, float32 [height, width]."""
    places, (kh, kw) = corners(plan, height, width), plan.ks
    total = np.zeros((height, width), np.float32)
    each = weights(plan, *plan.counts(height, width))
    for (top, left), weight in zip(places, each, strict=True):
        total[top : top + kh, left : left + kw] += weight
    return total


def patchwise(
    run: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    plan: PatchPlan,
    factor: float = 1.0,
) -> jax.Array:
    """Applies a network patch by patch.

    The patches are computed one after the other, so that the memory is that of one.

    Args:
      run: ``run(place, *patches)`` of patches [b, *plan.ks, c_i] returns
        [b, factor * plan.ks, c]; ``place`` is the patch's number, row by row.
      arrays: [b, h, w, c_i] each, of one height and width; all are cut.
      plan: How they are cut.
      factor: What ``run`` multiplies sizes by.

    Returns:
      [b, factor * h, factor * w, c], float32, with as many rows as ``run`` returns.
    """
    height, width = arrays[0].shape[1:3]
    plan = plan.fitted(height, width)
    out, size = plan.scaled(factor), (int(height * factor), int(width * factor))
    places = corners(plan, height, width)
    targets = (places * factor).astype(np.int32)
    weight = weights(out, *plan.counts(height, width))

    def cut(top: Any, left: Any) -> list[jax.Array]:
        return [
            jax.lax.dynamic_slice(a, (0, top, left, 0), (len(a), *plan.ks, a.shape[-1]))
            for a in arrays
        ]

    def body(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        place, (top, left), (row, column), weight = part
        y = run(place, *cut(top, left)) * weight[..., None]
        at = 0, row, column, 0
        sum_of = jax.lax.dynamic_slice(total, at, y.shape) + y
        return jax.lax.dynamic_update_slice(total, sum_of, at), None

    shape = jax.eval_shape(run, jnp.int32(0), *cut(0, 0)).shape
    total = jnp.zeros((shape[0], *size, shape[-1]), jnp.float32)
    steps = (jnp.arange(len(places)), jnp.asarray(places), jnp.asarray(targets), weight)
    total, _ = jax.lax.scan(body, total, steps)
    return total / normalization(out, *size)[..., None]
