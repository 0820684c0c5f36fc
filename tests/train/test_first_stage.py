"""Adversarial and vector-quantised first stages: gradients, carried state, guards."""

from importlib import import_module
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SMALL_KL, random_params, worst
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.configs.common import base
from ldm_jax.distributed.compile import compile_step
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build_first_stage
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.train.start import with_parameters
from ldm_jax.train.state import TrainState, create_state
from ldm_jax.train.tasks import adversarial, autoencoder
from ldm_jax.train.tasks.adversarial import Adversary, generator_gradients, make_nll
from ldm_jax.train.tasks.autoencoder import AutoencoderTask
from ldm_jax.train.tasks.codebook import (
    DEAD,
    candidate_count,
    candidate_places,
    restart_codes,
    update_usage,
)

pytestmark = pytest.mark.compile

VQ = {**SMALL_KL, "kind": "vq", "n_embed": 12, "quantizer": "ema"}


# ---------------------------------------------------------------------------------------- gradients


def test_the_generator_has_the_gradients_of_its_loss_with_d_weight_held():
    """Against full gradients: one per side of d_weight, and one of the loss with it fixed."""
    rng = np.random.default_rng(0)
    x, feat = rng.standard_normal((2, 2, 8, 8, 3)).astype(np.float32)
    disc = PatchDiscriminator(ndf=4, n_layers=1)
    variables = jax.tree.map(lambda a: a, disc.init(jax.random.key(0), x))
    adversary = Adversary(disc, start=3, factor=0.7, weight=0.5, ramp=4, cap=0.0, lower=0.5)
    params = {
        "first": rng.standard_normal((3, 5)).astype(np.float32),
        "last": rng.standard_normal((5, 3)).astype(np.float32),
        "logvar": np.float32(0.3),
    }
    nll = make_nll(x, "l1", 0.0, None, summed=True)

    def forward(params):
        h = jnp.tanh(feat @ params["first"])
        return (jnp.tanh(h @ params["last"]), jnp.square(h).mean()), None

    def sides(params):
        (y, penalty), _ = forward(params)
        logits, _ = disc.apply(variables, y, train=True, mutable=["batch_stats"])
        return nll(y, params["logvar"])[0], -logits.mean(), penalty

    at_nll, at_g = (jax.jit(jax.grad(lambda p, i=i: sides(p)[i]))(params)["last"] for i in (0, 1))
    d_weight = 0.5 * np.linalg.norm(at_nll) / (np.linalg.norm(at_g) + 1e-4)

    def loss(params, push):
        nll_loss, g_loss, penalty = sides(params)
        return nll_loss + 0.01 * penalty + push * g_loss

    made = jax.jit(
        lambda params, step: generator_gradients(
            forward,
            params,
            nll,
            penalty_weight=0.01,
            last_layer=lambda grads: grads["last"],
            adversary=adversary,
            variables=variables,
            step=step,
            rollbacks=1,
        )[:2]
    )
    # Zero before its start, then a quarter more each step; one rollback halves it.
    for step, grown in [(2, 0.0), (3, 0.25), (6, 1.0), (9, 1.0)]:
        grads, metrics = made(params, step)
        push = d_weight * 0.7 * grown * 0.5
        expected, expected_grads = jax.jit(jax.value_and_grad(loss))(params, push)
        np.testing.assert_allclose(metrics["d_weight"], d_weight, rtol=1e-5)
        np.testing.assert_allclose(metrics["adversarial_weight"], push, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        assert worst(grads, expected_grads) < 2e-5


def test_d_weight_is_bounded_by_the_cap_alone(monkeypatch):
    """An injected fault: the adversary's gradient vanishes, and the ratio explodes."""
    monkeypatch.setattr(adversarial, "adaptive_weight", lambda a, b: jnp.float32(1e4))
    x = np.zeros((2, 8, 8, 3), np.float32)
    disc = PatchDiscriminator(ndf=4, n_layers=1)
    variables = disc.init(jax.random.key(0), x)

    def pushed(cap):
        return generator_gradients(
            lambda params: ((x + params["w"], jnp.zeros(())), None),
            {"w": jnp.ones(3)},
            make_nll(x, "l2", 0.0, None, summed=False),
            penalty_weight=1.0,
            last_layer=lambda grads: grads["w"],
            adversary=Adversary(disc, weight=0.5, cap=cap),
            variables=variables,
        ).metrics

    assert float(pushed(0.0)["adversarial_weight"]) == 5000.0
    capped = pushed(2.0)
    # The log shows that the cap applied.
    assert (float(capped["d_weight"]), float(capped["adversarial_weight"])) == (5000.0, 2.0)


def test_the_temperature_falls_by_half_a_cosine():
    config = SimpleNamespace(temperature=2.0, temperature_final=0.5, temperature_steps=10)
    found = [float(autoencoder.temperature(config, jnp.int32(n))) for n in (0, 5, 10, 20)]
    np.testing.assert_allclose(found, [2.0, 1.25, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", ["emoji_kl", "emoji_vq", "photos_kl_gan", "photos_vq_gan"])
def test_every_config_builds_and_those_of_the_original_have_no_guards(name):
    get_config = import_module(f"configs.{name}").get_config
    for variant in (
        "",
        "smoke",
        *(["parity", "small", "small_parity"] if "photos" in name else []),
    ):
        config = get_config(variant)
        task = AutoencoderTask.from_config(config)
        assert (task.adversary is None) == (name == "emoji_kl")
        if variant.endswith("parity"):
            assert task.adversary is not None
            assert (config.updates, task.max_rollbacks, config.loss.restart_codes) == (
                "parity",
                0,
                False,
            )
            assert (
                task.adversary.ramp,
                task.adversary.cap,
                config.adversary.alarm,
                config.guard.rise,
            ) == (0, 0, 0, 0)
        elif task.adversary is not None:
            assert task.max_rollbacks > 0 < task.adversary.cap
            assert config.adversary.start + task.adversary.ramp <= config.steps  # it is reached
    with pytest.raises(ValueError, match="no variant 'smok'"):
        get_config("smok")


# ---------------------------------------------------------------------------------------- codebooks


def test_dead_codes_start_again_on_encodings_of_the_batch():
    rng = np.random.default_rng(0)
    codes, average = rng.standard_normal((2, 6, 3)).astype(np.float32)
    state = TrainState(
        jnp.int32(5),
        {"quantize": {"embedding": codes}},
        {"quantize": {"embedding": average}},
        opt_state=None,
    )
    usage = jnp.array([1.0, 0.0, 0.5, DEAD / 2, 0.0, 2.0])
    # Two encodings for three dead codes.
    candidates = rng.standard_normal((2, 1, 3)).astype(np.float32)
    state, extra, count = restart_codes(state, {"usage": usage}, candidates, jax.random.key(0))
    assert int(count) == 2
    for found, before in ((state.params, codes), (state.ema, average)):
        found = np.asarray(found["quantize"]["embedding"])
        np.testing.assert_array_equal(found[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
        np.testing.assert_array_equal(
            np.sort(found[[1, 3]], axis=0), np.sort(candidates[:, 0], axis=0)
        )
    np.testing.assert_allclose(extra["usage"], [1.0, 1.0, 0.5, 1.0, 0.0, 2.0])


def test_a_code_that_is_never_chosen_dies_and_one_in_equal_use_lives():
    usage = jnp.ones(4)
    for _ in range(500):
        usage = update_usage(usage, jnp.array([0.75, 0.25, 0.0, 0.0]))
    assert list(np.asarray(usage) > DEAD) == [True, True, False, False]
    np.testing.assert_allclose(usage[:2], [3.0, 1.0], rtol=0.02)


@pytest.mark.parametrize(("rows", "count"), [(1, 100), (4, 64), (100, 16)])
def test_a_batch_has_candidates_for_all_codes_where_it_has_as_many_encodings(rows, count):
    assert candidate_count(256, 100, rows) == count
    places = np.asarray(candidate_places(jax.random.key(rows), count, 100))
    assert len(set(places) & set(range(100))) == count


def test_new_codes_start_on_encodings_of_the_first_batch_and_trained_ones_stay():
    module, key = build_first_stage({"first_stage": {**VQ, "quantizer": "vq"}}), jax.random.key(0)
    params = random_params(jax.eval_shape(lambda: init_autoencoder(module, key)), 1)
    tx, task = optax.sgd(0.0), AutoencoderTask(config_of(restart_codes=True), module)
    step = jax.jit(task.make_step(tx, parts=2))
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    batch = {"image": images, "row": np.arange(4, dtype=np.int32)}
    new = jax.device_put(create_state(params, tx, True, task.extra(key)))
    begun, metrics = step(new, {}, batch)
    codes, before = begun.params["quantize"]["embedding"], params["quantize"]["embedding"]
    moved = np.flatnonzero((np.asarray(codes) != before).any(1))
    assert len(moved) == int(metrics["restarted"]) > 3
    _, _, h = module.apply({"params": params}, images / 127.5 - 1, True, method="reconstruct")
    distances = np.abs(np.asarray(h).reshape(-1, 1, h.shape[-1]) - codes[moved]).max(-1)
    assert distances.min(0).max() < 1e-5  # each on an encoding,
    assert len(set(distances.argmin(0))) == len(moved)  # and none twice
    _, metrics = step(begun, {}, batch)
    assert (float(metrics["codebook_use"]), int(metrics["restarted"])) == (1.0, 0)

    kept = with_parameters(new, {"quantize/embedding": before})
    kept, metrics = step(kept, {}, batch)
    assert int(metrics["restarted"]) == 0
    np.testing.assert_array_equal(kept.params["quantize"]["embedding"], before)


# ----------------------------------------------------------------------------------------- the step


def config_of(**loss):
    config = base("autoencoder")
    config.ema = 0.9
    config.loss.update(loss)
    return config


class Setup(SimpleNamespace):
    """A first-stage task: its ``step``, ``state`` and ``batch``."""


def make_setup(fields, *, fused=True, actnorm=False, loss="hinge", **changes) -> Setup:
    rng, key = np.random.default_rng(0), jax.random.key(0)
    module = build_first_stage({"first_stage": fields})
    assert module is not None
    params = random_params(jax.eval_shape(lambda: init_autoencoder(module, key)), 1)
    config = config_of(**changes)
    config.update(updates="fused" if fused else "parity")
    config.guard.rollbacks = 1
    if config.loss.learn_logvar:
        params["logvar"] = np.float32(0.1)
    # SGD: Adam divides by the gradient's magnitude, so that rounding of tiny gradients flips steps.
    tx, disc_tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02)), optax.sgd(0.1)
    adversary = Adversary(
        PatchDiscriminator(ndf=4, n_layers=1, use_actnorm=actnorm), loss=loss, start=1, weight=0.5
    )
    task = AutoencoderTask(config, module, adversary, disc_tx)
    extra = jax.jit(task.extra)(key)
    if "usage" in extra:  # one code is dead after this step, unless it is chosen
        extra["usage"] = jnp.ones_like(extra["usage"]).at[3].set(DEAD / 2)
    step = task.make_step(tx, parts=1)
    images = rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    batch = {"image": images, "row": np.arange(8, dtype=np.int32)}
    return Setup(
        step=step,
        state=create_state(params, tx, True, extra),
        batch=batch,
    )


SETUPS = {
    "vq": lambda: make_setup(VQ, restart_codes=True),
    "kl": lambda: make_setup(
        SMALL_KL,
        fused=False,
        actnorm=True,
        loss="vanilla",
        kind="l2",
        kl_weight=1e-3,
        learn_logvar=True,
    ),
}


@pytest.mark.parametrize("name", SETUPS)
def test_the_second_step_is_the_program_of_the_first(name):
    """A leaf that changes its type (weak types too) would compile the step twice."""
    setup = SETUPS[name]()
    after, _ = jax.eval_shape(setup.step, setup.state, {}, setup.batch)
    kinds = [
        [(leaf.shape, leaf.dtype, jax.typeof(leaf).weak_type) for leaf in jax.tree.leaves(state)]
        for state in (setup.state, after)
    ]
    assert kinds[0] == kinds[1]


def run_steps(setup, devices, mode, n=3):
    mesh = make_mesh(devices)
    step = compile_step(setup.step, mesh, mode, shared=(True, True, False), out_shared=(True, True))
    state, seen = jax.device_put(setup.state, NamedSharding(mesh, PartitionSpec())), []
    for _ in range(n):
        state, metrics = step(state, {}, setup.batch)
        seen.append(jax.device_get(metrics))
    return jax.device_get(state), seen


@pytest.fixture(scope="module")
def on_one_device():
    setups = {name: make() for name, make in SETUPS.items()}
    return {name: (setup, *run_steps(setup, 1, "jit")) for name, setup in setups.items()}


@pytest.mark.parametrize(("name", "mode"), [("vq", "jit"), ("vq", "pmap"), ("kl", "pmap")])
def test_a_loss_does_not_depend_on_the_number_of_devices(on_one_device, name, mode):
    """With all running statistics: batch norm, actnorm, d_weight, code usage, EMA codebook."""
    setup, expected, expected_metrics = on_one_device[name]
    state, metrics = run_steps(setup, 8, mode)
    for found, wanted in zip(metrics, expected_metrics, strict=True):
        assert found.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_allclose(found[key], wanted[key], rtol=2e-4, atol=1e-5, err_msg=key)
    assert worst(state.params, expected.params) < 1e-4
    assert worst(state.ema, expected.ema) < 1e-4
    assert worst(state.extra, expected.extra) < 1e-3


def test_both_networks_learn_and_their_statistics_update(on_one_device):
    for name, moved in {"vq": ("collections", "usage"), "kl": ()}.items():
        setup, state, metrics = on_one_device[name]
        before, after = setup.state.extra, state.extra
        for part in ("params", "batch_stats"):
            assert worst(after["discriminator"][part], before["discriminator"][part]) > 1e-3
        for part in moved:
            assert worst(after[part], before[part]) > 1e-3
        assert worst(state.params, setup.state.params) > 1e-3
        assert float(metrics[0]["disc_loss"]) == 0.0  # adversary.start is 1
        assert float(metrics[0]["adversarial_weight"]) == 0.0 < float(metrics[0]["d_weight"])
        assert float(metrics[1]["disc_loss"]) > 0.0 < float(metrics[1]["adversarial_weight"])
    # Batch norm sees fakes and reals once each per step; updates="parity" sees the fakes twice.
    stats = on_one_device["vq"][1].extra["discriminator"]["batch_stats"]["norm_1"]
    assert int(stats["count"]) == 2 * 3
    assert (
        int(on_one_device["kl"][1].extra["discriminator"]["batch_stats"]["norm_1"]["initialized"])
        == 1
    )
    # The dead code was put on an encoding, in the codebook and its averages alike.
    assert float(on_one_device["vq"][2][0]["restarted"]) == 1.0
    assert float(on_one_device["kl"][1].params["logvar"]) != pytest.approx(0.1)


def test_activation_normalisation_is_fitted_to_what_was_made_first(on_one_device):
    setup, _, _ = on_one_device["kl"]
    disc = setup.state.extra["discriminator"]
    fitted = adversarial.fitted(
        PatchDiscriminator(ndf=4, n_layers=1, use_actnorm=True),
        {"params": disc["params"], "batch_stats": disc["batch_stats"]},
        np.random.default_rng(0).standard_normal((8, 8, 8, 3)).astype(np.float32),
    )
    again = adversarial.fitted(
        PatchDiscriminator(ndf=4, n_layers=1, use_actnorm=True),
        fitted,
        np.zeros((8, 8, 8, 3), np.float32),
    )
    assert worst(fitted["params"], disc["params"]) > 1e-2
    assert worst(again, fitted) == 0.0


def test_the_fused_update_moves_the_autoencoder_as_the_original_does(on_one_device):
    """The generator's update is the same; the discriminator sees other pictures."""
    expected = on_one_device["vq"][2]
    other, metrics = run_steps(make_setup(VQ, fused=False, restart_codes=False), 1, "jit", 1)
    for key in (
        "loss",
        "nll_loss",
        "quant_loss",
        "d_weight",
        "g_loss",
        "grad_norm",
        "perplexity",
        "cluster_usage",
    ):
        np.testing.assert_allclose(metrics[0][key], expected[0][key], rtol=1e-5, err_msg=key)
    stats = other.extra["discriminator"]["batch_stats"]["norm_1"]
    assert int(stats["count"]) == 3


@pytest.mark.parametrize(("quantizer", "codes"), [("vq", "embedding"), ("gumbel", "embed")])
def test_codes_that_are_parameters_are_trained(quantizer, codes):
    """Without an adversary; the codebook's batch in two micro-batches."""
    module, key, tx = (
        build_first_stage({"first_stage": {**VQ, "quantizer": quantizer}}),
        jax.random.key(0),
        optax.sgd(0.1),
    )
    task = AutoencoderTask(config_of(), module)
    params = random_params(jax.eval_shape(lambda: init_autoencoder(module, key)), 1)
    state = create_state(params, tx, True, task.extra(key))
    step = jax.jit(task.make_step(tx, parts=2 if quantizer == "vq" else 1))
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    batch = {"image": images, "row": np.arange(4, dtype=np.int32)}
    after, metrics = step(state, {}, batch)
    assert worst(after.params["quantize"][codes], params["quantize"][codes]) > 1e-6
    assert float(metrics["quant_loss"]) > 0
    assert 1 <= float(metrics["perplexity"]) <= 12
    found = jax.eval_shape(lambda: task.evaluate({"params": after.ema}, {}, batch))
    assert {"loss", "psnr", "quant_loss", "perplexity", "cluster_usage"} <= found.keys()


def test_the_guard_compares_with_no_few_lucky_batches():
    guard = {"recent": jnp.zeros(()), "lowest": jnp.full((), jnp.inf), "rollbacks": jnp.int32(0)}
    losses = [0.2, *(0.5 for _ in range(150)), *(1.5 for _ in range(100))]
    rises = []
    for step, loss in enumerate(losses):
        guard = autoencoder.update_guard(guard, jnp.float32(loss), jnp.int32(step))
        rises.append(float(guard["recent"] / guard["lowest"]))
    assert max(rises[:99]) == 0  # nothing to compare with yet
    assert 0.99 < max(rises[99:151]) < 1.01
    np.testing.assert_allclose(guard["recent"], 0.5 + (1 - 0.99**100), rtol=0.01)
    assert rises[-1] > 2
