"""Pipeline: one seed gives one image, whichever way it is sampled."""

import dataclasses
import logging
import shutil
import weakref

import jax
import numpy as np
import pytest
from conftest import TINY, load_exact

import ldm_jax
from ldm_jax.conditioning.text import BertText
from ldm_jax.errors import CheckpointError, RequestError
from ldm_jax.io.checkpoint import save_model
from ldm_jax.sampling.pipeline import as_dtype, load

pytestmark = pytest.mark.compile

RED, BLUE = "red apple", "blue boat"


@pytest.fixture(scope="module")
def batch_of_8(exact_pipe):
    return exact_pipe([RED] * 8)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to the spread of ``b``."""
    assert a.dtype == np.float32
    return float(np.abs(a - b).max() / b.std())


def test_pictures_are_uint8_of_the_models_own_size(pipe):
    images = pipe(RED)
    assert (images.shape, images.dtype) == ((1, 16, 16, 3), np.uint8)
    assert images.std() > 10


def test_a_picture_depends_on_its_prompt_seed_guidance_and_steps(exact_pipe):
    here = exact_pipe(RED)
    others = {"seeds": 1, "guidance": 1.0, "eta": 1.0, "steps": 5, "sampler": "ddpm"}
    for setting, value in others.items():
        assert difference(exact_pipe(RED, **{setting: value}), here) > 0.01, setting
    assert difference(exact_pipe(BLUE), here) > 0.01
    # The network depends on the timestep.
    model = exact_pipe.model
    x, cond = (
        np.ones((1, 8, 8, 4), np.float32),
        model.conditioner(model.params["conditioner"], model.conditioner.encode([RED])),
    )
    apply = jax.jit(lambda t: model.apply(model.params, x, t, cond))
    assert difference(np.asarray(apply(np.array([90]))), np.asarray(apply(np.array([10])))) > 0.01


def test_the_same_seed_gives_the_same_picture_alone_and_in_a_batch(exact_pipe, batch_of_8):
    assert difference(exact_pipe(RED, seeds=5), batch_of_8[5:6]) < 1e-5


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_the_same_seed_gives_the_same_picture_on_8_devices(tiny_dir, batch_of_8, parallel):
    spread = load_exact(tiny_dir, parallel=parallel)
    assert spread.mesh.devices.size == 8
    assert difference(spread([RED] * 8), batch_of_8) < 1e-5


def test_a_last_partial_batch_makes_its_pictures_and_no_more(exact_pipe):
    batches = list(exact_pipe.stream(RED, seeds=[3, 4, 5], batch=2))
    assert [(batch.places, len(batch.images)) for batch in batches] == [
        (range(2), 2),
        (range(2, 3), 1),
    ]
    assert difference(batches[1].images, exact_pipe(RED, seeds=5)) < 1e-5


def test_every_picture_has_its_own_guidance(exact_pipe):
    both = exact_pipe(RED, seeds=[3, 3], guidance=[1.0, 3.0])
    assert difference(both[1:], exact_pipe(RED, seeds=3, guidance=3.0)) < 1e-5
    assert difference(both[:1], both[1:]) > 0.01


@pytest.mark.parametrize(
    ("prompts", "seeds", "pairs"),
    [
        (RED, None, [(RED, 0)]),
        ([RED, BLUE], None, [(RED, 0), (BLUE, 1)]),
        ([RED, BLUE], 7, [(RED, 7), (BLUE, 7)]),
        (RED, [7, 9], [(RED, 7), (RED, 9)]),
        ([RED, BLUE], [7, 9], [(RED, 7), (BLUE, 9)]),
        (RED, np.int64(7), [(RED, 7)]),
        (RED, np.array([7, 9]), [(RED, 7), (RED, 9)]),
    ],
)
def test_prompts_and_seeds_pair_up(prompts, seeds, pairs):
    from ldm_jax.sampling.inputs import pair

    found = pair([prompts] if isinstance(prompts, str) else prompts, seeds)
    assert list(zip(*found, strict=True)) == pairs


def test_temperature_is_of_the_noise_that_is_added(pipe):
    for sampler, noise in (("ddim", "noise"), ("ddpm", "noise")):
        eta = 1.0 if sampler == "ddim" else 0.0
        warm, cold = (
            pipe.steps(pipe.settings(sampler=sampler, eta=eta, temperature=t)).nodes._asdict()
            for t in (1.0, 0.25)
        )
        np.testing.assert_allclose(cold.pop(noise), 0.25 * warm.pop(noise), rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, cold, warm)


def test_another_sampler_than_the_models_own_has_its_own_noise(pipe, monkeypatch):
    monkeypatch.setattr(
        pipe, "defaults", dataclasses.replace(pipe.defaults, eta=1.0, temperature=0.5)
    )
    assert pipe.settings(steps=3) == dataclasses.replace(pipe.defaults, steps=3)
    assert pipe.settings(sampler="ddim").temperature == 0.5
    other = pipe.settings(sampler="plms")
    assert (other.eta, other.temperature) == (0.0, 1.0)
    assert pipe.settings(sampler="ddpm", temperature=0.7).temperature == 0.7
    assert pipe.settings(eta=0.0).temperature == 1.0
    assert pipe.settings(eta=0.5).temperature == 0.5


def test_only_another_shape_of_the_computation_compiles(pipe, compilations):
    pipe(RED)
    before = len(compilations)
    pipe(BLUE, seeds=9, guidance=2.0, eta=0.7, temperature=0.5)
    pipe("a much longer prompt of several words", guidance=1.0)
    pipe(RED, grid="trailing")
    assert len(compilations) == before
    pipe(RED, steps=3)
    assert len(compilations) > before


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompts": []}, "conditioned on prompts: give at least one"),
        ({"seeds": []}, "1 prompts and 0 seeds do not pair up"),
        ({"seeds": [-1]}, "seeds must be from 0 to 18446744073709551615"),
        ({"seeds": [2**64]}, "seeds must be from 0 to 18446744073709551615"),
        ({"prompts": [RED, BLUE], "seeds": [1, 2, 3]}, "2 prompts and 3 seeds do not pair up"),
        ({"steps": 0}, "steps must be from 1 to 100, not 0"),
        ({"steps": 101}, "steps must be from 1 to 100, not 101"),
        ({"size": (16, 18)}, "size 16x18: height and width must be multiples of 4"),
        ({"size": (0, 16)}, "size 0x16: height and width must be multiples of 4"),
        ({"size": (16,)}, "size must be (height, width), not (16,)"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"guidance": [1.0, 2.0]}, "2 guidance scales for 1 pictures"),
        ({"guidance": float("nan")}, "guidance must be finite numbers, not nan"),
        ({"eta": -0.1}, "eta must be a number of at least 0, not -0.1"),
        ({"eta": float("inf")}, "eta must be a finite number, not inf"),
        ({"sampler": "dimm"}, "sampler 'dimm' does not exist; did you mean 'ddim'?"),
        ({"sampler": "ddpm", "eta": 0.5}, "the ddpm sampler has no eta"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, not -1.0"),
        (
            {"temperature": 0.5},
            "temperature scales the noise that ddim adds, which is none without eta",
        ),
        (
            {"sampler": "plms", "temperature": 0.5},
            "the plms sampler has no temperature; take ddim with eta, or ddpm",
        ),
        ({"grid": "linear"}, "step grid 'linear' does not exist"),
    ],
)
def test_a_request_that_cannot_be_fulfilled_is_refused_at_once_in_one_line(pipe, request_, message):
    request_ = {"prompts": RED, **request_}
    with pytest.raises(RequestError) as caught:
        pipe.stream(request_.pop("prompts"), **request_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "emojy"}, "model 'emojy' is neither a path nor a model that ships with ldm_jax"),
        ({"dtype": "float23"}, "dtype 'float23' does not exist; did you mean 'float32'?"),
        ({"devices": 9}, "devices must be from 1 to 8, not 9"),
        ({"parallel": "pamp"}, "parallel 'pamp' does not exist"),
    ],
)
def test_a_model_that_cannot_be_loaded_so_is_refused_in_one_line(tiny_dir, arguments, message):
    with pytest.raises((RequestError, CheckpointError)) as caught:
        ldm_jax.load(arguments.pop("name", tiny_dir), **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_first_stage_alone_is_no_model_for_pictures(tmp_path):
    save_model(
        tmp_path / "kl",
        {"kind": "first_stage", "first_stage": TINY["first_stage"]},
        {"x": np.zeros(1)},
    )
    with pytest.raises(RequestError, match="is a first_stage, which makes no pictures by itself"):
        load(tmp_path / "kl")


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (
            "unet",
            "model_chanels",
            32,
            r"unet: field 'model_chanels' does not exist; did you mean 'model_channels'\?",
        ),
        ("unet", "channel_mult", [1, 1], "do not fit"),
        ("unet", "num_res_blocks", 2, "do not fit"),
        ("first_stage", "ch_mult", [1, 2], "do not fit"),
        (
            "conditioner",
            "kind",
            "bart",
            r"conditioner: kind 'bart' does not exist; did you mean 'bert'\?",
        ),
        (
            "schedule",
            "beta_schedule",
            "linaer",
            r"'linaer' does not exist; did you mean 'linear'\?",
        ),
        (
            "sampling",
            "stpes",
            3,
            r"sampling: setting 'stpes' does not exist; did you mean 'steps'\?",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_parameters_is_a_one_line_error(
    tiny_dir, monkeypatch, section, field, value, message
):
    from ldm_jax.sampling import pipeline

    config, params = pipeline.load_model(tiny_dir)
    changed = {**config, section: {**config[section], field: value}}
    monkeypatch.setattr(pipeline, "load_model", lambda path: (changed, params))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tiny_dir)
    assert "\n" not in str(caught.value)


def test_a_damaged_list_of_arrays_is_named(tiny_dir, tmp_path):
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    (model / "params/_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"params cannot be read \(damaged or incomplete"):
        load(model)
    (model / "params/_sharding").write_text("{")
    with pytest.raises(CheckpointError, match=r"params cannot be read") as caught:
        load(model)
    assert "attribute" not in str(caught.value)


@pytest.mark.fast
def test_loading_holds_no_second_copy_of_the_weights():
    params = {"a": {f"{i}": np.full((99, 7), i, np.float16) for i in range(4)}, "b": np.ones(5)}
    given = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    params = as_dtype(params, "float32")
    assert not any(array() is not None for array in given)
    placed = jax.device_put(params)
    for leaf, host in zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True):
        assert host.dtype == leaf.dtype == np.float32
        assert leaf.unsafe_buffer_pointer() == host.ctypes.data
    assert [float(placed["a"][f"{i}"].mean()) for i in range(4)] == [0, 1, 2, 3]
    assert as_dtype({"b": params["b"]}, "float32")["b"] is params["b"]


def test_bfloat16_gives_a_similar_picture(tiny_dir, exact_pipe):
    half = load_exact(tiny_dir, devices=1, dtype="bfloat16")
    here, there = exact_pipe(RED), half(RED).astype(np.float32)
    assert 1e-4 < np.abs(there - here).mean() / here.std() < 0.1


def test_a_prompt_becomes_the_words_of_bert():
    tokens = BertText.from_config(dim=16, depth=1, max_seq_len=6).encode([RED, ""])
    assert tokens.tolist() == [[101, 2417, 6207, 102, 0, 0], [101, 102, 0, 0, 0, 0]]
    assert tokens.dtype == np.int32


def test_a_prompt_too_long_is_cut_with_a_warning_that_shows_the_rest(caplog):
    with caplog.at_level(logging.WARNING, logger="ldm_jax"):
        tokens = BertText.from_config(dim=16, depth=1, max_seq_len=4).encode(
            ["red apple on a table"]
        )
    assert tokens.tolist() == [[101, 2417, 6207, 102]]
    assert [record.getMessage() for record in caplog.records] == [
        "prompt of 5 tokens: the last 3 are cut: 'on a table'"
    ]
