"""Algorithms that solve the probability-flow ODE; they draw noise only where options ask for it."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from ldm_jax.diffusion.schedule import root
from ldm_jax.diffusion.tableau import Basis, Form, Row, Rule, ancestral, exponential, steps, weights
from ldm_jax.errors import RequestError

# ------------------------------------------------------- one step, with the noise of "churn" before

Step = Callable[[Basis, float, float], Iterator[Row]]


def euler_step(b: Basis, sigma: float, to: float) -> Iterator[Row]:
    """Euler's method in sigma; equal to DDIM."""
    d = (b.x - b.m[0]) / sigma
    yield Row(sigma, to, b.x + (to - sigma) * d)


def heun_step(b: Basis, sigma: float, to: float) -> Iterator[Row]:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 1."""
    yield Row(sigma, to, b.x + (to - sigma) * (b.x - b.m[0]) / sigma)
    if to > 0:
        d, d_next = (b.x - b.m[1]) / sigma, (b.u - b.m[0]) / to
        yield Row(to, to, b.x + (to - sigma) * (d + d_next) / 2, step=False)


def dpm_2_step(b: Basis, sigma: float, to: float) -> Iterator[Row]:
    """The midpoint method in sigma, with the midpoint in log sigma (k-diffusion)."""
    if to == 0:
        yield from euler_step(b, sigma, to)
    else:
        middle = math.sqrt(sigma * to)
        yield from euler_step(b, sigma, middle)
        yield Row(middle, to, b.x + (to - sigma) * (b.u - b.m[0]) / middle, step=False)


def churned(step: Step) -> Callable[..., Iterator[Row]]:
    """Adds noise before each step (Karras et al. 2022, algorithm 2, lines 4 to 6)."""

    def algorithm(
        b: Basis,
        sigmas: np.ndarray,
        churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> Iterator[Row]:
        for sigma, to in steps(sigmas):
            inside = s_tmin <= sigma <= s_tmax
            gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1) if inside else 0.0
            hat = sigma * (1 + gamma)
            first, *rest = step(b, hat, to)
            yield first._replace(kick=float(root(hat**2 - sigma**2)) * s_noise)
            yield from rest

    return algorithm


euler, heun, dpm_2 = churned(euler_step), churned(heun_step), churned(dpm_2_step)


def restart(
    b: Basis,
    sigmas: np.ndarray,
    restarts: float = 1.0,
    restart_min: float = 0.1,
    restart_max: float = 2.0,
    s_noise: float = 1.0,
) -> Iterator[Row]:
    """Restart sampling (Xu et al. 2023, arXiv:2306.14878, algorithm 2) with Heun's method.

    At the last level from `restart_min` on, noise is added up to the first level of at most
    `restart_max`, and the levels between are repeated, `restarts` times.
    """
    for i, (sigma, to) in enumerate(steps(sigmas)):
        yield from heun_step(b, sigma, to)
        again = [s for s in sigmas[: i + 2] if restart_min <= s <= restart_max]
        following = sigmas[i + 2] if i + 2 < len(sigmas) else 0.0
        if to in again[1:] and following < restart_min:
            for _ in range(int(restarts)):
                now = to
                for high, low in steps(np.array(again)):
                    first, *rest = heun_step(b, high, low)
                    yield first._replace(kick=float(root(high**2 - now**2)) * s_noise)
                    yield from rest
                    now = low


# ----------------------------------------------------------------------------- linear multistep


def lms(b: Basis, sigmas: np.ndarray, order: float = 4) -> Iterator[Row]:
    """Adams-Bashforth in sigma on steps of any lengths: exact integrals of the polynomial."""
    if order != int(order) or not 1 <= order <= len(b.m):
        raise RequestError(f"lms: order must be from 1 to {len(b.m)}, not {order}")
    for i, (sigma, to) in enumerate(steps(sigmas)):
        count = min(i + 1, int(order))
        places = [(sigmas[i - j] - sigma) / (to - sigma) for j in range(count)]
        w = weights(places, [1 / (n + 1) for n in range(count)])
        yield Row(sigma, to, b.x + (to - sigma) * (w @ b.m[:count]))


def outputs_at(lam: np.ndarray, i: int, order: int) -> list[float]:
    """Places of the last `order` outputs in step i, in units of its length.

    One output alone where the step is infinite (it ends at sigma 0) or has no length.
    """
    h = lam[i + 1] - lam[i]
    order = order if 1e-6 < h < 30 else 1
    return [(lam[i - j] - lam[i]) / h for j in range(order)] if order > 1 else [0.0]


@dataclasses.dataclass(frozen=True)
class Multistep:
    """DPM-Solver in eps (arXiv:2206.00927), DPM-Solver++ in x0 (arXiv:2211.01095, algorithm 2).

    With exact rules in eps it is tAB-DEIS in log rho (Zhang & Chen 2023, arXiv:2204.13902).

    Attributes:
      order: Number of outputs that are combined; the first steps have fewer.
      form: What the outputs are.
      second: Rule of `exponential` for two outputs.
      third: Rule for three.
      lower_final: End at low orders, for stability; None: in runs of fewer than 15 steps.
    """

    order: int
    form: Form = "x0"
    second: Rule = "half"
    third: Rule = "exact"
    lower_final: bool | None = None

    def __call__(self, b: Basis, sigmas: np.ndarray) -> Iterator[Row]:
        """The ODE's rows."""
        return self.rows(b, sigmas)

    def rows(
        self, b: Basis, sigmas: np.ndarray, eta: float = 0.0, s_noise: float = 1.0
    ) -> Iterator[Row]:
        """Rows of the ODE, or of the SDE with `eta` > 0."""
        lam, total = -np.log(np.maximum(sigmas, 1e-30)), len(sigmas) - 1
        lower = total < 15 if self.lower_final is None else self.lower_final
        for i, (sigma, to) in enumerate(steps(sigmas)):
            order = min(self.order, i + 1, total - i if lower else self.order)
            places = outputs_at(lam, i, order)
            order = len(places)
            rule = self.second if order == 2 else self.third
            keep, w = exponential(self.form, sigma, to, places, rule=rule, eta=eta)
            up = to * float(root(1 - (to / sigma) ** (2 * eta)))
            yield Row(sigma, to, keep * b.x + w @ b.m[:order] + s_noise * up * b.z)


@dataclasses.dataclass(frozen=True)
class UniPC:
    """UniPC in x0 (Zhao et al. 2023, arXiv:2302.04867): predictor UniP-p, then corrector UniC-p.

    The corrector (algorithm 1) takes the output at the predicted point, costs no call, and raises
    the order to p + 1.

    Attributes:
      p: Outputs of the predictor.
      second: Rule of `exponential` for two outputs. "exact" solves eq. 5, where B(h) cancels;
        "linear" and "half" are the released code's with B_1(h) and B_2(h).
      lower_final: As of `Multistep`.
    """

    p: int
    second: Rule = "exact"
    lower_final: bool | None = None

    def __call__(self, b: Basis, sigmas: np.ndarray) -> Iterator[Row]:
        """The rows."""
        lam, total, count = -np.log(np.maximum(sigmas, 1e-30)), len(sigmas) - 1, 0
        lower = total < 15 if self.lower_final is None else self.lower_final
        for i, (sigma, to) in enumerate(steps(sigmas)):
            state = b.x
            if i > 0:  # correct the step that led here: outputs at its end, its start, and before
                places = [
                    (lam[i - j] - lam[i - 1]) / (lam[i] - lam[i - 1]) for j in range(count + 1)
                ]
                keep, w = exponential("x0", float(sigmas[i - 1]), sigma, places, rule=self.second)
                state = keep * b.x + w @ b.m[: count + 1]
            places = outputs_at(lam, i, min(self.p, i + 1, total - i if lower else self.p))
            count = len(places)
            keep, w = exponential("x0", sigma, to, places, rule=self.second)
            yield Row(sigma, to, keep * state + w @ b.m[:count], restart=state)


# ------------------------------------------------------------------------------ single-step solvers


def single_step(b: Basis, form: Form, points: list[float], taylor: bool = False) -> Iterator[Row]:
    """A step of DPM-Solver-1, -2 or -3 (arXiv:2206.00927, algorithms 1 and 2), or of its ++ in x0.

    Args:
      b: The basis.
      form: What the outputs are.
      points: The sigmas of its calls, and where it ends: [order + 1].
      taylor: Integrate the polynomial through all outputs exactly; otherwise as the papers do.
    """
    order, sigma, to = len(points) - 1, points[0], points[-1]
    keep, w = exponential(form, sigma, points[1])
    yield Row(sigma, points[1], keep * b.x + w @ b.m[:1])
    if order == 1:
        return
    r1, r2 = (math.log(sigma / point) / math.log(sigma / to) for point in points[1:3])
    if order == 2:
        keep, w = exponential(form, sigma, to, [0.0, r1], rule="exact" if taylor else "half")
        yield Row(points[1], to, keep * b.x + w @ b.m[1::-1], step=False)
        return
    keep, w = exponential(form, sigma, points[2], [0.0, r1 / r2])
    yield Row(points[1], points[2], keep * b.x + w @ b.m[1::-1], step=False)
    if taylor:
        keep, w = exponential(form, sigma, to, [0.0, r1, r2])
        y = w @ b.m[2::-1]
    else:  # from the outputs at 0 and r2 alone
        keep, (w0, w2) = exponential(form, sigma, to, [0.0, r2])
        y = w0 * b.m[2] + w2 * b.m[0]
    yield Row(points[2], to, keep * b.x + y, step=False)


@dataclasses.dataclass(frozen=True)
class Singlestep:
    """DPM-Solver-1, -2 and -3 in eps, or DPM-Solver++(2S) in x0 (arXiv:2211.01095, algorithm 1).

    Each call of the model stands at a point of the grid: steps of `order` go over as many points,
    and shorter ones fill the rest.

    Attributes:
      order: Order of the steps.
      form: What the outputs are.
      taylor: As of `single_step`.
      fixed: Steps of `order` only; the number of points must be a multiple of it.
    """

    order: int
    form: Form
    taylor: bool = False
    fixed: bool = False

    def __call__(self, b: Basis, sigmas: np.ndarray) -> Iterator[Row]:
        """The rows; where the grid ends at sigma 0, the last call leads there."""
        last = int(sigmas[-1] == 0)
        calls, start = len(sigmas) - 1 - last, 0
        orders = [self.order] * (calls // self.order) if self.fixed else split(calls, self.order)
        for order in [*orders, *[1] * last]:
            points = [float(sigma) for sigma in sigmas[start : start + order + 1]]
            yield from single_step(b, self.form, points, self.taylor)
            start += order


def split(calls: int, order: int) -> list[int]:
    """Orders of single steps that make `calls` calls (arXiv:2206.00927, section 3.4).

    9 calls by order 3 are steps of order 3, 3, 2, 1.
    """
    if order == 3 and calls and calls % 3 == 0:
        return [3] * (calls // 3 - 1) + [2, 1]
    return [order] * (calls // order) + [calls % order] * (calls % order > 0)


def fast_grid(sigmas: np.ndarray) -> list[np.ndarray]:
    """The steps of "DPM-Solver-fast" (arXiv:2206.00927, section 3.4): [order + 1] sigmas each.

    Steps of one length in log sigma between the ends of `sigmas` [S + 1], with S calls evenly
    within them; where the grid ends at sigma 0, the last call leads there.
    """
    if len(sigmas) == 2 and sigmas[-1] == 0:
        return [sigmas]
    ends = sigmas[:-1] if sigmas[-1] == 0 else sigmas
    orders = split(len(ends) - 1, 3)
    first, last = np.log(ends[[0, -1]])
    edges = np.exp(np.linspace(first, last, len(orders) + 1))
    grid = [np.geomspace(edges[i], edges[i + 1], order + 1) for i, order in enumerate(orders)]
    return grid if len(ends) == len(sigmas) else [*grid, np.array([edges[-1], 0.0])]


def dpm_fast(b: Basis, sigmas: np.ndarray, eta: float = 0.0, s_noise: float = 1.0) -> Iterator[Row]:
    """DPM-Solver-fast; with `eta` every step goes beyond its end, and noise is added up to it."""
    points = fast_grid(sigmas)
    least = min(float(sigma) for sigma in np.concatenate(points) if sigma > 0)
    for edges in points:
        sigma, to = float(edges[0]), float(edges[-1])
        if eta == 0 or to == 0:
            yield from single_step(b, "eps", [float(point) for point in edges])
            continue
        down = max(ancestral(sigma, to, eta)[0], least)
        inner = np.geomspace(sigma, down, len(edges))
        *rows, last = single_step(b, "eps", [float(point) for point in inner])
        yield from rows
        up = float(root(to**2 - down**2))
        yield last._replace(to=to, y=last.y + s_noise * up * b.z)
