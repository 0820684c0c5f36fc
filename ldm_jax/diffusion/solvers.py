"""Samplers that draw no noise, or none unless asked (churn): solvers of the probability-flow ODE."""

import math
from collections.abc import Iterator

import numpy as np

from ldm_jax.diffusion.tableau import Basis, Form, Row, Rule, churned, exponential, steps, weights


def euler(
    b: Basis,
    sigmas: np.ndarray,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Row]:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without its correction; without churn, DDIM."""
    for sigma, to in steps(sigmas):
        hat, kick = churned(sigma, len(sigmas) - 1, churn, s_tmin, s_tmax, s_noise)
        d = (b.x - b.m[0]) / hat
        yield Row(hat, to, b.x + (to - hat) * d, kick=kick)


def heun(
    b: Basis,
    sigmas: np.ndarray,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Row]:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 2."""
    for sigma, to in steps(sigmas):
        hat, kick = churned(sigma, len(sigmas) - 1, churn, s_tmin, s_tmax, s_noise)
        yield Row(hat, to, b.x + (to - hat) * (b.x - b.m[0]) / hat, kick=kick)
        if to > 0:
            d, d_next = (b.x - b.m[1]) / hat, (b.u - b.m[0]) / to
            yield Row(to, to, b.x + (to - hat) * (d + d_next) / 2, step=False)


def dpm_2(
    b: Basis,
    sigmas: np.ndarray,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Row]:
    """The midpoint method in sigma with its midpoint in log sigma: k-diffusion's blend of DPM-Solver-2 and Karras et al. 2022, algorithm 2."""
    for sigma, to in steps(sigmas):
        hat, kick = churned(sigma, len(sigmas) - 1, churn, s_tmin, s_tmax, s_noise)
        middle = math.sqrt(hat * to)
        d = (b.x - b.m[0]) / hat
        if to == 0:
            yield Row(hat, to, b.x + (to - hat) * d, kick=kick)
        else:
            yield Row(hat, middle, b.x + (middle - hat) * d, kick=kick)
            yield Row(middle, to, b.x + (to - hat) * (b.u - b.m[0]) / middle, step=False)


def lms(b: Basis, sigmas: np.ndarray) -> Iterator[Row]:
    """Adams-Bashforth of order 4 in sigma, on steps of any lengths: exact integrals of the polynomial through the last eps."""
    for i, (sigma, to) in enumerate(steps(sigmas)):
        count = min(i + 1, len(b.m))
        places = [(sigmas[i - j] - sigma) / (to - sigma) for j in range(count)]
        w = weights(places, [1 / (n + 1) for n in range(count)])
        yield Row(sigma, to, b.x + (to - sigma) * (w @ b.m[:count]))


def plms(b: Basis, sigmas: np.ndarray) -> Iterator[Row]:
    """Pseudo linear multistep (Liu et al. 2022, arXiv:2202.09778, eq. 9-13): the DDIM step along a mean of the last four eps.

    Its first step calls the model twice (pseudo improved Euler), and forgets the second output.
    """
    adams = {
        1: [1.0],
        2: [3 / 2, -1 / 2],
        3: [23 / 12, -16 / 12, 5 / 12],
        4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    }
    for i, (sigma, to) in enumerate(steps(sigmas)):
        if i == 0 and len(sigmas) > 2:
            yield Row(sigma, to, b.x + (to - sigma) * b.m[0])
            yield Row(to, to, b.x + (to - sigma) * (b.m[0] + b.m[1]) / 2, step=False)
            continue
        w = adams[min(i + 1, 4)]
        outputs = [
            b.m[j + (0 < i == j)] for j in range(len(w))
        ]  # eps of the first step lies one call further back
        yield Row(
            sigma, to, b.x + (to - sigma) * sum(wj * m for wj, m in zip(w, outputs, strict=True))
        )


# ---------------------------------------------------------------------------------------------------------- DPM-Solver, DPM-Solver++


class Multistep:
    """DPM-Solver (Lu et al. 2022, arXiv:2206.00927) in eps or DPM-Solver++ (arXiv:2211.01095, algorithm 2) in x0, from the last ``order`` outputs.

    It begins at order 1; ``rule`` is that of three outputs, two are combined by "half".
    ``lower_final`` also ends at low orders, which short runs need for stability (by default those under 15 steps).
    """

    def __init__(
        self, order: int, form: Form, rule: Rule = "exact", lower_final: bool | None = None
    ):
        self.order = order
        self.form: Form = form
        self.rule: Rule = rule
        self.lower_final = lower_final

    def __call__(self, b: Basis, sigmas: np.ndarray) -> Iterator[Row]:
        lam, total = -np.log(np.maximum(sigmas, 1e-30)), len(sigmas) - 1
        lower = total < 15 if self.lower_final is None else self.lower_final
        for i, (sigma, to) in enumerate(steps(sigmas)):
            order = 1 if to == 0 else min(self.order, i + 1, total - i if lower else self.order)
            places = [(lam[i - j] - lam[i]) / (lam[i + 1] - lam[i]) for j in range(order)]
            keep, w = exponential(
                self.form, sigma, to, places, rule=self.rule if order == 3 else "half"
            )
            yield Row(sigma, to, keep * b.x + w @ b.m[:order])


class Singlestep:
    """DPM-Solver-1, -2 and -3 (Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2) in eps, or DPM-Solver++(2S) (arXiv:2211.01095, algorithm 1)
    in x0.

    Each call of the model stands at a point of the grid: steps of ``order`` go over as many points, and shorter ones fill the rest.
    """

    def __init__(self, order: int, form: Form):
        self.order = order
        self.form: Form = form

    def __call__(self, b: Basis, sigmas: np.ndarray) -> Iterator[Row]:
        calls = len(sigmas) - 1
        orders = split(calls, self.order) if sigmas[-1] > 0 else [*split(calls - 1, self.order), 1]
        start = 0
        for order in orders:
            points = [float(sigma) for sigma in sigmas[start : start + order + 1]]
            start += order
            sigma, to = points[0], points[-1]
            keep, w = exponential(self.form, sigma, points[1])
            yield Row(sigma, points[1], keep * b.x + w @ b.m[:1])
            h = math.log(sigma / to) if order > 1 else 1.0
            r1, r2 = (math.log(sigma / points[j]) / h if j < order else 0.0 for j in (1, 2))
            if (
                order == 3
            ):  # u_2 = u(r2 h) from the outputs at 0 and r1, then u(h) from those at 0 and r2
                keep, (w0, w1) = exponential(self.form, sigma, points[2], [0.0, r1 / r2])
                yield Row(points[1], points[2], keep * b.x + w0 * b.m[1] + w1 * b.m[0], step=False)
                keep, (w0, w2) = exponential(self.form, sigma, to, [0.0, r2])
                yield Row(points[2], to, keep * b.x + w0 * b.m[2] + w2 * b.m[0], step=False)
            elif order == 2:
                keep, (w0, w1) = exponential(self.form, sigma, to, [0.0, r1], rule="half")
                yield Row(points[1], to, keep * b.x + w0 * b.m[1] + w1 * b.m[0], step=False)


def split(calls: int, order: int) -> list[int]:
    """Orders of single steps that make ``calls`` calls in all (Lu et al. 2022, section 3.4): 9 by order 3 is 3, 3, 2, 1."""
    if order == 3 and calls and calls % 3 == 0:
        return [3] * (calls // 3 - 1) + [2, 1]
    return [order] * (calls // order) + [calls % order] * (calls % order > 0)


def dpm_fast_sigmas(sigmas: np.ndarray) -> np.ndarray:
    """The grid of "DPM-Solver-fast" (Lu et al. 2022, section 3.4): steps of one length in log sigma, with their calls evenly within them.

    Takes the ends and the count [S + 1] of a grid; where that ends at sigma 0, the last call goes there.
    """
    to_zero = sigmas[-1] == 0
    low, calls = (sigmas[-2], len(sigmas) - 2) if to_zero else (sigmas[-1], len(sigmas) - 1)
    if calls < 1:
        return sigmas
    orders = split(calls, 3)
    places = np.concatenate(
        [[0.0], *(i + np.arange(1, order + 1) / order for i, order in enumerate(orders))]
    )
    grid = np.exp(np.log(sigmas[0]) + places / len(orders) * np.log(low / sigmas[0]))
    return np.append(grid, 0.0) if to_zero else grid


class UniPC:
    """UniPC (Zhao et al. 2023, arXiv:2302.04867), multistep in x0: the predictor UniP-p (algorithm 2), then the corrector UniC-p (algorithm 1),
    which takes the output at the predicted point, costs no call, and raises the order to p + 1.

    The coefficients solve eq. 5 exactly, where B(h) cancels.
    """

    def __init__(self, p: int):
        self.p = p

    def __call__(self, b: Basis, sigmas: np.ndarray) -> Iterator[Row]:
        lam, total = -np.log(np.maximum(sigmas, 1e-30)), len(sigmas) - 1
        for i, (sigma, to) in enumerate(steps(sigmas)):
            state = b.x
            if i > 0:  # correct the step that led here: outputs at its end, its start, and before
                count = min(self.p, i) + 1
                places = [(lam[i - j] - lam[i - 1]) / (lam[i] - lam[i - 1]) for j in range(count)]
                keep, w = exponential("x0", float(sigmas[i - 1]), sigma, places)
                state = keep * b.x + w @ b.m[:count]
            count = 1 if to == 0 else min(self.p, i + 1, total - i if total < 15 else self.p)
            places = [(lam[i - j] - lam[i]) / (lam[i + 1] - lam[i]) for j in range(count)]
            keep, w = exponential("x0", sigma, to, places)
            yield Row(sigma, to, keep * state + w @ b.m[:count], restart=state)
