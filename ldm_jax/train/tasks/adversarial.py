"""The losses of first stages as the original has them (LPIPSWithDiscriminator, VQLPIPSWithDiscriminator), and their gradients.

A generator makes pictures y of pictures x. Its loss is nll(x, y) + penalty_weight * penalty + d_weight * disc_factor * g_loss, where d_weight
weighs the adversary by the sizes of both gradients at the generator's last layer (Esser et al. 2021, arXiv:2012.09841, equation 7). All of these
gradients are one pull-back through the generator with different cotangents, so that d_weight costs a convolution's gradient and not three passes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldm_jax.models.discriminator import PatchDiscriminator, fit_actnorm
from ldm_jax.train.state import over_devices

Array = jax.Array
Metrics = dict[str, Array]

# ------------------------------------------------------------------------------------------------------------- reconstruction


def make_nll(
    x: Array,
    kind: str,
    perceptual_weight: float,
    distance: Callable[[Array, Array], Array] | None,
    summed: bool,
) -> Callable[[Array, Array], tuple[Array, Metrics]]:
    """``nll(y, logvar) -> (loss [], metrics)`` of reconstructions y [b, H, W, c] of x.

    error = |x - y| (``kind`` "l1") or (x - y)^2 ("l2"), + perceptual_weight * distance(x, y) [b]. ``summed``, for KL: error / exp(logvar) + logvar,
    summed over a picture and averaged over the batch. Else, for VQ, the error's mean, without a logvar.
    The distance is added at every pixel and so counts H * W * c times in the sum; that is the original's weighting.
    """

    def nll(y: Array, logvar: Array) -> tuple[Array, Metrics]:
        error = jnp.abs(x - y) if kind == "l1" else jnp.square(x - y)
        metrics = {"mse": jnp.square(x - y).mean()}
        if distance is not None:
            apart = distance(x, y)
            error = error + perceptual_weight * apart[:, None, None, None]
            metrics["p_loss"] = apart.mean()
        loss = (error / jnp.exp(logvar) + logvar).sum() / len(x) if summed else error.mean()
        return loss, metrics | {"rec_loss": error.mean(), "nll_loss": loss}

    return nll


# ------------------------------------------------------------------------------------------------------------- the discriminator


def hinge_loss(real: Array, fake: Array) -> Array:
    """0.5 (mean of max(0, 1 - real) + mean of max(0, 1 + fake))."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def vanilla_loss(real: Array, fake: Array) -> Array:
    """The cross-entropy of logits, halved."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator and how much it counts; all of it static.

    ``start``, ``factor`` and ``weight`` are the original's disc_start, disc_factor and disc_weight. The rest is not its, and off by default: after
    ``start`` the generator's part grows over ``ramp`` steps, d_weight goes no higher than
    ``cap`` (0: the original's 1e4 * weight), and every rollback of the run multiplies the generator's part by ``lower``.
    """

    module: PatchDiscriminator
    loss: str = "hinge"
    start: int = 0
    factor: float = 1.0
    weight: float = 1.0
    ramp: int = 0
    cap: float = 0.0
    lower: float = 1.0

    def on_axis(self, axis_name: str | None) -> "Adversary":
        """With statistics over the devices of a pmap."""
        return dataclasses.replace(self, module=self.module.clone(axis_name=axis_name))

    def disc_factor(self, step: Array) -> Array:
        """``factor`` from step ``start`` on, 0 before."""
        return jnp.where(step >= self.start, jnp.float32(self.factor), 0.0)

    def generator_factor(self, step: Array, rollbacks: Array | int) -> Array:
        """`disc_factor` as far as it has grown, lowered by what went wrong."""
        grown = jnp.clip((step - self.start + 1) / self.ramp, 0.0, 1.0) if self.ramp else 1.0
        return self.disc_factor(step) * grown * jnp.float32(self.lower) ** rollbacks


class Verdict(NamedTuple):
    """The discriminator's ``logits`` of pictures; ``pullback``: their cotangent -> (that of its parameters, that of the pictures); ``variables``
    with the statistics after this pass.
    """

    logits: Array
    pullback: Callable[[Array], tuple[Any, Array]]
    variables: dict[str, Any]


def judge(module: PatchDiscriminator, variables: dict[str, Any], x: Array) -> Verdict:
    """A training pass over pictures x [b, H, W, c]."""

    def run(params: Any, x: Array) -> tuple[Array, Any]:
        logits, written = module.apply(
            variables | {"params": params}, x, train=True, mutable=["batch_stats"]
        )
        return logits, written["batch_stats"]

    logits, pullback, stats = jax.vjp(run, variables["params"], x, has_aux=True)
    return Verdict(logits, pullback, variables | {"batch_stats": stats})


def fitted(module: PatchDiscriminator, variables: dict[str, Any], x: Array) -> dict[str, Any]:
    """Variables whose ActNorm layers, if they are new, are fitted to x: to what the generator makes, since that is judged first."""
    if not module.use_actnorm:
        return variables
    new = jax.tree.leaves(variables["batch_stats"])[0] == 0
    return jax.lax.cond(
        new, lambda v: fit_actnorm(module, v, jax.lax.stop_gradient(x)), lambda v: v, variables
    )


def discriminator_gradients(
    adversary: Adversary, real: Verdict, fake: Verdict, step: Array
) -> tuple[Any, Metrics]:
    """(gradients of the discriminator's parameters, metrics); nothing reaches the generator."""
    loss = DISCRIMINATOR_LOSSES[adversary.loss]
    disc_loss, cotangents = jax.value_and_grad(loss, argnums=(0, 1))(real.logits, fake.logits)
    factor = adversary.disc_factor(step)
    of_both = [
        side.pullback(factor * at)[0] for side, at in zip((real, fake), cotangents, strict=True)
    ]
    logits = {"logits_real": real.logits.mean(), "logits_fake": fake.logits.mean()}
    return jax.tree.map(jnp.add, *of_both), {"disc_loss": factor * disc_loss, **logits}


# ----------------------------------------------------------------------------------------------------------------- the generator


def adaptive_weight(nll_grad: Array, g_grad: Array) -> Array:
    """|nll_grad| / (|g_grad| + 1e-4), between 0 and 1e4."""
    return jnp.clip(
        jnp.linalg.norm(nll_grad.ravel()) / (jnp.linalg.norm(g_grad.ravel()) + 1e-4), 0.0, 1e4
    )


class Generated(NamedTuple):
    """What a generator's pass gives: gradients of its parameters, metrics, what its ``forward`` returned beside, and the verdict on its pictures."""

    grads: Any
    metrics: Metrics
    aux: Any
    fake: Verdict | None


def generator_gradients(
    forward: Callable[[Any], tuple[tuple[Array, Array], Any]],
    params: Any,
    nll: Callable[[Array, Array], tuple[Array, Metrics]],
    *,
    penalty_weight: float,
    logvar: float = 0.0,
    last_layer: Callable[[Any], Array],
    adversary: Adversary | None = None,
    variables: dict[str, Any] | None = None,
    step: Array | int = 0,
    rollbacks: Array | int = 0,
    axis_name: str | None = None,
) -> Generated:
    """Gradients of the loss by the generator's ``params``.

    ``forward(params) -> ((y [b, H, W, c], penalty []), anything)``; ``last_layer(grads)`` is the kernel that d_weight is measured at; ``variables``
    are the discriminator's. Where ``params`` hold a scalar "logvar" it is learned, else it is ``logvar``.
    """
    (y, penalty), pullback, aux = jax.vjp(forward, params, has_aux=True)
    logvar_now = jnp.asarray(params.get("logvar", logvar), jnp.float32)
    (nll_loss, metrics), (at_y, at_logvar) = jax.value_and_grad(nll, argnums=(0, 1), has_aux=True)(
        y, logvar_now
    )
    loss, fake = nll_loss + penalty_weight * penalty, None
    if adversary is not None:
        assert variables is not None
        step = jnp.asarray(step)
        fake = judge(adversary.module, fitted(adversary.module, variables, y), y)
        g_loss = -fake.logits.mean()
        _, g_at_y = fake.pullback(jnp.full_like(fake.logits, -1.0 / fake.logits.size))
        # The compiler drops all of these two pull-backs but the last layer's gradient.
        sides = [last_layer(pullback((at, jnp.zeros_like(penalty)))[0]) for at in (at_y, g_at_y)]
        d_weight = adversary.weight * adaptive_weight(*over_devices(sides, axis_name))
        push = jnp.minimum(d_weight, adversary.cap or jnp.inf) * adversary.generator_factor(
            step, rollbacks
        )
        loss, at_y = loss + push * g_loss, at_y + push * g_at_y
        metrics |= {
            "d_weight": d_weight,
            "disc_factor": adversary.disc_factor(step),
            "g_loss": g_loss,
        }
        metrics["adversarial_weight"] = push
    (grads,) = pullback((at_y, jnp.full_like(penalty, penalty_weight)))
    if "logvar" in params:
        grads = {**grads, "logvar": at_logvar}
        metrics["logvar"] = logvar_now
    return Generated(grads, metrics | {"loss": loss}, aux, fake)


def update_discriminator(
    discriminator: dict[str, Any], grads: Any, tx: optax.GradientTransformation
) -> tuple[dict[str, Any], Metrics]:
    """The next {"params", "batch_stats", "opt_state"}."""
    updates, opt_state = tx.update(grads, discriminator["opt_state"], discriminator["params"])
    params = optax.apply_updates(discriminator["params"], updates)
    return discriminator | {"params": params, "opt_state": opt_state}, {
        "disc_grad_norm": optax.tree.norm(grads)
    }
