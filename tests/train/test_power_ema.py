"""Averages whose length is chosen after training."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from test_loop import first_stage, make_config, pictures  # noqa: F401

from ldm_jax.cli.convert import main
from ldm_jax.errors import CheckpointError, ConfigError
from ldm_jax.io.checkpoint import load_model
from ldm_jax.train.loop import train
from ldm_jax.train.power_ema import (
    Profile,
    combination,
    exponent_of,
    overlaps,
    power_averages,
    reconstruct,
    with_averages,
)


@pytest.mark.fast
def test_the_exponent_gives_the_standard_deviation_of_the_profile():
    t = (np.arange(200_000) + 0.5) / 200_000
    for std in (0.03, 0.05, 0.1, 0.25):
        weights = t ** exponent_of(std)
        weights /= weights.sum()
        mean = (weights * t).sum()
        assert np.sqrt((weights * (t - mean) ** 2).sum()) == pytest.approx(std, rel=1e-4)
    for std in (0.0, -0.1, 0.3):
        with pytest.raises(ConfigError, match=r"give 0\.01 to 0\.28"):
            exponent_of(std)


@pytest.mark.fast
def test_overlaps_are_the_integrals_of_products():
    a, b = Profile(600, 0.1), Profile(1000, 0.2)
    t = (np.arange(1_000_000) + 0.5) / 1000

    def density(profile):
        g = exponent_of(profile.std)
        inside = t <= profile.step
        return np.where(inside, (g + 1) / profile.step * (t / profile.step) ** g, 0)

    for left, right in ((a, a), (a, b), (b, a), (b, b)):
        integral = (density(left) * density(right)).sum() / 1000
        assert overlaps([left], [right])[0, 0] == pytest.approx(integral, rel=1e-3)


@pytest.mark.fast
def test_snapshots_combine_to_an_average_of_any_length():
    stds, steps, wanted = (0.05, 0.1), 400, (0.03, 0.07, 0.15)
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((steps, 64)).astype(np.float32), axis=0)
    kept, direct = (power_averages(some) for some in (stds, wanted))
    zeros = jax.numpy.zeros(64)
    one, two = jax.jit(kept.update), jax.jit(direct.update)
    state, truth, known, snapshots = kept.init(zeros), direct.init(zeros), [], []
    for step, place in enumerate(walk, 1):
        _, state = one(place, state, zeros)  # the parameters become ``place``
        _, truth = two(place, truth, zeros)
        if step % 20 == 0:
            known += [Profile(step, std) for std in stds]
            snapshots += [np.asarray(average, np.float64) for average in state.averages]
    for std, average in zip(wanted, truth.averages, strict=True):
        weights, error = combination(known, Profile(steps, std))
        made = sum(w * one for w, one in zip(weights, snapshots, strict=True))
        spread = np.linalg.norm(average - walk[-1])
        assert np.linalg.norm(made - average) < 0.03 * spread
        assert error < 0.05
        assert weights.sum() == pytest.approx(1, abs=0.01)
    weights, error = combination(known, known[-1])
    assert weights[-1] == pytest.approx(1, abs=1e-4)
    assert error < 1e-4


@pytest.mark.fast
def test_the_optimiser_itself_is_not_changed():
    params = {"a": np.arange(3.0, dtype=np.float32)}
    plain = optax.adamw(0.1)
    tx = with_averages(plain, ConfigDict({"stds": (0.1,), "every": 1}))
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(
        updates["a"], plain.update(params, plain.init(params), params)[0]["a"]
    )
    # The first average is the parameters after the first update.
    np.testing.assert_array_equal(
        state[-1].averages[0]["a"], optax.apply_updates(params, updates)["a"]
    )
    assert with_averages(plain, ConfigDict({"stds": ()})) is plain


@pytest.mark.compile
def test_a_run_keeps_snapshots_and_average_writes_a_model(
    pictures,  # noqa: F811
    first_stage,  # noqa: F811
    tmp_path,
    capsys,
):
    config = make_config("diffusion", pictures, first_stage)
    config.power_ema.update(stds=(0.1, 0.2), every=2)
    run = tmp_path / "run"
    train(config, run)
    names = sorted(path.name for path in (run / "averages").iterdir())
    assert names == [f"{step:08d}-{std}" for step in (2, 4, 6) for std in (0.1, 0.2)]
    arguments = [str(run), "--std=0.2", f"--out={tmp_path / 'same'}"]
    assert main(["average", *arguments]) == 0
    assert "6 snapshots" in capsys.readouterr().out
    made_config, made = load_model(tmp_path / "same")
    kept_config, kept = load_model(run / "averages" / "00000006-0.2")
    assert made_config == kept_config
    for (path, a), b in zip(jax.tree.leaves_with_path(made), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))
    jax.tree.map(np.testing.assert_array_equal, made["first_stage"], kept["first_stage"])
    reconstruct(run, tmp_path / "short", 0.05, step=4)
    assert load_model(tmp_path / "short")[0]["trained_steps"] == 4
    with pytest.raises(CheckpointError, match="already there"):
        reconstruct(run, tmp_path / "short", 0.05)
    with pytest.raises(CheckpointError, match=r"no averages: train with power_ema\.stds"):
        reconstruct(tmp_path, tmp_path / "new", 0.05)
    with pytest.raises(CheckpointError, match="no averages up to step 1"):
        reconstruct(run, tmp_path / "new", 0.05, step=1)
