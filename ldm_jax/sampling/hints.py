"""The pictures that control a ControlNet, read from a request."""

from typing import Any, NamedTuple

import numpy as np

from ldm_jax.conditioning.base import as_list
from ldm_jax.conditioning.pictures import fit, read_picture
from ldm_jax.errors import RequestError

Array = Any  # jax.Array or np.ndarray


class Control(NamedTuple):
    """The hints of n ControlNets; traced.

    Attributes:
      hints: One array for each, uint8 [b, 8 h, 8 w, 3] for latents [b, h, w, c].
      scales: Factors of their features, float32 [b, n].
    """

    hints: tuple[Array, ...]
    scales: Array


def read_control(request: Any, count: int, latent: tuple[int, int], n: int) -> Control | None:
    """Returns the hints of a request; None for a model without a ControlNet.

    Args:
      request: The request.
      count: Number of the model's ControlNets.
      latent: Height and width of the latents.
      n: Number of pictures.

    Raises:
      RequestError: There is not one hint for each ControlNet, or a value does not fit.
    """
    given = as_list(request.control_image)
    if len(given) != count:
        raise RequestError(
            f"{len(given)} control images for {count} ControlNets: give --control_image"
            " (control_image=) once for each --control (control=)"
        )
    for name in ("control_scale", "control_edges"):
        if not count and getattr(request, name) is not None:
            raise RequestError(f"{name} needs a ControlNet: give one with --control (control=)")
    if not count:
        return None
    size, thresholds = (8 * latent[0], 8 * latent[1]), request.control_edges
    if thresholds is not None and (
        np.shape(thresholds) != (2,) or not 0 <= thresholds[0] <= thresholds[1]
    ):
        raise RequestError(f"control_edges {thresholds}: give the lower and the upper threshold")
    scales = np.asarray(1.0 if request.control_scale is None else request.control_scale, np.float32)
    if scales.shape not in ((), (1,), (count,)):
        raise RequestError(
            f"{scales.size} control scales for {count} ControlNets: give one, or one for each"
        )
    hints = []
    for one in given:
        picture = fit(read_picture(one, "control_image"), size, "control image")
        picture = picture if thresholds is None else edges(picture, *thresholds)
        hints.append(np.broadcast_to(picture, (n, *picture.shape)))
    return Control(tuple(hints), np.broadcast_to(scales, (n, count)))


def edges(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns the edges of a picture by Canny's method (1986), white on black.

    Sobel gradients of the brightness, with the sum of both magnitudes; ridges of it along the
    gradient; and of those all that are connected to one above the upper threshold.

    Args:
      picture: uint8 [h, w, 3].
      low: Lower threshold, in brightness from 0 to 255 times 4.
      high: Upper threshold.

    Returns:
      uint8 [h, w, 3].
    """
    gray = np.rint(picture.astype(np.float64) @ (0.299, 0.587, 0.114))
    padded = np.pad(gray, 1, mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    columns = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    dy, dx = rows[2:] - rows[:-2], columns[:, 2:] - columns[:, :-2]
    strength = np.abs(dx) + np.abs(dy)

    around = np.pad(strength, 1)
    h, w = strength.shape

    def neighbour(y: int, x: int) -> np.ndarray:
        return around[1 + y : 1 + y + h, 1 + x : 1 + x + w]

    # The direction of the gradient, in steps of 45 degrees: across, along either diagonal, down.
    slope = np.tan(np.pi / 8)
    across, down = np.abs(dy) < slope * np.abs(dx), np.abs(dx) <= slope * np.abs(dy)
    diagonal = ~across & ~down
    same = (dx < 0) == (dy < 0)
    ridge = np.zeros_like(strength, bool)
    for where, (y, x) in (
        (across, (0, 1)),
        (down, (1, 0)),
        (diagonal & same, (1, 1)),
        (diagonal & ~same, (-1, 1)),
    ):
        # Of two equal neighbours the first is the edge, across and down.
        first = strength >= neighbour(y, x) if y == 0 or x == 0 else strength > neighbour(y, x)
        ridge |= where & (strength > neighbour(-y, -x)) & first
    weak, found = ridge & (strength > low), ridge & (strength > high)
    while True:
        ring = np.pad(found, 1)
        grown = np.zeros_like(found)
        for y in range(3):
            for x in range(3):
                grown |= ring[y : y + h, x : x + w]
        grown &= weak
        if (grown == found).all():
            break
        found = grown
    return np.repeat(np.uint8(255) * found[:, :, None].astype(np.uint8), 3, axis=2)
