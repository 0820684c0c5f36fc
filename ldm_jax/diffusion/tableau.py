"""Samplers as tables: one row for each call of the model, worked out on the host.

Between two calls nearly every sampler forms a linear combination of what it has: the state at which its step began, the state at which the model
was just called, the model's last outputs, and fresh noise. Only the weights differ, and they depend on nothing but the noise levels. So an
algorithm here is a short generator that yields rows of weights, in float64, and one function runs the rows of any of them. The model is
compiled once whether a step calls it once or three times; eta, churn and the grid are numbers in the table, and change no program.

The algorithms are written for y = x / sqrt(abar), of noise sigma = sqrt(1 / abar - 1) (Karras et al. 2022): there dy/dsigma = eps, and x0 keeps
its scale. lambda = -log sigma is half the log SNR of the DPM-Solver papers; h is a step in it. The states themselves stay x.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.dtypes
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Predict
from ldm_jax.diffusion.schedule import Array, Schedule, lift, sigma_to_t, t_to_sigma

Form = Literal["x0", "eps"]


class Basis(NamedTuple):
    """Unit vectors, of which a row's weights are made: ``x`` the state where the step began, ``u`` that of the model's call, ``m[j]`` the model's
    output j calls ago (m[0] the row's own) and ``z`` standard normal noise.
    """

    x: np.ndarray
    u: np.ndarray
    m: np.ndarray
    z: np.ndarray


class Row(NamedTuple):
    """Call the model at noise ``at``, then go to ``y``, of noise ``to``.

    ``step`` says that a step begins here; a row without it is a later stage of one. ``kick`` adds that much noise before the call. ``restart``
    replaces the state where the step began, at ``at``, by these weights (correctors).
    """

    at: float
    to: float
    y: np.ndarray
    step: bool = True
    kick: float = 0.0
    restart: np.ndarray | None = None


class Node(NamedTuple):
    """Rows for states x instead of y: [n] each but for the weights, [n, basis]."""

    t: Array
    a: Array
    s: Array
    begin: Array
    rebase: Array
    keep: Array
    kick: Array
    next: Array
    base: Array | None


Algorithm = Callable[..., Iterator[Row]]


@dataclasses.dataclass(frozen=True)
class Tableau:
    """A sampler made of rows.

    ``algorithm(basis, sigmas, **options)`` yields them for sigmas [S + 1], descending. ``form`` is what m is: x0, or eps as x0 has it, so that
    clipping counts. ``history`` earlier outputs are remembered. ``order`` is the order of convergence: of the ODE's solution, or for
    samplers that draw noise of the result's mean and covariance. ``end`` is the timestep where sampling stops; None is sigma 0.
    """

    algorithm: Algorithm
    order: int
    form: Form = "x0"
    history: int = 0
    draws: int = 0
    corrects: bool = False
    end: float | None = None
    arrange: Callable[[np.ndarray], np.ndarray] | None = (
        None  # the sigmas of a grid -> those that the algorithm takes
    )
    blend_after: bool = dataclasses.field(default=False, init=False)

    @property
    def options(self) -> tuple[str, ...]:
        """What `nodes` takes by name: eta, churn ..."""
        return tuple(inspect.signature(self.algorithm).parameters)[2:]

    def nodes(self, schedule: Schedule, timesteps: np.ndarray, **options: float) -> Node:
        """The table over ascending ``timesteps`` (ints, or floats between them)."""
        sigmas = t_to_sigma(schedule, np.asarray(timesteps, np.float64)[::-1])
        sigmas = np.append(sigmas, 0.0 if self.end is None else t_to_sigma(schedule, self.end))
        return self.table(sigmas, partial(sigma_to_t, schedule), **options)

    def table(
        self, sigmas: np.ndarray, time: Callable[[np.ndarray], np.ndarray], **options: float
    ) -> Node:
        """The table over any sigmas [S + 1]; ``time`` is the model's timestep for each sigma."""
        for name in options:
            if name not in self.options:
                raise ValueError(
                    f"this sampler has no {name!r} (it has {', '.join(self.options) or 'no options'})"
                )
        units = np.eye(self.history + 3 + min(self.draws, 1))
        z = units[-1] if self.draws else np.zeros(len(units))
        basis = Basis(units[0], units[1], units[2 : self.history + 3], z)
        sigmas = np.asarray(sigmas, np.float64)
        sigmas = sigmas if self.arrange is None else self.arrange(sigmas)
        rows, now, base, columns = [], float(sigmas[0]), float(sigmas[0]), []
        rebase = True
        for row in self.algorithm(basis, sigmas, **options):
            rows.append(row)
            base = row.at if row.step and rebase else base
            a, a_base, a_to = (1 / math.hypot(1.0, sigma) for sigma in (row.at, base, row.to))
            to_y = np.where(basis.x > 0, 1 / a_base, np.where(basis.u > 0, 1 / a, 1.0))
            restart = basis.x if row.restart is None else row.restart * to_y * a
            columns.append(
                (
                    a,
                    row.at * a,
                    row.step,
                    row.step and rebase,
                    a * math.hypot(1.0, now),
                    row.kick * a,
                )
            )
            columns[-1] += (row.y * to_y * a_to, restart)
            rebase, base, now = row.restart is None, base if row.restart is None else row.at, row.to
        a, s, begin, new, keep, kick, weights, restart = (
            np.array(column) for column in zip(*columns, strict=True)
        )
        node = Node(
            time(np.array([row.at for row in rows])), a, s, begin, new, keep, kick, weights, restart
        )
        real = jax.dtypes.canonicalize_dtype(np.float64)  # float32, unless a test asks jax for more
        node = jax.tree.map(
            lambda column: column if column.dtype == bool else column.astype(real), node
        )
        return node if self.corrects else node._replace(base=None)

    def init(self, x: jax.Array) -> Any:
        """The state where the step began, and the earlier outputs."""
        return x, (jnp.zeros_like(x),) * self.history

    def step(
        self, carry: Any, node: Node, x: jax.Array, predict: Predict, noise: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        """One row: one call of the model."""
        base, earlier = carry
        z = () if noise is None or not self.draws else (noise[0],)
        if z:
            x = node.keep * x + node.kick * z[0]
        base = jnp.where(node.rebase, x, base)
        x0 = predict(x, node.t, (node.a, node.s)).x0
        m = (x0 if self.form == "x0" else (x - node.a * x0) / node.s, *earlier)
        values = (base, x, *m, *z)
        if node.base is not None:
            base = combine(node.base, values)
        return (base, m[: self.history]), combine(node.next, values), x0


def combine(weights: jax.Array, values: tuple[jax.Array, ...]) -> jax.Array:
    """sum_j weights[j] * values[j], elementwise in full precision (a matrix product would round on accelerators); weights [n] or [n, b]."""
    return sum(
        (lift(w, v) * v for w, v in zip(weights, values, strict=True)),
        jnp.zeros((), values[0].dtype),
    )


# ----------------------------------------------------------------------------------------------------------- what algorithms share


def steps(sigmas: np.ndarray) -> list[tuple[float, float]]:
    """(sigma, next sigma) of each step."""
    return list(itertools.pairwise(float(sigma) for sigma in sigmas))


def phi(k: int, z: Any, np: Any = np) -> Any:
    """phi_k(z) = int_0^1 e^{(1 - r) z} r^{k - 1} / (k - 1)! dr, k > 0 (Hochbruck & Ostermann 2010, eq. 2.11); phi_0 = exp.

    ``np`` may be jax.numpy. Near 0 by its series, where the recursion would cancel.
    """
    near = sum(np.where(abs(z) < 1, z, 0.0) ** j / float(math.factorial(j + k)) for j in range(16))
    far, safe = np.exp(z), np.where(abs(z) < 1, 1.0, z)
    for j in range(k):
        far = (far - 1 / math.factorial(j)) / safe
    return np.where(abs(z) < 1, near, far)


def weights(places: list[float], moments: list[float]) -> np.ndarray:
    """The w with sum_j w_j places_j^n = moments_n: what integrates exactly the polynomial through the outputs at ``places``."""
    return np.linalg.solve(np.vander(places, increasing=True).T, moments)


Rule = Literal["exact", "half", "released"]


def exponential(
    form: Form,
    sigma: float,
    to: float,
    places: list[float] | None = None,
    *,
    rule: Rule = "exact",
    eta: float = 0.0,
) -> tuple[float, np.ndarray]:
    """(k, w): y' = k y + sum_j w_j m_j, the exponential integrator on the polynomial through the outputs m_j at ``places`` in units of the step h.

    The variation-of-constants formula of DPM-Solver (Lu et al. 2022, arXiv:2206.00927, eq. 3.4) and, in x0, DPM-Solver++ (arXiv:2211.01095,
    eq. 8), with its SDE at ``eta`` 1. Of the moments n! z phi_{n+1}(z), z = h or -(1 + eta) h, two outputs by the ``rule`` "half" have (e^z - 1) / 2
    for the second, as both papers do (equal to leading order); three by "released" have half of the third, as the authors' code and
    k-diffusion's do, which costs the third order.
    """
    places = places or [0.0]
    if len(places) == 1:  # also at sigma' = 0, where h is infinite
        ratio = (to / sigma) ** (1 + eta)
        return (ratio, np.array([1 - ratio])) if form == "x0" else (1.0, np.array([to - sigma]))
    h = math.log(sigma / to)
    z, gain = (-(1 + eta) * h, -1.0) if form == "x0" else (h, -to)
    moments = [math.factorial(n) * z * float(phi(n + 1, z)) for n in range(len(places))]
    if len(places) == 2 and rule == "half":
        moments[1] = moments[0] / 2
    if len(places) == 3 and rule == "released":
        moments[2] /= 2
    return math.exp(z) if form == "x0" else 1.0, gain * weights(places, moments)


def ancestral(sigma: float, to: float, eta: float) -> tuple[float, float]:
    """(down, up) with down^2 + up^2 = to^2: go by the ODE to ``down``, then add noise ``up``. At ``eta`` 1 the DDPM posterior's variance."""
    up = min(to, eta * math.sqrt(max(to**2 * (sigma**2 - to**2) / sigma**2, 0.0)))
    return math.sqrt(max(to**2 - up**2, 0.0)), up


def churned(
    sigma: float, count: int, churn: float, tmin: float, tmax: float, s_noise: float
) -> tuple[float, float]:
    """(sigma hat, kick): the noise added before a step (Karras et al. 2022, algorithm 2, lines 4-6) of ``count``."""
    gamma = min(churn / count, math.sqrt(2) - 1) if tmin <= sigma <= tmax else 0.0
    hat = sigma * (1 + gamma)
    return hat, math.sqrt(max(hat**2 - sigma**2, 0.0)) * s_noise
