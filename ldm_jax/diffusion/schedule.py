"""The forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) as a pytree of tables, and free functions on it.

Notation: beta_t, alpha_t = 1 - beta_t, abar_t = prod_{s <= t} alpha_s (Ho et al. 2020, arXiv:2006.11239).
"""

import difflib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # jax.Array or np.ndarray


@flax.struct.dataclass
class Schedule:
    """Tables over timesteps 0 .. T-1, each float32 [T], computed in float64 (`make_schedule`). Names are the original's buffers."""

    betas: Array
    alphas_cumprod: Array
    alphas_cumprod_prev: Array
    sqrt_alphas_cumprod: Array
    sqrt_one_minus_alphas_cumprod: Array
    log_one_minus_alphas_cumprod: Array
    sqrt_recip_alphas_cumprod: Array
    sqrt_recipm1_alphas_cumprod: Array
    posterior_variance: Array
    posterior_log_variance_clipped: Array
    posterior_mean_coef1: Array
    posterior_mean_coef2: Array
    v_posterior: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def timesteps(self) -> int:
        """T, the number of steps of the forward process."""
        return self.betas.shape[0]


def _cosine(n: int, start: float, end: float, s: float) -> np.ndarray:
    x = np.arange(n + 1, dtype=np.float64) / n + s
    abar = np.cos(x / (1 + s) * np.pi / 2) ** 2
    abar = abar / abar[0]
    return np.clip(1 - abar[1:] / abar[:-1], 0, 0.999)


# name -> betas(T, start, end, cosine_s), float64. "linear" is linear in sqrt(beta), as the original has it (and Stable Diffusion's scaled_linear).
BETA_SCHEDULES = {
    "linear": lambda n, start, end, s: np.linspace(start**0.5, end**0.5, n, dtype=np.float64) ** 2,
    "cosine": _cosine,  # Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17
    "sqrt_linear": lambda n, start, end, s: np.linspace(start, end, n, dtype=np.float64),
    "sqrt": lambda n, start, end, s: np.linspace(start, end, n, dtype=np.float64) ** 0.5,
}


def make_betas(
    kind: str,
    timesteps: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Betas, float64 [timesteps], of the schedule ``kind``, a key of BETA_SCHEDULES."""
    if kind not in BETA_SCHEDULES:
        near = difflib.get_close_matches(kind, BETA_SCHEDULES, 1)
        raise ValueError(
            f"beta schedule {kind!r} does not exist{f'; did you mean {near[0]!r}?' if near else ''} (have {', '.join(BETA_SCHEDULES)})"
        )
    return BETA_SCHEDULES[kind](timesteps, linear_start, linear_end, cosine_s)


def rescale_to_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas [T] whose sqrt(abar) is shifted to end at 0 and scaled to begin where it did (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1.0 - np.asarray(betas, np.float64)))
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1.0 - abar / np.append(1.0, abar[:-1])


def make_schedule(
    beta_schedule: str = "linear",
    timesteps: int = 1000,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
    v_posterior: float = 0.0,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """The schedule of the original's ``register_schedule``: float64 throughout, float32 at the end.

    ``v_posterior`` v chooses the posterior's variance (1 - v) * beta~_t + v * beta_t. ``zero_terminal_snr`` makes the last x_t pure noise, which
    asks for a model that predicts v or x0.
    """
    betas = make_betas(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
    betas = rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas
    alphas = 1.0 - betas
    abar = np.cumprod(alphas)
    prev = np.append(1.0, abar[:-1])
    variance = (1 - v_posterior) * betas * (1 - prev) / (1 - abar) + v_posterior * betas
    with np.errstate(divide="ignore"):  # without a terminal signal, x_0 cannot be read off eps
        recip = 1 / abar
    tables = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(recip),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(recip - 1),
        "posterior_variance": variance,
        # The first posterior variance is 0 (its log is not finite), hence the floor.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(prev) / (1 - abar),
        "posterior_mean_coef2": (1 - prev) * np.sqrt(alphas) / (1 - abar),
    }
    return Schedule(
        **{name: table.astype(np.float32) for name, table in tables.items()},
        v_posterior=v_posterior,
    )


def at(table: Array, t: Array, x: Array) -> jax.Array:
    """``table[t]`` shaped to multiply ``x``: t [] or [b] -> [1 or b, 1, ...]."""
    values = jnp.asarray(table)[t]
    return (
        values.reshape(values.shape[:1] + (1,) * (x.ndim - values.ndim)) if values.ndim else values
    )


def lift(value: Array, x: Array) -> jax.Array:
    """A number for all, or [b], shaped to multiply ``x`` [b, ...]."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


# Where abar is 0 (zero terminal SNR), log sigma stands at about 10 instead of infinity: sqrt(abar) is 3e-5 there.
ABAR_FLOOR = 1e-9


def level(schedule: Schedule, t: Array, x: Array) -> tuple[jax.Array, jax.Array]:
    """(sqrt(abar_t), sqrt(1 - abar_t)) shaped to multiply ``x``. Between the timesteps (float t) log sigma is linear in t, sigma^2 = 1 / abar - 1."""
    if not jnp.issubdtype(jnp.result_type(t), jnp.floating):
        return at(schedule.sqrt_alphas_cumprod, t, x), at(
            schedule.sqrt_one_minus_alphas_cumprod, t, x
        )
    abar = jnp.maximum(jnp.asarray(schedule.alphas_cumprod), ABAR_FLOOR)
    log_sigma = jnp.interp(
        t, jnp.arange(schedule.timesteps), (jnp.log1p(-abar) - jnp.log(abar)) / 2
    )
    return lift(jax.nn.sigmoid(-2 * log_sigma) ** 0.5, x), lift(
        jax.nn.sigmoid(2 * log_sigma) ** 0.5, x
    )


def log_sigmas(schedule: Schedule) -> np.ndarray:
    """Log sigma_t, float64 [T], ascending, with sigma_t^2 = (1 - abar_t) / abar_t: the noise of x_t / sqrt(abar_t) (Karras et al. 2022)."""
    abar = np.maximum(np.asarray(schedule.alphas_cumprod, np.float64), ABAR_FLOOR)
    return (np.log1p(-abar) - np.log(abar)) / 2


def t_to_sigma(schedule: Schedule, t: Array) -> np.ndarray:
    """Sigma at float timesteps, float64, on the host; log sigma is linear between timesteps."""
    return np.exp(np.interp(t, np.arange(schedule.timesteps), log_sigmas(schedule)))


def sigma_to_t(schedule: Schedule, sigma: Array) -> np.ndarray:
    """The float timestep at which the noise is ``sigma``, float64, on the host: the inverse of `t_to_sigma`, within the schedule."""
    with np.errstate(divide="ignore"):
        return np.interp(np.log(sigma), log_sigmas(schedule), np.arange(schedule.timesteps))


def q_sample(schedule: Schedule, x0: Array, t: Array, noise: Array) -> jax.Array:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise. x0, noise [b, ...]; t [] or [b], int, or float between timesteps."""
    a, s = level(schedule, t, x0)
    return a * x0 + s * noise


def q_mean_variance(
    schedule: Schedule, x0: Array, t: Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean [b, ...], variance and log variance [b, 1, ...] of q(x_t | x_0)."""
    return (
        at(schedule.sqrt_alphas_cumprod, t, x0) * x0,
        at(1.0 - schedule.alphas_cumprod, t, x0),
        at(schedule.log_one_minus_alphas_cumprod, t, x0),
    )


def posterior(
    schedule: Schedule, x0: Array, xt: Array, t: Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean [b, ...], variance and clipped log variance [b, 1, ...] of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 6-7)."""
    mean = (
        at(schedule.posterior_mean_coef1, t, xt) * x0
        + at(schedule.posterior_mean_coef2, t, xt) * xt
    )
    return (
        mean,
        at(schedule.posterior_variance, t, xt),
        at(schedule.posterior_log_variance_clipped, t, xt),
    )


def predict_x0(schedule: Schedule, xt: Array, t: Array, eps: Array) -> jax.Array:
    """x_0 = sqrt(1 / abar_t) x_t - sqrt(1 / abar_t - 1) eps."""
    return (
        at(schedule.sqrt_recip_alphas_cumprod, t, xt) * xt
        - at(schedule.sqrt_recipm1_alphas_cumprod, t, xt) * eps
    )
