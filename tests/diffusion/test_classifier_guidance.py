"""Classifier guidance on Gaussian classes, known in closed form, and with the UNet encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import classifier_gradient, predictor
from ldm_jax.diffusion.objective import get_objective
from ldm_jax.diffusion.schedule import level, make_schedule
from ldm_jax.models.encoder_unet import EncoderUNet

SCHEDULE = make_schedule("linear", 1000, 0.0015, 0.0195)
MEANS, STD, PRIOR = (
    jnp.array([[2.0, -1.0], [-1.0, 0.5], [0.0, 3.0]]),
    0.6,
    jnp.array([0.5, 0.2, 0.3]),
)
X, LABELS = jnp.array([[0.3, 0.1], [-0.5, 1.0], [1.5, 1.5]]), jnp.array([0, 1, 2])


def joint(x, t):
    """log p(x_t, class) [b, n] up to a constant, and the variance of x_t in a class."""
    a, s = level(SCHEDULE, t, x)
    a, s = jnp.reshape(a, (-1, 1, 1)), jnp.reshape(s, (-1, 1, 1))
    variance = a**2 * STD**2 + s**2
    return jnp.log(PRIOR) - (jnp.square(x[:, None] - a * MEANS) / (2 * variance)).sum(-1), (
        a,
        s,
        variance,
    )


def marginal_eps(x, t):
    return -level(SCHEDULE, t, x)[1] * jax.grad(
        lambda x: jax.nn.logsumexp(joint(x, t)[0], axis=1).sum()
    )(x)


def class_eps(x, t, labels):
    a, s, variance = joint(x, t)[1]
    return (s * (x[:, None] - a * MEANS[labels][:, None]) / variance)[:, 0]


@pytest.mark.parametrize("t", [10, 400, 900, 250.5])
@pytest.mark.parametrize("objective", ["eps", "x0", "v"])
def test_bayes(t, objective):
    """grad log p(x) + grad log p(y | x) = grad log p(x | y), for every prediction type."""
    t = jnp.asarray(t)

    def denoise(x, t):
        eps, (a, s) = marginal_eps(x, t), level(SCHEDULE, t, x)
        return get_objective(objective).target((x - s * eps) / a, eps, a, s)

    guided = predictor(
        denoise,
        SCHEDULE,
        objective,
        correct=classifier_gradient(lambda x, t: joint(x, t)[0], LABELS, 1.0, SCHEDULE),
    )
    eps, x0 = guided(X, t)
    expected = class_eps(X, t, LABELS)
    a, s = level(SCHEDULE, t, X)
    np.testing.assert_allclose(eps, expected, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(x0, (X - s * expected) / a, rtol=2e-3, atol=2e-3)


def test_every_picture_has_its_own_scale():
    def classifier(x, t):
        return joint(x, t)[0]

    t, zero = jnp.int32(500), jnp.zeros_like(X)
    one, many = (
        classifier_gradient(classifier, LABELS, s, SCHEDULE)(zero, X, t)
        for s in (1.0, jnp.array([0.0, 1.0, 3.0]))
    )
    np.testing.assert_allclose(many, one * jnp.array([[0.0], [1.0], [3.0]]), rtol=1e-5)


def test_the_networks_gradient_is_that_of_its_log_probability():
    """Groups of several channels: in a group of one, each channel's spatial mean is constant."""
    net = EncoderUNet(
        in_channels=2,
        out_channels=3,
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=(),
        channel_mult=(1,),
        num_heads=2,
        norm_groups=8,
    )
    x, t = (
        jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 2)), jnp.float32),
        jnp.int32(300),
    )
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.full(2, t))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), shapes
    )
    labels = jnp.array([2, 0])

    @jax.jit
    def both(x, step):
        correct = classifier_gradient(lambda x, t: net.apply(params, x, t), labels, 1.0, SCHEDULE)
        logs = [jax.nn.log_softmax(net.apply(params, x + e, jnp.full(2, t))) for e in (step, -step)]
        return correct(jnp.zeros_like(x), x, t), logs[0] - logs[1]

    step = 2e-2 * jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    eps, difference = both(x, step)
    s = level(SCHEDULE, t, x)[1]
    slope = -(eps / s * step).sum((1, 2, 3))
    np.testing.assert_allclose(2 * slope, difference[jnp.arange(2), labels], rtol=0.03, atol=3e-6)
    assert np.abs(slope).min() > 1e-4
