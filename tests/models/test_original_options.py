"""Options of the original's networks and losses, on tiny inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.schedule import condition_timesteps
from ldm_jax.errors import ConfigError
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.patches import PatchPlan, normalization, patchwise, weights
from ldm_jax.models.quantize import VectorQuantizer
from ldm_jax.models.x_transformer import TransformerWrapper
from ldm_jax.nn.resize import resize, resize_to
from ldm_jax.train.state import ema_update
from ldm_jax.train.tasks.adversarial import Adversary, generator_gradients, make_nll
from ldm_jax.train.tasks.batch_resize import BatchResize, resized


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------------------------------- patches


def test_patches_of_a_local_function_are_the_function():
    x, plan = noise(2, 8, 12, 3), PatchPlan((4, 4), (2, 2))
    y = patchwise(lambda _, p: jnp.tanh(2 * p), (x,), plan)
    assert np.allclose(y, np.tanh(2 * x), atol=1e-6)
    up = patchwise(lambda _, p: jnp.repeat(jnp.repeat(p, 2, 1), 2, 2), (x,), plan, 2)
    assert np.allclose(up, np.repeat(np.repeat(x, 2, 1), 2, 2), atol=1e-6)
    down = patchwise(lambda _, p: p[:, ::2, ::2], (x,), plan, 0.5)
    assert np.allclose(down, x[:, ::2, ::2], atol=1e-6)


def test_arrays_are_cut_together_and_patches_are_numbered_by_row():
    x, c, plan = noise(1, 4, 6, 1), noise(1, 4, 6, 2, seed=1), PatchPlan((4, 2), (4, 2))
    y = patchwise(lambda i, p, q: p + q.sum(-1, keepdims=True) + 10.0 * i, (x, c), plan)
    number = np.repeat([0.0, 10.0, 20.0], 2)[None, None, :, None]
    assert np.allclose(y, x + c.sum(-1, keepdims=True) + number, atol=1e-5)


def test_the_last_patches_end_at_the_edge():
    x, plan = noise(1, 7, 9, 1), PatchPlan((4, 4), (3, 3))
    assert plan.counts(7, 9) == (2, 3)
    assert np.allclose(patchwise(lambda _, p: 3 * p, (x,), plan), 3 * x, atol=1e-6)


def test_a_patch_larger_than_the_picture_is_the_picture():
    x = noise(1, 4, 6, 1)
    y = patchwise(lambda _, p: p - p.mean(), (x,), PatchPlan((16, 16), (8, 8)))
    assert np.allclose(y, x - x.mean(), atol=1e-6)


@pytest.mark.fast
def test_weights_are_those_of_the_border_and_of_the_tie_breaker():
    plan = PatchPlan((4, 4), (2, 2), clip_min_weight=0.1, clip_max_weight=0.3)
    inside = weights(plan, 3, 3)
    assert inside.shape == (9, 4, 4)
    assert (inside.min(), inside.max()) == (np.float32(0.1), np.float32(0.3))
    tied = weights(PatchPlan((4, 4), (2, 2), True, 0.1, 0.3, clip_min_tie_weight=0.02), 3, 3)
    assert np.allclose(tied[4], 0.5 * inside[4])  # the middle patch
    assert np.allclose(tied[0], 0.02 * inside[0])
    assert np.allclose(normalization(plan, 4, 4), inside[0])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchPlan((4, 4), (5, 4)), "leaves gaps"),
        (lambda: PatchPlan((0, 4), (1, 4)), "at least 1"),
    ],
)
def test_patches_that_leave_out_pixels_are_an_error(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ------------------------------------------------------------------------------------- transformer


WRAPPER = TransformerWrapper(num_tokens=7, max_seq_len=5, dim=8, depth=2, heads=2, attn_dim_head=4)


def encoded(tokens, *args, **fields):
    module = WRAPPER.clone(**fields)
    variables = module.init(jax.random.key(0), tokens)
    return variables["params"], module.apply(variables, tokens, *args)


def test_memory_tokens_are_attended_to_and_cut_off():
    tokens = np.array([[1, 2, 3]])
    params, out = encoded(tokens, num_memory_tokens=2)
    assert params["memory_tokens"].shape == (2, 8)
    assert out.embeddings.shape == (1, 3, 8)
    assert out.attention[0].shape == (1, 2, 5, 5)


def test_sparse_attention_keeps_as_many_places():
    _, out = encoded(np.array([[1, 2, 3, 4]]), attn_sparse_topk=2)
    assert ((np.asarray(out.attention[-1]) > 0).sum(-1) == 2).all()


def test_memories_grow_to_their_length_and_change_the_next_segment():
    tokens = np.array([[1, 2, 3]])
    module = WRAPPER.clone(max_mem_len=4)
    variables = module.init(jax.random.key(0), tokens)
    run = jax.jit(module.apply)
    first = run(variables, tokens)
    second = run(variables, tokens, None, first.mems)
    assert [m.shape[1] for m in (*first.mems, *second.mems)] == [3, 3, 4, 4]
    assert not np.allclose(first.embeddings, second.embeddings)
    with pytest.raises(ValueError, match="take no mask"):
        module.apply(variables, tokens, np.ones((1, 3), bool), first.mems)


def test_too_many_tokens_are_an_error():
    with pytest.raises(ValueError, match="6 tokens exceed max_seq_len 5"):
        encoded(np.zeros((1, 6), int))


# ------------------------------------------------------------------------------------------ losses


def gan(cond=None, weighted=False, **adversary):
    x, module = noise(2, 24, 24, 3), PatchDiscriminator(3 + (cond is not None) * 2, 8, 2)
    shown = x if cond is None else np.concatenate([x, cond], -1)
    variables = dict(module.init(jax.random.key(0), shown))
    nll = make_nll(x, "l2", 0.0, None, summed=True)
    weights = np.linspace(0, 1, 24, dtype=np.float32)[None, :, None, None]
    return generator_gradients(
        lambda p: ((jnp.einsum("bhwc,cd->bhwd", x, p["kernel"]), jnp.zeros(())), None),
        {"kernel": jnp.eye(3) * 0.5},
        nll,
        penalty_weight=0.0,
        last_layer=lambda grads: grads["kernel"],
        adversary=Adversary(module, **adversary),
        variables=variables,
        cond=cond,
        weighted=make_nll(x, "l2", 0.0, None, summed=True, weights=weights) if weighted else None,
    )


def test_pixel_weights_change_the_loss_and_neither_its_log_nor_d_weight():
    plain, weighted = gan(), gan(weighted=True)
    for name in ("nll_loss", "rec_loss", "d_weight"):
        assert np.allclose(plain.metrics[name], weighted.metrics[name], rtol=1e-5), name
    assert weighted.metrics["loss"] < plain.metrics["loss"]
    assert not np.allclose(plain.grads["kernel"], weighted.grads["kernel"])


def test_a_conditional_discriminator_depends_on_its_condition():
    logits = [gan(cond=noise(2, 24, 24, 2, seed=s)).fake.logits for s in (1, 2)]
    assert not np.allclose(*logits)


def test_an_idle_adversary_is_measured_only_where_asked_for():
    assert float(gan(factor=0.0).metrics["d_weight"]) == 0
    assert float(gan(factor=0.0, idle_weight=True).metrics["d_weight"]) > 0


# --------------------------------------------------------------------------------- smaller options


@pytest.mark.fast
def test_condition_levels():
    levels = condition_timesteps(10, 4)
    assert levels.tolist() == [0, 3, 6, 9, 9, 9, 9, 9, 9, 9]


@pytest.mark.fast
def test_an_average_without_warm_up_has_its_decay_at_once():
    assert np.allclose(ema_update(jnp.array(1.0), jnp.array(0.0), None, 0.75), 0.75)
    assert np.allclose(ema_update(jnp.array(1.0), jnp.array(0.0), jnp.int32(1), 0.75), 2 / 11)


def test_recorded_draws_replace_unknown_codes():
    module = VectorQuantizer(4, 2, remap=(1, 3), unknown_index="random", sane_index_shape=True)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 1, 1, 2)))
    bound = module.bind(variables)
    found = bound.remap_to_used(jnp.arange(4), jnp.array([1, 1, 0, 1]))
    assert found.tolist() == [1, 0, 0, 1]
    flat = module.clone(sane_index_shape=False, unknown_index=0)
    assert flat.apply(variables, jnp.zeros((2, 1, 3, 2))).indices.shape == (6, 1)


@pytest.mark.fast
def test_batches_change_their_size_by_step():
    plan = BatchResize(16, 40)
    assert plan.sizes == [16, 32, 48]  # one above the upper size, as in the original
    assert [plan.size_at(step) for step in range(5)] == [40] * 5
    later = [plan.size_at(step, seed=3) for step in range(5, 60)]
    assert set(later) == {16, 32, 48}
    assert later == [plan.size_at(step, seed=3) for step in range(5, 60)]
    with pytest.raises(ConfigError, match="smallest size, then the largest"):
        BatchResize(32, 16)


def test_resized_batches_keep_their_range():
    images = np.full((1, 20, 24, 3), 200, np.uint8)
    assert resized(images, 20) is images
    assert resized(images, 32).shape == (1, 32, 32, 3)
    assert np.allclose(resized(images, 32), 200, atol=1e-3)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "area"])
def test_resizing_to_a_size_is_resizing_by_its_scale(method):
    x = noise(1, 6, 8, 2)
    assert np.allclose(resize_to(x, (3, 4), method), partial(resize, x)(0.5, method), atol=1e-6)
