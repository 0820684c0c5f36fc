"""Orders in which a transformer reads the codes of a picture (taming-transformers' permuters).

Each function takes the size (h, w) of the code map and returns (forward, back), int arrays [h * w]:
``x[:, forward]`` reads codes x [b, h * w] in the new order, and ``[:, back]`` restores it.
"""

from collections.abc import Callable

import numpy as np

Order = tuple[np.ndarray, np.ndarray]


def _with_inverse(forward: np.ndarray) -> Order:
    return forward, np.argsort(forward)


def identity(h: int, w: int) -> Order:
    """Row by row."""
    return _with_inverse(np.arange(h * w))


def subsample(h: int, w: int) -> Order:
    """Coarse to fine: the four pictures of every other pixel in turn, recursively."""
    blocks = np.arange(h * w).reshape(1, h, w)
    while min(blocks.shape[1:]) > 1 and blocks.shape[1] % 2 == 0 and blocks.shape[2] % 2 == 0:
        b, height, width = blocks.shape
        parts = blocks.reshape(b, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3)
        blocks = parts.reshape(b * 4, height // 2, width // 2)
    return _with_inverse(blocks.reshape(-1))


def z_curve(h: int, w: int) -> Order:
    """Along Morton's curve, columns in the even bits."""
    row, column = np.divmod(np.arange(h * w), w)
    code = np.zeros(h * w, np.int64)
    for bit in range(32):
        code |= (column >> bit & 1) << (2 * bit) | (row >> bit & 1) << (2 * bit + 1)
    return _with_inverse(np.argsort(code, kind="stable"))


def spiral_out(h: int, w: int) -> Order:
    """From the middle outwards, clockwise; positions outside the map are skipped."""
    if w < 2:
        return identity(h, w)
    row, column, length, forward = h // 2, w // 2 - 1, 1, [h // 2 * w + w // 2 - 1]
    while len(forward) < h * w:
        longer = length + 1
        sides = (-1, 0, length), (0, 1, length), (1, 0, longer), (0, -1, longer)
        for down, right, steps in sides:
            for _ in range(steps):
                row, column = row + down, column + right
                if 0 <= row < h and 0 <= column < w:
                    forward.append(row * w + column)
        length += 2
    return _with_inverse(np.asarray(forward))


def spiral_in(h: int, w: int) -> Order:
    """`spiral_out` reversed."""
    return _with_inverse(spiral_out(h, w)[0][::-1])


def random(h: int, w: int) -> Order:
    """One fixed shuffle for each size, by numpy's legacy generator with seed 1."""
    return _with_inverse(np.random.RandomState(1).permutation(h * w))


def alternate(h: int, w: int) -> Order:
    """Row by row, every second one reversed."""
    indices = np.arange(h * w).reshape(h, w)
    indices[1::2] = indices[1::2, ::-1]
    return _with_inverse(indices.reshape(-1))


PERMUTERS: dict[str, Callable[[int, int], Order]] = {
    "Identity": identity,
    "Subsample": subsample,
    "ZCurve": z_curve,
    "SpiralOut": spiral_out,
    "SpiralIn": spiral_in,
    "Random": random,
    "AlternateParsing": alternate,
}
