"""The forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) as a pytree of tables.

Notation: beta_t, alpha_t = 1 - beta_t, abar_t = prod_{s <= t} alpha_s (Ho et al. 2020,
arXiv:2006.11239); sigma_t^2 = (1 - abar_t) / abar_t is the noise of y_t = x_t / sqrt(abar_t)
(Karras et al. 2022, arXiv:2206.00364).
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import ConfigError, did_you_mean

Array = Any  # jax.Array or np.ndarray


@flax.struct.dataclass
class Schedule:
    """Tables over timesteps 0 .. T-1, float32 [T], named as the original's buffers.

    `make_schedule` computes them in float64. `v_posterior` is static: the share of beta_t in the
    posterior's variance.
    """

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


def _flow(n: int, start: float, end: float, s: float) -> np.ndarray:
    noise = np.arange(1, n + 1, dtype=np.float64) / n  # of (1 - noise) x_0 + noise eps
    abar = (1 - noise) ** 2 / ((1 - noise) ** 2 + noise**2)
    return 1 - abar / np.append(1.0, abar[:-1])


# name -> betas(T, start, end, cosine_s), float64 [T]. "linear" is linear in sqrt(beta), as in the
# original (diffusers' scaled_linear); "cosine" is Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17;
# "flow" has the signal-to-noise ratios of rectified flow at even times.
BETA_SCHEDULES = {
    "linear": lambda n, start, end, s: np.linspace(start**0.5, end**0.5, n, dtype=np.float64) ** 2,
    "cosine": _cosine,
    "sqrt_linear": lambda n, start, end, s: np.linspace(start, end, n, dtype=np.float64),
    "flow": _flow,
    "sqrt": lambda n, start, end, s: np.linspace(start, end, n, dtype=np.float64) ** 0.5,
}


def make_betas(
    kind: str,
    timesteps: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Returns beta_t, float64 [timesteps], of the schedule `kind`, a key of BETA_SCHEDULES."""
    if kind not in BETA_SCHEDULES:
        raise ConfigError(
            f"beta schedule {kind!r} does not exist{did_you_mean(kind, BETA_SCHEDULES)}"
        )
    if timesteps < 1:
        raise ConfigError(f"schedule: timesteps must be at least 1, not {timesteps}")
    return BETA_SCHEDULES[kind](timesteps, linear_start, linear_end, cosine_s)


def rescale_to_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(abar) to end at 0 (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    if len(betas) < 2:
        raise ConfigError("schedule: zero_terminal_snr needs at least 2 timesteps")
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
    given_betas: Sequence[float] | np.ndarray | None = None,
) -> Schedule:
    """Builds the tables in float64 and rounds them to float32 once, as `register_schedule` does.

    Args:
      beta_schedule: A key of BETA_SCHEDULES; the next four are its arguments.
      timesteps: T.
      linear_start: First beta.
      linear_end: Last beta.
      cosine_s: Offset of the cosine schedule.
      v_posterior: v of the posterior's variance (1 - v) * beta~_t + v * beta_t.
      zero_terminal_snr: Make the last x_t pure noise. The model must predict v, x0 or flow.
      given_betas: The betas themselves, [T]; the five arguments of a schedule are then ignored.
    """
    if given_betas is None:
        betas = make_betas(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
    else:
        betas = np.asarray(given_betas, np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ConfigError("schedule: given_betas must be a list of numbers in (0, 1]")
    betas = rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas
    alphas = 1.0 - betas
    abar = np.cumprod(alphas)
    prev = np.append(1.0, abar[:-1])
    variance = (1 - v_posterior) * betas * (1 - prev) / (1 - abar) + v_posterior * betas
    with np.errstate(divide="ignore"):  # infinite where abar is 0: eps says nothing about x_0 there
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
        # The floor is for the first posterior variance, which is 0.
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(prev) / (1 - abar),
        "posterior_mean_coef2": (1 - prev) * np.sqrt(alphas) / (1 - abar),
    }
    return Schedule(
        **{name: table.astype(np.float32) for name, table in tables.items()},
        v_posterior=v_posterior,
    )


# ------------------------------------------------------------------ noise levels, host and device


def root(x: Array) -> Array:
    """Square root of a difference that is never negative except by rounding (host)."""
    return np.sqrt(np.maximum(x, 0.0))


def _log_sigmas(abar: Array, xp: Any) -> Array:
    """Log sigma [T], ascending, float.

    Where abar is 0 (zero terminal SNR) it is replaced by 2^-24, as diffusers' schedulers do, or by
    half of the smallest other value, so that sigma stays finite and strictly ascending.
    """
    least = xp.min(xp.where(abar > 0, abar, 1.0))
    abar = xp.where(abar > 0, abar, xp.minimum(2.0**-24, least / 2))
    return (xp.log1p(-abar) - xp.log(abar)) / 2


def log_sigmas(schedule: Schedule) -> np.ndarray:
    """Log sigma_t, float64 [T], ascending, on the host."""
    return _log_sigmas(np.asarray(schedule.alphas_cumprod, np.float64), np)


def t_to_sigma(schedule: Schedule, t: Array) -> np.ndarray:
    """Sigma at float timesteps, float64, on the host; log sigma is linear between timesteps."""
    return np.exp(np.interp(t, np.arange(schedule.timesteps), log_sigmas(schedule)))


def sigma_to_t(schedule: Schedule, sigma: Array) -> np.ndarray:
    """The inverse of `t_to_sigma`, clipped to 0 .. T-1: float timesteps, float64, on the host."""
    with np.errstate(divide="ignore"):
        return np.interp(np.log(sigma), log_sigmas(schedule), np.arange(schedule.timesteps))


def at(table: Array, t: Array, x: Array) -> jax.Array:
    """Returns ``table[t]`` shaped to multiply `x`: t [] or [b] -> [] or [b, 1, ...]."""
    return lift(jnp.asarray(table)[t], x)


def lift(value: Array, x: Array) -> jax.Array:
    """Shapes `value`, [] or [b], to multiply `x` [b, ...]."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


def level(schedule: Schedule, t: Array, x: Array) -> tuple[jax.Array, jax.Array]:
    """Returns (sqrt(abar_t), sqrt(1 - abar_t)) shaped to multiply `x` [b, ...].

    Args:
      schedule: The tables, which may be traced.
      t: Timesteps, [] or [b]; ints, or floats between which log sigma is linear.
      x: The state.
    """
    if not jnp.issubdtype(jnp.result_type(t), jnp.floating):
        tables = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        return at(tables[0], t, x), at(tables[1], t, x)
    logs = _log_sigmas(jnp.asarray(schedule.alphas_cumprod), jnp)
    log_sigma = jnp.interp(t, jnp.arange(schedule.timesteps), logs)
    return (
        lift(jax.nn.sigmoid(-2 * log_sigma) ** 0.5, x),
        lift(jax.nn.sigmoid(2 * log_sigma) ** 0.5, x),
    )


def condition_timesteps(timesteps: int, count: int) -> np.ndarray:
    """Returns the noise level of the condition at each timestep, int32 [timesteps].

    The original's shortened schedule of the condition: ``count`` levels spread over all timesteps
    come first, and every later timestep has the last one.
    """
    levels = np.full(timesteps, timesteps - 1, np.int32)
    levels[:count] = np.round(np.linspace(0, timesteps - 1, count))
    return levels


# ------------------------------------------------------------------------- the process' Gaussians


def q_sample(schedule: Schedule, x0: Array, t: Array, noise: Array) -> jax.Array:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, for t as in `level`."""
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
    """Mean [b, ...], variance and clipped log variance [b, 1, ...] of q(x_{t-1} | x_t, x_0).

    Ho et al. 2020, eq. 6 and 7.
    """
    return (
        at(schedule.posterior_mean_coef1, t, xt) * x0
        + at(schedule.posterior_mean_coef2, t, xt) * xt,
        at(schedule.posterior_variance, t, xt),
        at(schedule.posterior_log_variance_clipped, t, xt),
    )


def predict_x0(schedule: Schedule, xt: Array, t: Array, eps: Array) -> jax.Array:
    """x_0 = sqrt(1 / abar_t) x_t - sqrt(1 / abar_t - 1) eps."""
    return (
        at(schedule.sqrt_recip_alphas_cumprod, t, xt) * xt
        - at(schedule.sqrt_recipm1_alphas_cumprod, t, xt) * eps
    )
