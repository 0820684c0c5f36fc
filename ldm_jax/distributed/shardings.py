"""How parameters and training states are split over a mesh.

Fully sharded over "fsdp" (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054: stage 3, or stage 1 if
only the optimiser's state is split), and over "tensor" as in Megatron-LM (Shoeybi et al. 2019,
arXiv:1909.08053).
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ldm_jax.distributed.mesh import replicated

# What the tensor axis splits: a pattern for the end of a parameter's path -> the dimension. The
# last product of each layer is summed over the axis.
TENSOR: tuple[tuple[str, int], ...] = (
    (r"(attn|attn\d|attn_\d+)/to_[qkv]/kernel", 1),
    (r"(attn|attn\d|attn_\d+)/to_out/kernel", 0),
    (r"(ff|ff_\d+)/proj_in/kernel", 1),
    (r"(ff|ff_\d+)/proj_in/bias", 0),
    (r"(ff|ff_\d+)/proj_out/kernel", 0),
)
# Tables of words and classes are split by channels: each device looks up its channels of every row,
# and sends the rows to their devices. Split by words each would look up zeros for the words of
# others, to be summed: a reduction of activations. A codebook is compared with, and split by codes.
_TABLES = re.compile(r"emb(edding)?/embedding$")
_CODES = re.compile(r"quantize/embedding$")
_SMALL = 2**10  # arrays of up to as many values are on every device
_LANES, _SUBLANES = 128, 16  # of a TPU's registers of bfloat16


def spec(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, axis: str = "fsdp"
) -> PartitionSpec:
    """The partition of the array at ``path`` ("unet/middle_block_0/in_conv/kernel").

    The tensor axis splits what `TENSOR` lists, ``axis`` another dimension that it divides: of a
    table of embeddings the channels, of a codebook the codes. Of other arrays, of the last two
    dimensions, the one that a TPU does not lay along the lanes of its registers, if the parts fill
    sublanes (of other parts its compiler may sum whole gradients where it could scatter them); else
    the largest, first among those that it cuts into multiples of 128. An array that is small, or
    divides nowhere, is on every device.
    """
    named: list[str | None] = [None] * len(shape)
    if math.prod(shape) <= _SMALL:
        return PartitionSpec()
    wide = next((dim for pattern, dim in TENSOR if re.search(rf"(^|/){pattern}$", path)), None)
    if wide is not None and mesh.shape["tensor"] > 1 and shape[wide] % mesh.shape["tensor"] == 0:
        named[wide] = "tensor"
    n = mesh.shape[axis]
    free = [
        dim for dim, size in enumerate(shape) if named[dim] is None and size % n == 0 and size >= n
    ]
    preferred = 1 if _TABLES.search(path) else 0 if _CODES.search(path) else None
    last = range(len(shape))[-2:]
    # The less padded of the two.
    lanes = max(last, key=lambda dim: (-(-shape[dim] % _LANES) / shape[dim], dim))

    def order(dim: int) -> tuple[bool, bool, bool, int]:
        part = shape[dim] // n
        across = dim in last and dim != lanes and part % _SUBLANES == 0
        return dim == preferred, across, part % _LANES == 0, shape[dim]

    if n > 1 and free:
        named[max(free, key=order)] = axis
    return PartitionSpec(*named)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, axis: str = "fsdp") -> Any:
    """`spec` of every array (or shape) of a pytree, as shardings.

    The paths of an optimiser's moments end like those of their parameters.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, tuple(np.shape(leaf)), mesh, axis))

    return jax.tree.map_with_path(of, tree)


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, zero1: bool = False) -> Any:
    """`shardings` of a training state (anything with ``params``, ``ema`` and ``opt_state``).

    With ``zero1`` parameters stay on every device, and the average and the optimiser's moments are
    split (ZeRO stage 1): for models that fit a chip, whose weights then need not be gathered in
    every step. They are split over "fsdp", or over "data" where that axis is 1; few arrays divide
    over all of a large pod.
    """
    if not zero1:
        return shardings(state, mesh)
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    split = shardings(state, mesh, "data" if mesh.shape["fsdp"] == 1 else "fsdp")
    return whole.replace(ema=split.ema, opt_state=split.opt_state)
