"""Algorithms that add noise at every step.

With `eta` 0 they solve the ODE, with 1 the reverse SDE; `s_noise` scales the noise.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from ldm_jax.diffusion.schedule import root
from ldm_jax.diffusion.solvers import Multistep
from ldm_jax.diffusion.tableau import Basis, Row, ancestral, exponential, steps
from ldm_jax.errors import RequestError


def euler_ancestral(
    b: Basis, sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Row]:
    """Ancestral sampling (Ho et al. 2020): an Euler step beyond the next level, then noise."""
    for sigma, to in steps(sigmas):
        down, up = ancestral(sigma, to, eta)
        yield Row(sigma, to, b.x + (down - sigma) * (b.x - b.m[0]) / sigma + s_noise * up * b.z)


def dpm_2_ancestral(
    b: Basis, sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Row]:
    """As `euler_ancestral`, by the midpoint method with the middle in log sigma."""
    for sigma, to in steps(sigmas):
        down, up = ancestral(sigma, to, eta)
        d = (b.x - b.m[0]) / sigma
        if down == 0:
            yield Row(sigma, to, b.x + (down - sigma) * d + s_noise * up * b.z)
        else:
            middle = math.sqrt(sigma * down)
            yield Row(sigma, middle, b.x + (middle - sigma) * d)
            y = b.x + (down - sigma) * (b.u - b.m[0]) / middle
            yield Row(middle, to, y + s_noise * up * b.z, step=False)


def dpmpp_2s_ancestral(
    b: Basis, sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Row]:
    """As `euler_ancestral`, by DPM-Solver++(2S) (arXiv:2211.01095, algorithm 1), r = 1/2."""
    for sigma, to in steps(sigmas):
        down, up = ancestral(sigma, to, eta)
        if down == 0:
            keep, w = exponential("x0", sigma, down)
            yield Row(sigma, to, keep * b.x + w @ b.m[:1] + s_noise * up * b.z)
        else:
            middle = math.sqrt(sigma * down)
            keep, w = exponential("x0", sigma, middle)
            yield Row(sigma, middle, keep * b.x + w @ b.m[:1])
            keep, (w0, w1) = exponential("x0", sigma, down, [0.0, 0.5], rule="half")
            y = keep * b.x + w0 * b.m[1] + w1 * b.m[0]
            yield Row(middle, to, y + s_noise * up * b.z, step=False)


@dataclasses.dataclass(frozen=True)
class DPMppSDE:
    """DPM++ SDE (k-diffusion): two stages of the SDE of arXiv:2211.01095, section 5.

    The first stage goes to a fraction `r` of the step in log sigma.

    Attributes:
      one_path: Both stages follow one Brownian path: the second takes up the noise of the first,
        without which the covariance would be of order 1. False draws independent noise, as
        k-diffusion's recorded runs do.
    """

    one_path: bool = True

    def __call__(
        self, b: Basis, sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5
    ) -> Iterator[Row]:
        """The rows."""
        if not 0 < r <= 1:
            raise RequestError(f"dpmpp_sde: r must be above 0 and up to 1, not {r}")
        for sigma, to in steps(sigmas):
            if to == 0:
                yield Row(sigma, to, b.m[0])
                continue
            middle = math.sqrt(sigma * to) if r == 0.5 else sigma ** (1 - r) * to**r
            down, up = ancestral(sigma, middle, eta)
            keep, w = exponential("x0", sigma, down)
            yield Row(sigma, middle, keep * b.x + w @ b.m[:1] + s_noise * up * b.z)
            noise = b.u - keep * b.x - w @ b.m[1:2]  # of the first stage, s_noise included
            down, full = ancestral(sigma, to, eta)
            carried = ancestral(middle, to, eta)[0] / middle if self.one_path else 0.0
            fresh = float(root(full**2 - (carried * up) ** 2))
            keep, (w,) = exponential("x0", sigma, down)
            output = b.m[0] if r == 0.5 else b.m[1] + (b.m[0] - b.m[1]) / (2 * r)
            y = keep * b.x + w * output + carried * noise + s_noise * fresh * b.z
            yield Row(middle, to, y, step=False)


class MultistepSDE(Multistep):
    """SDE-DPM-Solver++(2M) (arXiv:2211.01095, eq. 18), and k-diffusion's form of three outputs."""

    def __call__(
        self, b: Basis, sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0
    ) -> Iterator[Row]:
        """The rows."""
        return self.rows(b, sigmas, eta, s_noise)
