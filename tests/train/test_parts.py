"""Parts of training: learning rate, EMA, gradient accumulation, losses, steps."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SMALL, random_params, worst
from ml_collections import ConfigDict

from ldm_jax.configs.common import base
from ldm_jax.distributed.compile import compile_step
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.distributed.shardings import shardings, state_shardings
from ldm_jax.kernels import for_platform
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build, build_first_stage, init_params
from ldm_jax.models.ldm import FirstStage
from ldm_jax.nn.layers import with_kernels
from ldm_jax.train.optim import describe_rate, learning_rate, make_optimizer, with_scaled_rate
from ldm_jax.train.state import apply_gradients, create_state, scan_parts
from ldm_jax.train.tasks import diffusion
from ldm_jax.train.tasks.autoencoder import AutoencoderTask
from ldm_jax.train.tasks.diffusion import DiffusionTask

# ------------------------------------------------------------------------------------ learning rate


def rates(steps=100, **options):
    config = SimpleNamespace(lr=0.8, warmup=0, decay="constant", final=0.1)
    vars(config).update(options)
    return np.array([learning_rate(config, steps)(i) for i in range(steps + 1)])


def test_learning_rate_warms_up_from_the_first_step():
    np.testing.assert_allclose(rates(warmup=4)[:6], [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 20])
@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_learning_rate_decays_to_its_final_value_at_the_last_step(decay, warmup):
    found = rates(decay=decay, warmup=warmup)
    at = np.linspace(0, 1, 101 - warmup)
    expected = 0.8 * (0.1 + 0.9 * ((1 + np.cos(np.pi * at)) / 2 if decay == "cosine" else 1 - at))
    np.testing.assert_allclose(found[warmup:], expected, rtol=1e-5)


def original_cycles(n, shape, lengths, warmup, start, high, low):
    """The original's schedule: warm-up or decay inside the first cycle that has not ended."""
    ends = np.cumsum(lengths)
    i = next((i for i, end in enumerate(ends) if n <= end), None)
    n = n - (ends[i] - lengths[i])
    if n < warmup[i]:
        return (high[i] - start[i]) / warmup[i] * n + start[i]
    if shape == "linear":
        return low[i] + (high[i] - low[i]) * (lengths[i] - n) / lengths[i]
    t = (n - warmup[i]) / (lengths[i] - warmup[i])
    return low[i] + 0.5 * (high[i] - low[i]) * (1 + np.cos(t * np.pi))


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_original_s_cycles(shape):
    cycles = {
        "lengths": (20, 30),
        "warmup": (5, 0),
        "start": (0.1, 0.5),
        "high": (1.0, 0.5),
        "low": (0.2, 0.05),
    }
    found = rates(steps=60, decay=f"cycles_{shape}", cycles=ConfigDict(cycles))
    expected = [0.8 * original_cycles(min(n, 50), shape, **cycles) for n in range(61)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The original's one-cycle schedule (inpainting): warm-up from 1/1000, then decay to a constant.
    one = ConfigDict(
        {"lengths": (40,), "warmup": (10,), "start": (0.001,), "high": (0.1,), "low": (0.0001,)}
    )
    found = rates(steps=60, lr=1.0, decay=f"cycles_{shape}", cycles=one)
    np.testing.assert_allclose(found[[0, 5, 40, 60]], [0.001, 0.0505, 0.0001, 0.0001], rtol=1e-5)
    with pytest.raises(ValueError, match="need one number for each cycle"):
        rates(decay="cycles_cosine", cycles=ConfigDict(cycles | {"warmup": (1,)}))


def test_the_absolute_learning_rate_is_logged():
    config = base("diffusion").optim
    config.lr = 1e-6
    assert with_scaled_rate(config, 48).lr == 1e-6
    assert describe_rate(config, 48) == "learning rate 1e-06"
    config.scale_lr = True
    assert with_scaled_rate(config, 48).lr == pytest.approx(48e-6)
    assert config.lr == 1e-6
    assert describe_rate(config, 48) == "learning rate 4.8e-05 = 1e-06 x 48 pictures in a batch"


def test_gradients_are_clipped_if_configured():
    config = SimpleNamespace(
        kind="adamw",
        mu_dtype="float32",
        lr=1.0,
        warmup=0,
        decay="constant",
        final=0.0,
        b1=0.0,
        b2=0.0,
        weight_decay=0.0,
        clip=1.0,
    )
    params = {"x": jnp.zeros(2)}
    tx = make_optimizer(config, 10)
    _, state = tx.update({"x": jnp.array([30.0, 40.0])}, tx.init(params), params)
    seen = [np.asarray(leaf) for leaf in jax.tree.leaves(state) if np.shape(leaf) == (2,)]
    # Adam's first moment of the clipped gradient.
    np.testing.assert_allclose(seen[0], [0.6, 0.8], rtol=1e-6)


# -------------------------------------------------------------------------------------- the average


def test_average_follows_its_rule():
    """d = min(decay, (1 + n) / (10 + n)) after n updates, by hand over three SGD steps."""
    tx = optax.sgd(1.0)
    state = create_state({"x": jnp.array(0.0)}, tx, ema=True)
    expected, x = 0.0, 0.0
    for n, (gradient, decay) in enumerate([(-1.0, 2 / 11), (-2.0, 0.2), (5.0, 0.2)], start=1):
        x -= gradient
        expected = decay * expected + (1 - decay) * x
        state, metrics = apply_gradients(state, {"x": jnp.array(gradient)}, {}, tx, 0.2)
        assert metrics == {"grad_norm": abs(gradient)}
        assert int(state.step) == n
        np.testing.assert_allclose(state.ema["x"], expected, rtol=1e-6)
        np.testing.assert_allclose(state.params["x"], x, rtol=1e-6)


def test_no_average_is_kept_unless_configured():
    tx = optax.sgd(1.0)
    state = create_state({"x": jnp.array(0.0)}, tx, ema=False)
    state, _ = apply_gradients(state, {"x": jnp.array(1.0)}, {}, tx, 0.5)
    assert state.ema is None


# ----------------------------------------------------------------------------- whole training steps


def config_of(task: str, seed: int = 0, **loss) -> ConfigDict:
    config = base(task)
    config.update(seed=seed, ema=0.9)
    config.loss.update(loss)
    return config


class Setup(SimpleNamespace):
    """A task on the tiny model: its ``step(parts)``, ``state``, ``frozen`` and ``batch``."""


@pytest.fixture(scope="module")
def setups():
    rng, key = np.random.default_rng(0), jax.random.key(0)
    images = rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    rows = np.arange(8, dtype=np.int32)
    # SGD: Adam divides by the gradient's magnitude, so that rounding of tiny gradients flips steps.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02))

    module = build_first_stage(SMALL)
    first_stage = random_params(jax.eval_shape(lambda: init_autoencoder(module, key)), 1)
    of_autoencoder = AutoencoderTask(config_of("autoencoder", kind="l2", kl_weight=1e-3), module)
    autoencoder = Setup(
        step=lambda parts, kernels: with_kernels(of_autoencoder, kernels).make_step(tx, parts),
        state=create_state(first_stage, tx, ema=True),
        frozen={},
        batch={"image": images, "row": rows},
    )

    model = build(SMALL, None, first_stage)
    params = random_params(jax.eval_shape(lambda: init_params(model, key)), 0)
    loss = config_of("diffusion", caption_dropout=0.3, min_snr_gamma=5.0)
    of_diffusion = DiffusionTask(loss, model, {}, None)
    diffusion = Setup(
        model=model,
        step=lambda parts, kernels: with_kernels(of_diffusion, kernels).make_step(tx, parts),
        state=create_state(params, tx, ema=True),
        frozen={"first_stage": model.first_stage, "null": model.conditioner.encode_null(1)},
        batch={
            "image": images,
            "row": rows,
            "encoded": model.conditioner.encode([f"{i}" for i in range(8)]),
        },
    )
    return {"autoencoder": autoencoder, "diffusion": diffusion}


@pytest.fixture(params=["autoencoder", "diffusion"])
def setup(request, setups):
    return setups[request.param]


def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    """On a quadratic loss with a metric, whose mean over rows is exact up to rounding."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.standard_normal((16, 5)).astype(np.float32),
        "y": rng.standard_normal(16).astype(np.float32),
    }

    def loss(params, batch):
        errors = jnp.square(jnp.tanh(batch["x"] @ params["w"]) - batch["y"])
        return errors.mean(), {"loss": errors.mean(), "largest": jnp.abs(batch["y"]).mean()}

    def accumulate(loss, params, batch, parts):
        grad = jax.grad(loss, has_aux=True)
        return scan_parts(lambda _, piece: (None, grad(params, piece)), None, batch, parts)[1]

    params = {"w": rng.standard_normal(5).astype(np.float32)}
    whole, parts = accumulate(loss, params, batch, 1), accumulate(loss, params, batch, 4)
    assert worst(parts, whole) < 1e-6
    # One micro-batch alone differs.
    assert worst(accumulate(loss, params, jax.tree.map(lambda a: a[:8], batch), 1), whole) > 0.01


def run_steps(setup, devices, mode, parts, n, zero1=False, **axes):
    mesh = make_mesh(devices, **axes)
    placed, frozen = state_shardings(setup.state, mesh, zero1), shardings(setup.frozen, mesh)
    if mode == "pmap":
        step = compile_step(
            setup.step(parts, for_platform("cpu")),
            mesh,
            mode,
            shared=(True, True, False),
            out_shared=(True, True),
        )
    else:
        given, out = (placed, frozen, False), (placed, True)
        step = compile_step(
            setup.step(parts, for_platform("cpu", mesh)), mesh, mode, shared=given, out_shared=out
        )
    state, losses = jax.device_put(setup.state, placed), []
    for _ in range(n):
        state, metrics = step(state, setup.frozen, setup.batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def on_one_device(setups):
    return {name: run_steps(setup, 1, "jit", 1, 5) for name, setup in setups.items()}


@pytest.mark.parametrize(
    ("task", "devices", "mode", "parts", "axes"),
    [
        ("autoencoder", 8, "jit", 1, {}),
        ("autoencoder", 8, "pmap", 1, {}),
        ("autoencoder", 1, "jit", 4, {}),
        ("autoencoder", 8, "jit", 1, {"fsdp": 8}),
        ("autoencoder", 8, "jit", 1, {"fsdp": 4, "tensor": 2}),
        ("diffusion", 8, "jit", 1, {}),
        ("diffusion", 8, "pmap", 1, {}),
        ("diffusion", 8, "jit", 1, {"fsdp": 8}),
        ("diffusion", 8, "jit", 1, {"fsdp": 2, "tensor": 2}),
        ("diffusion", 8, "jit", 1, {"zero1": True}),
    ],
)
def test_training_depends_neither_on_devices_nor_on_parts(
    setups, on_one_device, task, devices, mode, parts, axes
):
    expected, expected_losses = on_one_device[task]
    state, losses = run_steps(setups[task], devices, mode, parts, 5, **axes)
    # And something is split, where it is to be.
    shares = [
        leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state.ema)
    ]
    assert (min(shares) < 1) == bool(axes)
    # About 24 float32 roundings.
    np.testing.assert_allclose(losses[0], expected_losses[0], rtol=3e-6)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert losses[0] != losses[-1]
    # The parameters moved, so that the comparison means something.
    assert worst(expected.params, setups[task].state.params) > 1e-3
    assert worst(state.params, expected.params) < 1e-5
    assert worst(state.ema, expected.ema) < 1e-5
    assert int(state.step) == 5


# --------------------------------------------------------------- what diffusion training is made of


def test_caption_dropout_replaces_its_share_of_captions_the_same_at_the_same_step(
    setups, monkeypatch
):
    """Recorded at the conditioner's input."""
    model, frozen = setups["diffusion"].model, setups["diffusion"].frozen
    seen = []

    class Stop(Exception):
        pass

    def arrive(self, params, encoded, **_):
        seen.append(np.asarray(encoded))
        raise Stop

    monkeypatch.setattr(type(model.conditioner), "__call__", arrive)
    b = 400
    batch = {
        "image": np.zeros((b, 4, 4, 3), np.uint8),
        "row": np.arange(b, dtype=np.int32),
        "encoded": np.repeat(model.conditioner.encode(["7"]), b, axis=0),
    }
    tiny = SimpleNamespace(
        with_kernels=lambda kernels: tiny,
        moments=lambda x: x[:, ::2, ::2, :1],
        latents=lambda moments, noise: moments,
        channels=1,
    )
    frozen = frozen | {"first_stage": tiny}

    def dropped(share, step=0, seed=0, train=True):
        config = config_of("diffusion", seed, caption_dropout=share)
        with pytest.raises(Stop):
            DiffusionTask(config, model, {}, None).loss(
                {"conditioner": None}, frozen, batch, jnp.int32(step), train
            )
        null = (seen[-1] == frozen["null"]).all(axis=1)
        assert ((seen[-1] == batch["encoded"]).all(axis=1) | null).all()
        return null

    first = dropped(0.3)
    assert abs(first.mean() - 0.3) < 0.1  # four standard deviations
    assert (dropped(0.3) == first).all()
    assert (dropped(0.3, step=1) != first).any()
    assert (dropped(0.3, seed=1) != first).any()
    assert not dropped(0.0).any()
    assert not dropped(0.3, train=False).any()


def test_a_shift_moves_timesteps_up():
    u = np.linspace(0, 1, 100_000, endpoint=False, dtype=np.float32)
    plain = np.asarray(diffusion.draw_timesteps(u, 1000, 1.0))
    assert (np.bincount(plain, minlength=1000) == 100).mean() > 0.95
    for shift in (1.0, 3.0):
        t = np.asarray(diffusion.draw_timesteps(u, 1000, shift))
        assert (t.min(), t.max()) == (0, 999)
        assert np.median(t) == pytest.approx(1000 * shift / (1 + shift), abs=1.5)


def test_logit_normal_times_have_normal_logits():
    u = (jnp.arange(20_000) + 0.5) / 20_000
    at = diffusion.logit_normal(u, 0.4, 0.7)
    logits = np.log(at / (1 - at))
    np.testing.assert_allclose([logits.mean(), logits.std()], [0.4, 0.7], atol=2e-3)
    assert at.min() > 0
    assert at.max() < 1


def test_errors_of_each_quarter_are_means_over_all_batches():
    t = jnp.array([0, 24, 25, 99, 60, 61])
    errors = jnp.array([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    parts = [diffusion.by_quarter(errors[i : i + 3], t[i : i + 3], 100) for i in (0, 3)]
    means = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    found = diffusion.mean_of_quarters({"loss": 1.0, **means})
    expected = {"loss": 1.0, "loss_simple_q1": 2.0, "loss_simple_q2": 5.0, "loss_simple_q3": 10.0}
    assert found == pytest.approx(expected | {"loss_simple_q4": 7.0})
    empty = diffusion.mean_of_quarters({k: v for k, v in means.items() if "quarter1" in k})
    assert list(empty) == ["loss_simple_q1"]


def test_muon_orthogonalises_matrices_and_convolutions_alone():
    params = {
        "dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)},
        "conv": {"kernel": jnp.ones((3, 3, 2, 4))},
        "embedding": jnp.ones((5, 4)),
    }
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
    config = base("diffusion").optim
    config.update(kind="muon", lr=1.0, weight_decay=0.0)
    tx = make_optimizer(config, 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    for leaf in (updates["dense"]["kernel"], updates["conv"]["kernel"].reshape(18, 4)):
        values = np.linalg.svd(leaf, compute_uv=False)
        assert values.max() < 1.8 * values.min()
    raw = np.linalg.svd(grads["dense"]["kernel"], compute_uv=False)
    assert raw.max() > 1.8 * raw.min()
    adam = optax.nadamw(1.0, config.b1, config.b2, weight_decay=0.0)
    expected, _ = adam.update(grads, adam.init(params), params)
    for name in ("bias", "embedding"):
        leaf, other = (tree["dense"].get(name, tree["embedding"]) for tree in (updates, expected))
        np.testing.assert_allclose(leaf, other, rtol=1e-5)


def test_scale_factor_brings_latents_to_unit_spread(setups):
    model = setups["diffusion"].model
    unscaled = FirstStage(model.first_stage.params, 1.0, model.first_stage.module)
    rng = np.random.default_rng(0)
    batches = [{"image": rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)} for _ in range(3)]
    scale = diffusion.scale_factor(unscaled, batches, 0)
    assert abs(scale - 1) > 0.01
    # Latents scaled by it have a standard deviation of 1, so a second measurement gives 1.
    scaled = FirstStage(unscaled.params, np.float32(scale), unscaled.module)
    np.testing.assert_allclose(diffusion.scale_factor(scaled, batches, 0), 1.0, rtol=1e-4)
