"""The losses of LPIPSWithDiscriminator and VQLPIPSWithDiscriminator, and their gradients.

A generator makes pictures y of pictures x. Its loss is

    nll(x, y) + penalty_weight * penalty + d_weight * disc_factor * g_loss

where d_weight balances the gradients of nll and g_loss at the generator's last layer (Esser et al.
2021, arXiv:2012.09841, equation 7). All gradients are one pull-back through the generator with
different cotangents, so that d_weight costs one convolution's gradient and not three passes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldm_jax.models.discriminator import PatchDiscriminator, fit_actnorm
from ldm_jax.train.state import mean_over_devices

Array = jax.Array
Metrics = dict[str, Array]
Nll = Callable[[Array, Array], tuple[Array, Metrics]]

# ------------------------------------------------------------------------------- reconstruction


def make_nll(
    x: Array,
    kind: str,
    perceptual_weight: float,
    distance: Callable[[Array, Array], Array] | None,
    summed: bool,
    weights: Array | None = None,
) -> Nll:
    """Makes ``nll(y, logvar) -> (loss [], metrics)`` for reconstructions y [b, H, W, c] of x.

    error = |x - y| or (x - y)^2, plus perceptual_weight * distance(x, y). The distance is added at
    every pixel and so counts H * W * c times in a sum; that is the original's weighting.

    Args:
      x: Pictures [b, H, W, c] in [-1, 1].
      kind: "l1" or "l2".
      perceptual_weight: Weight of ``distance``.
      distance: (x, y) -> [b], such as LPIPS; None for none.
      summed: For KL: error / exp(logvar) + logvar, summed over a picture and averaged over the
        batch. Else, for VQ: the mean error, without a logvar.
      weights: Weights of the pixels, [b, H, W, 1] or anything that broadcasts to the errors.
    """

    def nll(y: Array, logvar: Array) -> tuple[Array, Metrics]:
        error = jnp.abs(x - y) if kind == "l1" else jnp.square(x - y)
        metrics = {"mse": jnp.square(x - y).mean()}
        if distance is not None:
            perceptual = distance(x, y)
            error = error + perceptual_weight * perceptual[:, None, None, None]
            metrics["p_loss"] = perceptual.mean()
        elif not summed:
            metrics["p_loss"] = jnp.zeros(())
        each = error / jnp.exp(logvar) + logvar if summed else error
        each = each if weights is None else weights * each
        loss = each.sum() / len(x) if summed else each.mean()
        return loss, metrics | {"rec_loss": error.mean(), "nll_loss": loss}

    return nll


# ----------------------------------------------------------------------------- the discriminator


def hinge_loss(real: Array, fake: Array) -> Array:
    """0.5 (mean of max(0, 1 - real) + mean of max(0, 1 + fake))."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def vanilla_loss(real: Array, fake: Array) -> Array:
    """Half the cross-entropy of the logits."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator and its weight in the loss; all fields are static.

    Attributes:
      module: The network.
      loss: A name in `DISCRIMINATOR_LOSSES`.
      start: The step from which it counts (the original's disc_start).
      factor: Weight of both losses from then on (disc_factor).
      weight: Weight of the generator's part (disc_weight).
      ramp: Steps over which the generator's part grows after ``start``; 0: at once.
      cap: Largest d_weight; 0: the original's 1e4 * weight.
      lower: Every rollback of the run multiplies the generator's part by this.
      idle_weight: Whether d_weight is measured where ``factor`` is 0, for the metrics alone; else
        it is then 0. The original's VQ losses measure it, its KL loss does not.
    """

    module: PatchDiscriminator
    loss: str = "hinge"
    start: int = 0
    factor: float = 1.0
    weight: float = 1.0
    ramp: int = 0
    cap: float = 0.0
    lower: float = 1.0
    idle_weight: bool = False

    def on_axis(self, axis_name: str | None) -> "Adversary":
        """Returns the adversary with statistics over the devices of a pmap."""
        return dataclasses.replace(self, module=self.module.clone(axis_name=axis_name))

    def disc_factor(self, step: Array) -> Array:
        """``factor`` from step ``start`` on, 0 before."""
        return jnp.where(step >= self.start, jnp.float32(self.factor), 0.0)

    def generator_factor(self, step: Array, rollbacks: Array | int) -> Array:
        """`disc_factor` times the ramp and the reduction by rollbacks."""
        grown = jnp.clip((step - self.start + 1) / self.ramp, 0.0, 1.0) if self.ramp else 1.0
        return self.disc_factor(step) * grown * jnp.float32(self.lower) ** rollbacks


class Verdict(NamedTuple):
    """A training pass of the discriminator.

    Attributes:
      logits: Of the pictures.
      pullback: Cotangent of the logits -> (that of the parameters, that of the pictures).
      variables: With the statistics after the pass.
    """

    logits: Array
    pullback: Callable[[Array], tuple[Any, Array]]
    variables: dict[str, Any]


def judge(
    module: PatchDiscriminator, variables: dict[str, Any], x: Array, cond: Array | None = None
) -> Verdict:
    """Runs a training pass over pictures x [b, H, W, c].

    A conditional discriminator also gets the channels ``cond`` [b, H, W, k], behind those of x.
    """

    def run(params: Any, x: Array) -> tuple[Array, Any]:
        x = with_condition(x, cond)
        logits, written = module.apply(
            variables | {"params": params}, x, train=True, mutable=["batch_stats"]
        )
        return logits, written["batch_stats"]

    logits, pullback, stats = jax.vjp(run, variables["params"], x, has_aux=True)
    return Verdict(logits, pullback, variables | {"batch_stats": stats})


def with_condition(x: Array, cond: Array | None) -> Array:
    """Returns what a discriminator judges: pictures, and the channels that they are made from."""
    return x if cond is None else jnp.concatenate([x, cond], axis=-1)


def fitted(module: PatchDiscriminator, variables: dict[str, Any], x: Array) -> dict[str, Any]:
    """Fits new ActNorm layers to x, the generator's pictures, since those are judged first."""
    if not module.use_actnorm:
        return variables
    new = jax.tree.leaves(variables["batch_stats"])[0] == 0
    return jax.lax.cond(
        new, lambda v: fit_actnorm(module, v, jax.lax.stop_gradient(x)), lambda v: v, variables
    )


def discriminator_gradients(
    adversary: Adversary, real: Verdict, fake: Verdict, step: Array
) -> tuple[Any, Metrics]:
    """Returns (gradients of the discriminator's parameters, metrics)."""
    loss = DISCRIMINATOR_LOSSES[adversary.loss]
    disc_loss, cotangents = jax.value_and_grad(loss, argnums=(0, 1))(real.logits, fake.logits)
    factor = adversary.disc_factor(step)
    of_both = [
        side.pullback(factor * at)[0] for side, at in zip((real, fake), cotangents, strict=True)
    ]
    logits = {"logits_real": real.logits.mean(), "logits_fake": fake.logits.mean()}
    return jax.tree.map(jnp.add, *of_both), {"disc_loss": factor * disc_loss, **logits}


def update_discriminator(
    discriminator: dict[str, Any], grads: Any, tx: optax.GradientTransformation
) -> tuple[dict[str, Any], Metrics]:
    """Returns the next {"params", "batch_stats", "opt_state"} and metrics."""
    updates, opt_state = tx.update(grads, discriminator["opt_state"], discriminator["params"])
    params = optax.apply_updates(discriminator["params"], updates)
    updated = discriminator | {"params": params, "opt_state": opt_state}
    return updated, {"disc_grad_norm": optax.tree.norm(grads)}


# --------------------------------------------------------------------------------- the generator


def adaptive_weight(nll_grad: Array, g_grad: Array) -> Array:
    """|nll_grad| / (|g_grad| + 1e-4), between 0 and 1e4."""
    norms = (jnp.linalg.norm(grad.ravel()) for grad in (nll_grad, g_grad))
    return jnp.clip(next(norms) / (next(norms) + 1e-4), 0.0, 1e4)


class Generated(NamedTuple):
    """A training pass of the generator.

    Attributes:
      grads: Gradients of its parameters.
      metrics: Metrics of the pass.
      aux: The second output of ``forward``.
      fake: The verdict on its pictures; None without an adversary.
    """

    grads: Any
    metrics: Metrics
    aux: Any
    fake: Verdict | None


def generator_gradients(
    forward: Callable[[Any], tuple[tuple[Array, Array], Any]],
    params: Any,
    nll: Nll,
    *,
    penalty_weight: float,
    logvar: float = 0.0,
    last_layer: Callable[[Any], Array],
    adversary: Adversary | None = None,
    variables: dict[str, Any] | None = None,
    step: Array | int = 0,
    rollbacks: Array | int = 0,
    weighted: Nll | None = None,
    cond: Array | None = None,
    axis_name: str | None = None,
) -> Generated:
    """Computes the gradients of the loss with respect to the generator's ``params``.

    Args:
      forward: ``forward(params) -> ((y [b, H, W, c], penalty []), aux)``.
      params: The generator's parameters; a scalar "logvar" among them is learned.
      nll: See `make_nll`.
      penalty_weight: Weight of the penalty.
      logvar: The fixed log variance, where ``params`` has none.
      last_layer: ``last_layer(grads)`` is the kernel at which d_weight is measured.
      adversary: The discriminator, if there is one.
      variables: Its variables.
      step: The training step.
      rollbacks: How often the run has returned to a checkpoint.
      weighted: ``nll`` with weights of the pixels, to optimise in its place: d_weight and the
        metrics stay those of ``nll``.
      cond: See `judge`.
      axis_name: Of the devices of a pmap.
    """
    (y, penalty), pullback, aux = jax.vjp(forward, params, has_aux=True)
    logvar_now = jnp.asarray(params.get("logvar", logvar), jnp.float32)
    (nll_loss, metrics), (at_y, at_logvar) = jax.value_and_grad(nll, argnums=(0, 1), has_aux=True)(
        y, logvar_now
    )
    of_nll = at_y
    if weighted is not None:
        nll_loss, (at_y, at_logvar) = jax.value_and_grad(
            lambda y, logvar: weighted(y, logvar)[0], argnums=(0, 1)
        )(y, logvar_now)
    loss, fake = nll_loss + penalty_weight * penalty, None
    if adversary is not None:
        assert variables is not None
        step = jnp.asarray(step)
        variables = fitted(adversary.module, variables, with_condition(y, cond))
        fake = judge(adversary.module, variables, y, cond)
        g_loss = -fake.logits.mean()
        _, g_at_y = fake.pullback(jnp.full_like(fake.logits, -1.0 / fake.logits.size))
        d_weight = jnp.zeros(())
        if adversary.factor or adversary.idle_weight:
            # The compiler drops all of these two pull-backs but the last layer's gradient.
            sides = [
                last_layer(pullback((at, jnp.zeros_like(penalty)))[0]) for at in (of_nll, g_at_y)
            ]
            d_weight = adversary.weight * adaptive_weight(*mean_over_devices(sides, axis_name))
        factor = adversary.generator_factor(step, rollbacks)
        push = jnp.minimum(d_weight, adversary.cap or jnp.inf) * factor
        loss, at_y = loss + push * g_loss, at_y + push * g_at_y
        metrics |= {"d_weight": d_weight, "g_loss": g_loss, "adversarial_weight": push}
        metrics["disc_factor"] = adversary.disc_factor(step)
    (grads,) = pullback((at_y, jnp.full_like(penalty, penalty_weight)))
    if "logvar" in params:
        grads = {**grads, "logvar": at_logvar}
        metrics["logvar"] = logvar_now
    return Generated(grads, metrics | {"loss": loss}, aux, fake)
