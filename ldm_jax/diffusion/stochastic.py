"""Samplers that add noise at every step. ``eta`` 0 turns them into solvers of the ODE, 1 has the reverse SDE; ``s_noise`` scales the noise."""

import math
from collections.abc import Iterator

import numpy as np

from ldm_jax.diffusion.tableau import Basis, Row, Rule, ancestral, exponential, steps


def euler_ancestral(
    b: Basis, sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Row]:
    """An Euler step of the ODE beyond the next level, then noise back up to it: ancestral sampling (Ho et al. 2020) in sigma."""
    for sigma, to in steps(sigmas):
        down, up = ancestral(sigma, to, eta)
        yield Row(sigma, to, b.x + (down - sigma) * (b.x - b.m[0]) / sigma + s_noise * up * b.z)


def dpm_2_ancestral(
    b: Basis, sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Row]:
    """As `euler_ancestral`, with the midpoint method: the middle in log sigma."""
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
    """As `euler_ancestral`, with DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, algorithm 1), r = 1/2."""
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
            yield Row(
                middle, to, keep * b.x + w0 * b.m[1] + w1 * b.m[0] + s_noise * up * b.z, step=False
            )


class DPMppSDE:
    """DPM++ SDE (k-diffusion): two stages of the SDE of DPM-Solver++ (arXiv:2211.01095, section 5), the first to the middle (r = 1/2).

    Both stages follow one Brownian path: the second takes up the noise of the first, without which the covariance would be of order 1. Noise
    drawn afresh (``one_path`` False) is what recorded runs have.
    """

    def __init__(self, one_path: bool = True):
        self.one_path = one_path

    def __call__(
        self, b: Basis, sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0
    ) -> Iterator[Row]:
        for sigma, to in steps(sigmas):
            if to == 0:
                yield Row(sigma, to, b.m[0])
                continue
            middle = math.sqrt(sigma * to)
            down, up = ancestral(sigma, middle, eta)
            keep, w = exponential("x0", sigma, down)
            yield Row(sigma, middle, keep * b.x + w @ b.m[:1] + s_noise * up * b.z)
            noise = b.u - keep * b.x - w @ b.m[1:2]  # of the first stage, s_noise included
            down, full = ancestral(sigma, to, eta)
            carried = ancestral(middle, to, eta)[0] / middle if self.one_path else 0.0
            fresh = math.sqrt(max(full**2 - (carried * up) ** 2, 0.0))
            keep, w = exponential("x0", sigma, down)  # r = 1/2: the middle's output alone
            yield Row(
                middle,
                to,
                keep * b.x + w @ b.m[:1] + carried * noise + s_noise * fresh * b.z,
                step=False,
            )


class DPMppMultistepSDE:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, eq. 18 and its multistep form), and k-diffusion's extension of it to three outputs."""

    def __init__(self, order: int, rule: Rule):
        self.order = order
        self.rule: Rule = rule

    def __call__(
        self, b: Basis, sigmas: np.ndarray, eta: float = 1.0, s_noise: float = 1.0
    ) -> Iterator[Row]:
        lam = -np.log(np.maximum(sigmas, 1e-30))
        for i, (sigma, to) in enumerate(steps(sigmas)):
            order = 1 if to == 0 else min(self.order, i + 1)
            places = [(lam[i - j] - lam[i]) / (lam[i + 1] - lam[i]) for j in range(order)]
            keep, w = exponential("x0", sigma, to, places, rule=self.rule, eta=eta)
            up = to * math.sqrt(max(1 - (to / sigma) ** (2 * eta), 0.0))
            yield Row(sigma, to, keep * b.x + w @ b.m[:order] + s_noise * up * b.z)
