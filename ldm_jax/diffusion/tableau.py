"""Samplers as tables: one row for each call of the model, computed on the host.

Between two calls nearly every sampler forms a linear combination of the state at which its step
began, the state at which the model was just called, the model's last outputs, and fresh noise. The
weights depend on the noise levels alone. An algorithm is therefore a short generator of rows of
weights, in float64, and `Tableau` runs the rows of any of them: the model is compiled once whether
a step calls it once or three times, and eta, churn and the grid are numbers in the table.

Algorithms are written for y = x / sqrt(abar), of noise sigma = sqrt(1 / abar - 1) (Karras et al.
2022, arXiv:2206.00364): there dy/dsigma = eps, and x0 keeps its scale. lambda = -log sigma is half
the log SNR of the DPM-Solver papers, and h is a step in it. The states themselves stay x.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Predict
from ldm_jax.diffusion.schedule import Array, Schedule, lift, root, sigma_to_t, t_to_sigma
from ldm_jax.errors import RequestError

Form = Literal["x0", "eps"]
Rule = Literal["exact", "half", "linear", "released"]
Time = Callable[[np.ndarray], np.ndarray]  # sigmas -> the model's timesteps


class Basis(NamedTuple):
    """Unit vectors of which the weights of a row are made.

    Attributes:
      x: State where the step began.
      u: State at which the model is called.
      m: m[j], the model's output j calls ago; m[0] is the row's own.
      z: Standard normal noise.
    """

    x: np.ndarray
    u: np.ndarray
    m: np.ndarray
    z: np.ndarray


class Row(NamedTuple):
    """Call the model at noise `at`, then go to the state `y` (weights) of noise `to`.

    Attributes:
      step: A step begins here; other rows are later stages of one.
      kick: Noise added before the call.
      restart: Weights that replace the state where the step began, at `at` (correctors).
    """

    at: float
    to: float
    y: np.ndarray
    step: bool = True
    kick: float = 0.0
    restart: np.ndarray | None = None


class Node(NamedTuple):
    """Rows for states x instead of y: [n] each, the weights `next` and `base` [n, basis]."""

    t: Array
    a: Array
    s: Array
    begin: Array
    rebase: Array
    keep: Array
    kick: Array
    next: Array
    base: Array | None


@dataclasses.dataclass(frozen=True)
class Tableau:
    """A sampler made of rows.

    Attributes:
      algorithm: (basis, sigmas [S + 1] descending, **options) -> rows.
      order: Order of convergence: of the ODE's solution, or with noise of its mean and covariance.
      form: What m is: x0, or eps as it follows from x0 once that is clipped.
      history: Number of earlier outputs that rows refer to.
      draws: 1 where rows have noise.
      corrects: Rows have a `restart`.
      end: Timestep where sampling stops; None is sigma 0.
    """

    algorithm: Callable[..., Iterator[Row]]
    order: int
    form: Form = "x0"
    history: int = 0
    draws: int = 0
    corrects: bool = False
    end: float | None = None
    adaptive: bool = dataclasses.field(default=False, init=False)
    blend_after: bool = dataclasses.field(default=False, init=False)
    renoises: bool = dataclasses.field(default=False, init=False)

    @property
    def options(self) -> dict[str, float]:
        """Keywords of `nodes`: those of the algorithm."""
        return keywords(self.algorithm)

    def nodes(self, schedule: Schedule, timesteps: np.ndarray, **options: float) -> Node:
        """The table over ascending `timesteps`, ints or floats."""
        return self.table(
            descending_sigmas(schedule, timesteps, self.end),
            partial(sigma_to_t, schedule),
            **options,
        )

    def table(self, sigmas: np.ndarray, time: Time, **options: float) -> Node:
        """The table over any descending sigmas [S + 1]."""
        check_options(self.options, options)
        units = np.eye(self.history + 3 + min(self.draws, 1))
        z = units[-1] if self.draws else np.zeros(len(units))
        basis = Basis(units[0], units[1], units[2 : self.history + 3], z)
        sigmas = np.asarray(sigmas, np.float64)
        nodes, now, base, rebase = [], float(sigmas[0]), float(sigmas[0]), True
        for row in self.algorithm(basis, sigmas, **options):
            base = row.at if row.step and rebase else base
            a, a_base, a_to = (1 / math.hypot(1.0, sigma) for sigma in (row.at, base, row.to))
            to_y = np.where(basis.x > 0, 1 / a_base, np.where(basis.u > 0, 1 / a, 1.0))
            nodes.append(
                Node(
                    t=row.at,
                    a=a,
                    s=row.at * a,
                    begin=row.step,
                    rebase=row.step and rebase,
                    keep=a * math.hypot(1.0, now),
                    kick=row.kick * a,
                    next=row.y * to_y * a_to,
                    base=row.restart * to_y * a if row.restart is not None else basis.x,
                )
            )
            rebase, now = row.restart is None, row.to
            base = base if rebase else row.at
        node = Node(*(np.array(column) for column in zip(*nodes, strict=True)))
        node = to_precision(node._replace(t=time(node.t)))
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
    """sum_j weights[j] * values[j], with weights [n] or [n, b].

    Elementwise, because accelerators would round the operands of a matrix product.
    """
    return sum(
        (lift(w, v) * v for w, v in zip(weights, values, strict=True)),
        jnp.zeros((), values[0].dtype),
    )


def to_precision(nodes: Any) -> Any:
    """Numbers of a table in JAX's widest real type: float32 unless x64 is enabled."""
    real = jax.dtypes.canonicalize_dtype(np.float64)
    return jax.tree.map(lambda a: a if a.dtype == bool else np.asarray(a, real), nodes)


def keywords(function: Callable[..., Any]) -> dict[str, float]:
    """Names and defaults of the parameters of a function that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def check_options(known: Iterable[str], given: Mapping[str, Any]) -> None:
    """Raises RequestError where an option is not among the known."""
    for name in given:
        if name not in known:
            have = ", ".join(known) or "no options"
            raise RequestError(f"this sampler has no {name!r} (it has {have})")


def descending_sigmas(schedule: Schedule, timesteps: np.ndarray, end: float | None) -> np.ndarray:
    """Sigmas [S + 1] of ascending timesteps [S], then that of timestep `end`, or 0 for None."""
    sigmas = t_to_sigma(schedule, np.asarray(timesteps, np.float64)[::-1])
    return np.append(sigmas, 0.0 if end is None else t_to_sigma(schedule, end))


# ------------------------------------------------------------------------- what algorithms share


def steps(sigmas: np.ndarray) -> list[tuple[float, float]]:
    """(sigma, next sigma) of each step."""
    return list(itertools.pairwise(float(sigma) for sigma in sigmas))


def phi(k: int, z: Any, xp: Any = np) -> Any:
    """phi_k(z) = int_0^1 e^{(1 - r) z} r^{k - 1} / (k - 1)! dr, and phi_0 = exp.

    Hochbruck & Ostermann 2010, eq. 2.11; near 0 by its series, where the recursion would cancel.
    `xp` is numpy or jax.numpy.
    """
    near = sum(xp.where(abs(z) < 1, z, 0.0) ** j / float(math.factorial(j + k)) for j in range(16))
    far, safe = xp.exp(z), xp.where(abs(z) < 1, 1.0, z)
    for j in range(k):
        far = (far - 1 / math.factorial(j)) / safe
    return xp.where(abs(z) < 1, near, far)


def weights(places: list[float], moments: list[float]) -> np.ndarray:
    """The w with sum_j w_j places_j^n = moments_n, exact for polynomials through the places."""
    return np.linalg.solve(np.vander(places, increasing=True).T, moments)


def exponential(
    form: Form,
    sigma: float,
    to: float,
    places: list[float] | None = None,
    *,
    rule: Rule = "exact",
    eta: float = 0.0,
) -> tuple[float, np.ndarray]:
    """Exponential integrator on the polynomial through earlier outputs.

    The variation-of-constants formula of DPM-Solver (Lu et al. 2022, arXiv:2206.00927, eq. 3.4)
    and, in x0, of DPM-Solver++ (arXiv:2211.01095, eq. 8) and its SDE. Its moments are
    n! z phi_{n+1}(z) with z = h or -(1 + eta) h.

    Args:
      form: What the outputs are.
      sigma: Noise where the step begins.
      to: Noise where it ends.
      places: Where the outputs m_j lie, from the beginning, in units of h. Default [0].
      rule: "exact"; "half" takes (e^z - 1) / 2 for the second of two moments, as both papers do
        (B_2(h) of UniPC); "linear" takes z / 2 (its B_1(h)); "released" halves the third of three,
        as the authors' code and k-diffusion do, which costs the third order.
      eta: 1 for the reverse SDE.

    Returns:
      (k, w) of y' = k y + sum_j w_j m_j.
    """
    places = places or [0.0]
    if len(places) == 1:  # also where to = 0, and h infinite
        ratio = (to / sigma) ** (1 + eta)
        return (ratio, np.array([1 - ratio])) if form == "x0" else (1.0, np.array([to - sigma]))
    h = math.log(sigma / to)
    z, gain = (-(1 + eta) * h, -1.0) if form == "x0" else (h, -to)
    moments = [math.factorial(n) * z * float(phi(n + 1, z)) for n in range(len(places))]
    if len(places) == 2 and rule in ("half", "linear"):
        moments[1] = (moments[0] if rule == "half" else z) / 2
    if len(places) == 3 and rule == "released":
        moments[2] /= 2
    return math.exp(z) if form == "x0" else 1.0, gain * weights(places, moments)


def ancestral(sigma: float, to: float, eta: float) -> tuple[float, float]:
    """(down, up) with down^2 + up^2 = to^2: solve the ODE to `down`, then add noise `up`.

    At `eta` 1 `up` has the variance of the DDPM posterior.
    """
    up = min(to, eta * float(root(to**2 * (sigma**2 - to**2) / sigma**2)))
    return float(root(to**2 - up**2)), up
