"""Sampling beyond a prompt: initial images, masks, classes, maps, layouts, interpolation."""

import dataclasses
import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import KL, SMALL, TINY, pipeline_of
from PIL import Image

from ldm_jax.conditioning.class_label import class_numbers
from ldm_jax.conditioning.layout import request_tokens
from ldm_jax.conditioning.masked import masked_condition
from ldm_jax.diffusion.guidance import classifier_free, predictor, unguided
from ldm_jax.diffusion.samplers import SAMPLERS, initial_noise, sample, step_grid
from ldm_jax.diffusion.schedule import q_sample
from ldm_jax.errors import ConfigError, RequestError
from ldm_jax.models.build import build_conditioner
from ldm_jax.models.ldm import to_float, to_uint8
from ldm_jax.sampling.decoding import decode, decode_part, decode_tiled, tile_ramp, tile_starts
from ldm_jax.sampling.inputs import make_inputs
from ldm_jax.sampling.program import SamplingConfig, slerp, whole_cells
from ldm_jax.sampling.request import Request, interpolation

pytestmark = pytest.mark.compile

RED, BLUE = "red apple", "blue boat"
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (16, 16, 3), np.uint8)
HALF = np.zeros((16, 16), np.uint8)
HALF[:, 8:] = 255  # samples the right half


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether pictures are equal up to rounding to 8 bits."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def off(a: np.ndarray, b: np.ndarray) -> float:
    """The mean absolute difference, in levels of 255."""
    return float(np.abs(np.asarray(a, int) - np.asarray(b, int)).mean())


# ----------------------------------------------------------------------------------- image to image


def test_image_to_image_is_the_originals_and_strength_compiles_nothing(pipe, compilations):
    """Noise to step t_enc, then DDIM below it, as in scripts/img2img.py; by hand and Pipeline."""
    request = {"image": PICTURE, "seeds": [5, 6], "guidance": 3.0}
    half = pipe(RED, **request, strength=0.5)
    before = len(compilations)
    whole = pipe(RED, **request, strength=1.0)
    pipe(BLUE, image=PICTURE[::-1].copy(), seeds=[6, 7], strength=0.25, guidance=2.0)
    # One image per prompt.
    other = pipe(RED, image=[PICTURE, PICTURE[::-1]], seeds=[5, 5], guidance=3.0, strength=0.5)
    assert len(compilations) == before
    assert off(whole, half) > 3
    assert near(other[0], half[0])
    assert off(other[1], half[0]) > 3

    model, conditioner = pipe.model, pipe.model.conditioner
    grid, keys = step_grid("uniform", 4, 100), jax.vmap(jax.random.key)(np.array([5, 6], np.uint32))
    x0 = to_float(jnp.asarray(PICTURE[None]))

    @jax.jit
    def by_hand(model, nodes, level):
        z0 = jnp.repeat(model.first_stage.encode(x0), 2, 0)
        x = q_sample(model.schedule, z0, level, initial_noise(keys, z0.shape[1:]))
        cond, null = (
            conditioner(model.params["conditioner"], conditioner.encode([text] * 2))
            for text in (RED, "")
        )
        denoise = classifier_free(
            lambda x, t, c: model.apply(model.params, x, t, c), cond, null, 3.0
        )
        z, _ = sample(
            SAMPLERS["ddim"], predictor(denoise, model.schedule, "eps"), x, nodes, keys=keys
        )
        return to_uint8(model.first_stage.decode(z))

    assert near(half, by_hand(model, SAMPLERS["ddim"].nodes(model.schedule, grid[:2]), grid[2]))


@pytest.mark.parametrize(
    ("sampler", "strength", "level"),
    [("ddim", 0.5, 50), ("ddim", 1.0, 99), ("dpmpp_2m", 0.5, 26), ("ddpm", 0.1, 1)],
)
def test_the_noise_of_a_picture_is_that_of_its_first_step(pipe, sampler, strength, level):
    """The original's grid is one higher: 1, 26, 51, 76; strength 0.1 of 4 steps makes one."""
    plan = pipe.steps(pipe.complete(Request(sampler=sampler, image=PICTURE, strength=strength)))
    assert plan.level == (51 if level == 50 else level)
    assert plan.nodes.t.shape == (4,)
    assert plan.start == 4 - max(int(4 * strength), 1)


# -------------------------------------------------------------------------- inpainting, outpainting


def test_only_the_white_of_a_mask_is_sampled(pipe, compilations):
    images = pipe(RED, image=PICTURE, mask=HALF, seeds=[0, 1])
    assert (images[:, :, :8] == PICTURE[:, :8]).all()
    assert np.abs(images[0, :, 8:].astype(int) - images[1, :, 8:]).mean() > 3
    before = len(compilations)
    other = pipe(BLUE, image=PICTURE[::-1].copy(), mask=HALF.T, seeds=[2, 3])
    assert len(compilations) == before
    assert (other[:, :8] == PICTURE[::-1][:8]).all()


def test_the_new_part_depends_on_the_old_one(pipe):
    one, other = pipe(RED, image=[PICTURE, PICTURE[::-1]], mask=HALF, seeds=[0, 0])
    assert off(one[:, 8:], other[:, 8:]) > 1


def test_outpainting_grows_the_picture_to_a_multiple(pipe, caplog):
    with caplog.at_level(logging.INFO, logger="ldm_jax"):
        images = pipe(RED, image=PICTURE, outpaint=(4, 0, 2, 0), seeds=[0], steps=1)
    assert images.shape == (1, 24, 16, 3)
    assert (images[0, 4:20] == PICTURE).all()
    assert "grows by 4, 0, 4, 0 (top, right, bottom, left) to 24x16" in caplog.text


def test_masks_of_pixels_become_masks_of_latents():
    mask = np.zeros((1, 4, 4, 1), np.uint8)
    mask[0, 1, 2] = 1
    assert whole_cells(jnp.asarray(mask), 2)[0, :, :, 0].tolist() == [[0, 1], [0, 0]]


# ------------------------------------------------------------------------ variations, interpolation


def test_a_variation_goes_from_the_picture_to_the_seeds_own(pipe):
    request = {"seeds": [4, 4], "guidance": 1.0, "steps": 50}
    here, far = pipe(RED, image=PICTURE, variation=[0.0, 1.0], **request)
    plain = pipe(RED, **request)[0]
    stage = pipe.model.first_stage
    whole = jax.jit(lambda s, x: to_uint8(s.decode(s.encode(x))))(
        stage, to_float(jnp.asarray(PICTURE[None]))
    )[0]
    assert near(far, plain)
    assert off(here, whole) < 0.2 * off(plain, whole)


def test_interpolation_begins_and_ends_at_its_two_requests(pipe, compilations):
    first, last = pipe(RED, seeds=[1, 1], toward=([BLUE] * 2, [2] * 2, [0.0, 1.0]))
    before = len(compilations)
    middle, _ = pipe(RED, seeds=[1, 1], toward=([BLUE] * 2, [2] * 2, [0.5, 0.6]))
    assert len(compilations) == before
    ends = pipe([RED, BLUE], seeds=[1, 2])
    assert near(first, ends[0])
    assert near(last, ends[1])
    assert min(off(middle, first), off(middle, last)) > 3


def test_frames_of_an_interpolation():
    subjects, seeds, (ends, other_seeds, mixes) = interpolation([RED, BLUE, RED], [1, 2, 3], 2)
    assert ends == [BLUE, BLUE, RED, RED, RED]
    assert list(zip(subjects, seeds, other_seeds, mixes, strict=True)) == [
        (RED, 1, 2, 0.0),
        (RED, 1, 2, 0.5),
        (BLUE, 2, 3, 0.0),
        (BLUE, 2, 3, 0.5),
        (RED, 3, 3, 0.0),
    ]
    with pytest.raises(RequestError, match="at least two ends"):
        interpolation([RED], [1], 2)


def test_slerp_keeps_the_length_of_noise():
    a, b = np.random.default_rng(1).standard_normal((2, 1, 400)).astype(np.float32)
    length = np.linalg.norm(slerp(a, b, jnp.array([0.5])))
    assert abs(length / 20 - 1) < 0.1  # halfway along the straight line it would be 0.7
    np.testing.assert_allclose(slerp(a, 2 * a, jnp.array([0.5])), 1.5 * a, rtol=1e-5)
    np.testing.assert_allclose(slerp(a, b, jnp.array([1.0])), b, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- guidance, progress


def test_negative_prompts_rescaling_and_intervals_are_settings(pipe, compilations):
    plain = pipe([RED, RED], seeds=1)
    before = len(compilations)
    negative = pipe([RED, RED], seeds=1, negative=[BLUE, ""])
    assert len(compilations) == before
    assert off(negative[0], plain[0]) > 1
    assert (negative[1] == plain[1]).all()

    request = {"seeds": 1, "guidance_rescale": 0.7}
    rescaled = pipe([RED, RED], **request, guidance_interval=(0.0, 99.0))
    before = len(compilations)
    # The interval lies outside the schedule.
    without = pipe([RED, RED], **request, guidance_interval=(200.0, 300.0))
    assert len(compilations) == before
    assert off(rescaled, plain) > 0.3
    assert near(without, pipe([RED, RED], seeds=1, guidance=1.0))


def test_progress_shows_the_predicted_x0(pipe):
    request = {"image": PICTURE, "strength": 0.5}
    (batch,) = pipe.stream([RED, BLUE], progress_every=1, **request)
    assert batch.progress.shape == (2, 2, 16, 16, 3)  # of the four steps, two are made
    assert (batch.images == pipe([RED, BLUE], **request)).all()
    assert off(batch.progress[:, 0], batch.progress[:, 1]) > 1


# ----------------------------------------------------------------------------------------- decoding


def test_decoding_in_parts_changes_nothing_and_in_tiles_little(pipe):
    z = jnp.asarray(RNG.standard_normal((4, 16, 16, 4)), jnp.float32)

    @partial(jax.jit, static_argnums=(1, 2))
    def run(stage, batch, tile):
        return decode(stage, z, batch, tile)

    whole, parts, tiled = (
        np.asarray(run(pipe.model.first_stage, d, tile)) for d, tile in ((0, 32), (2, 0), (0, 16))
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    assert 1e-4 < np.abs(tiled - whole).mean() / whole.std() < 0.5
    assert pipe.config(pipe.settings(decode_batch=5), (32, 32), 8) == SamplingConfig(
        (32, 32), decode_batch=4
    )


@pytest.mark.parametrize(
    ("platform", "size", "local", "wanted", "part"),
    [
        ("tpu", (512, 512), 8, None, 1),
        ("gpu", (768, 768), 8, None, 1),
        ("tpu", (256, 256), 8, None, 4),
        ("tpu", (256, 256), 6, None, 3),  # a divisor
        ("tpu", (64, 64), 8, None, 0),
        ("tpu", (512, 512), 1, None, 0),
        ("cpu", (512, 512), 8, None, 1),
        ("cpu", (64, 64), 8, None, 4),
        ("tpu", (512, 512), 8, 0, 0),
        ("cpu", (512, 512), 8, 3, 2),
    ],
)
def test_how_many_pictures_are_decoded_at_a_time(platform, size, local, wanted, part):
    assert decode_part(platform, size, local, wanted) == part


def test_decoding_one_by_one_needs_the_memory_of_one_picture(pipe):
    def temporary(n, batch):
        z = jax.ShapeDtypeStruct((n, 16, 16, 4), jnp.float32)
        run = jax.jit(partial(decode, batch=batch))
        return run.lower(pipe.model.first_stage, z).compile().memory_analysis().temp_size_in_bytes

    one, pixels = temporary(1, 0), 4 * 3 * 32 * 32
    assert temporary(8, 1) < one + 3 * 8 * pixels
    assert temporary(8, 0) > 3 * one


@pytest.mark.parametrize(("length", "tile"), [(16, 8), (17, 8), (8, 8), (23, 9)])
def test_tiles_cover_and_their_blend_is_exact_for_a_decoder_that_looks_no_further(length, tile):
    starts = tile_starts(length, tile, tile // 4)
    covered = np.zeros(length, int)
    for start in starts:
        covered[start : start + tile] += 1
    assert covered.min() >= 1
    assert starts[-1] + tile == length
    assert (tile_ramp(tile, tile // 4) > 0).all()
    z = jnp.asarray(RNG.standard_normal((2, length, tile, 3)), jnp.float32)

    def decode(z):
        return jnp.repeat(jnp.repeat(z, 2, 1), 2, 2)

    np.testing.assert_allclose(
        decode_tiled(decode, z, factor=2, tile=tile), decode(z), rtol=1e-5, atol=1e-6
    )


# ------------------------------------------------------------------------------------- other models


CLASSES = {
    **TINY,
    "conditioner": {"kind": "class", "embed_dim": 16, "n_classes": 4},
    "classes": ["tench, Tinca tinca", "goldfish", "great white shark"],
}


def test_classes_by_number_and_by_name():
    pipe = pipeline_of(CLASSES)
    images = pipe(classes=[1, "goldfish", "Tinca Tinca"], seeds=[0, 0, 0], steps=2)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()
    for request, message in [
        ({"classes": ["goldfsh"]}, "class 'goldfsh' does not exist; did you mean 'goldfish'"),
        ({"classes": [4]}, "class 4 does not exist: give a number from 0 to 3"),
        ({"prompts": "goldfish"}, "this model is conditioned on classes, not prompts"),
        ({}, "this model is conditioned on classes: give at least one"),
        ({"classes": [1], "negative": "x"}, "negative prompts need a model of text"),
    ]:
        with pytest.raises(RequestError, match=message):
            pipe.stream(**request)


def test_classes_without_names_are_numbers():
    assert class_numbers(["2", 0, np.int64(1)], 3) == [2, 0, 1]
    with pytest.raises(RequestError, match="no names for its classes"):
        class_numbers(["cat"], 3)


def test_an_unconditional_model_needs_no_prompt():
    pipe = pipeline_of(
        {
            **SMALL,
            "conditioner": {"kind": "none"},
            "unet": {**SMALL["unet"], "use_spatial_transformer": False},
        }
    )
    images = pipe(seeds=[0, 1], steps=2)
    assert images.shape == (2, 16, 16, 3)
    assert (images[0] != images[1]).any()
    with pytest.raises(RequestError, match="takes no condition, not prompts"):
        pipe(RED)
    with pytest.raises(RequestError, match="leave guidance at 1"):
        pipe(seeds=1, guidance=2.0)


PLAIN = {**SMALL["unet"], "use_spatial_transformer": False, "context_dim": None}


def test_a_model_that_inpaints_by_concatenation():
    conditioner = {"kind": "joined", "channels": 5, "of": "masked"}
    pipe = pipeline_of(
        {
            **SMALL,
            "first_stage": KL,
            "conditioner": conditioner,
            "unet": {**PLAIN, "in_channels": 9},
        }
    )
    images = pipe(image=PICTURE, mask=HALF, seeds=[0, 1], steps=2)
    assert (images[:, :, :8] == PICTURE[:, :8]).all()
    assert (images[0, :, 8:] != images[1, :, 8:]).any()
    other = pipe(image=PICTURE[::-1].copy(), mask=HALF, seeds=[0, 1], steps=2)
    assert (other[:, ::-1][:, :, 8:] != images[:, :, 8:]).any()

    stage, hole = pipe.model.first_stage, (HALF > 0)[None, :, :, None]
    condition = np.asarray(masked_condition(stage, to_float(PICTURE[None]), jnp.asarray(hole)))
    black = np.where(hole, 0, PICTURE[None])
    np.testing.assert_allclose(
        condition[..., :4], stage.encode(to_float(black)) / 0.5, rtol=1e-4, atol=1e-5
    )
    assert (condition[0, :, :, 4] == np.where(np.arange(8) < 4, -1, 1)).all()
    for request, message in [
        ({"image": PICTURE}, "give an image, and a mask or outpaint"),
        ({}, "give an image, and a mask or outpaint"),
        (
            {"image": PICTURE, "mask": HALF, "strength": 0.5},
            "strength: this model does not start from an image",
        ),
    ]:
        with pytest.raises(RequestError, match=message):
            pipe.stream(**request)


def test_a_model_that_inpaints_by_a_prompt(compilations):
    joined = {"channels": 5, "of": "masked_sd", "size": [8, 8]}
    conditioner = {"kind": "hybrid", "text": TINY["conditioner"], "joined": joined}
    pipe = pipeline_of(
        {
            **SMALL,
            "first_stage": KL,
            "conditioner": conditioner,
            "unet": {**SMALL["unet"], "in_channels": 9},
        }
    )
    request = {"image": PICTURE, "mask": HALF, "seeds": [0, 0], "steps": 2, "guidance": 3.0}
    images = pipe([RED, BLUE], **request)
    assert (images[:, :, :8] == PICTURE[:, :8]).all()
    assert off(*images[:, :, 8:]) > 0.5
    before = len(compilations)
    away = pipe([RED, RED], **request, negative=[BLUE, RED])
    other = pipe([RED, BLUE], **request | {"image": PICTURE[::-1].copy()})
    assert len(compilations) == before
    assert off(away[0, :, 8:], images[0, :, 8:]) > 0.5
    assert off(other[:, ::-1, 8:], images[:, :, 8:]) > 0.5

    # By hand: image and mask are the same on both sides of the guidance, which thus acts on the
    # prompt alone.
    model, keys = pipe.model, jax.vmap(jax.random.key)(np.zeros(1, np.uint32))
    nodes = SAMPLERS["ddim"].nodes(model.schedule, step_grid("uniform", 2, 10))

    @jax.jit
    def by_hand(model, nodes, encoded):
        concat = masked_condition(
            model.first_stage, to_float(PICTURE[None]), HALF[None, :, :, None] > 0, "masked_sd"
        )
        cond = model.conditioner(model.params["conditioner"], {"text": encoded, "joined": concat})
        denoise = unguided(lambda x, t, c: model.apply(model.params, x, t, c), cond)
        x = initial_noise(keys, (8, 8, 4))
        z, _ = sample(
            SAMPLERS["ddim"], predictor(denoise, model.schedule, "eps"), x, nodes, keys=keys
        )
        return to_uint8(model.first_stage.decode(z))

    assert near(
        away[1, :, 8:], by_hand(model, nodes, model.conditioner.text.encode([RED]))[0, :, 8:]
    )
    for wrong, message in [
        ({}, "give an image, and a mask or outpaint"),
        ({"image": PICTURE}, "give an image, and a mask or outpaint"),
        ({"mask": HALF}, "give an image, and a mask or outpaint"),
        (
            {"image": PICTURE, "mask": HALF, "strength": 0.5},
            "strength: this model does not start from an image",
        ),
    ]:
        with pytest.raises(RequestError, match=message):
            pipe.stream(RED, **wrong)
    with pytest.raises(RequestError, match="conditioned on prompts: give at least one"):
        pipe.stream(image=PICTURE, mask=HALF)


def test_the_inpainting_condition_of_stable_diffusion(pipe):
    stage, hole = pipe.model.first_stage, (HALF > 0)[None, :, :, None]
    condition = np.asarray(
        masked_condition(stage, to_float(PICTURE[None]), jnp.asarray(hole), "masked_sd")
    )
    assert (condition[0, :, :, 0] == np.where(np.arange(8) < 4, 0, 1)).all()
    grey = np.where(hole, 0.0, to_float(PICTURE[None]))
    np.testing.assert_allclose(condition[..., 1:], stage.encode(grey), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("conditioner", "message"),
    [
        (
            {"text": {"kind": "class"}, "joined": {"channels": 5}},
            "text.kind 'class' is neither 'bert' nor 'clip'",
        ),
        (
            {"text": SMALL["conditioner"], "joined": {"channels": 5, "of": "mask"}},
            "of 'mask' is neither 'picture'",
        ),
        ({"text": SMALL["conditioner"]}, "field 'joined' is missing"),
    ],
)
def test_an_invalid_hybrid_condition_is_an_error(conditioner, message):
    with pytest.raises(ConfigError, match=message):
        build_conditioner({"conditioner": {"kind": "hybrid", **conditioner}})


def test_a_model_that_enlarges_pictures(caplog):
    unet = {**PLAIN, "in_channels": 7, "channel_mult": [1, 1]}
    pipe = pipeline_of(
        {**SMALL, "first_stage": KL, "conditioner": {"kind": "joined", "channels": 3}, "unet": unet}
    )
    with caplog.at_level(logging.INFO, logger="ldm_jax"):
        images = pipe(image=PICTURE[:7, :5], seeds=[0], steps=2)
    assert images.shape == (1, 14, 10, 3)
    assert "padded to 8x6" in caplog.text
    assert (images != pipe(image=PICTURE[8:15, :5], seeds=[0], steps=2)).any()
    with pytest.raises(RequestError, match="it takes no mask"):
        pipe.stream(image=PICTURE, mask=HALF)


def test_a_model_of_semantic_maps(tmp_path):
    conditioner = {
        "kind": "rescale",
        "n_stages": 1,
        "in_channels": 5,
        "out_channels": 2,
        "size": [16, 16],
    }
    pipe = pipeline_of(
        {
            **SMALL,
            "first_stage": KL,
            "conditioner": conditioner,
            "unet": {**PLAIN, "in_channels": 6},
        }
    )
    labels = Image.fromarray(RNG.integers(0, 5, (12, 20), np.uint8))
    labels.save(tmp_path / "labels.png")
    images = pipe(semantic_map=str(tmp_path / "labels.png"), seeds=[0], steps=2)
    assert images.shape == (1, 16, 16, 3)
    assert (images != pipe(semantic_map=np.zeros((16, 16), np.uint8), seeds=[0], steps=2)).any()
    with pytest.raises(RequestError, match="has the label 7: this model knows 0 to 4"):
        pipe.stream(semantic_map=np.full((4, 4), 7))
    with pytest.raises(RequestError, match="one channel"):
        pipe.stream(semantic_map=PICTURE)


def test_layouts_become_the_originals_tokens():
    """16 tokens of a corner, in rows of 4 as in the original: (2/3, 1/3) is 6, the last is 15."""
    tokens = request_tokens(
        [("cup", (2 / 3, 1 / 3, 1 / 3, 2 / 3))], length=8, vocabulary=16, names=["table", "cup"]
    )
    assert tokens == [1, 6, 15, 15, 15, 15, 0, 15]
    with pytest.raises(RequestError, match="at most 2"):
        request_tokens([(0, (0, 0, 1, 1))] * 3, length=8, vocabulary=16)
    with pytest.raises(RequestError, match="inside the picture"):
        request_tokens([(0, (0.5, 0, 0.6, 1))], length=8, vocabulary=16)


def test_a_model_of_layouts():
    conditioner = {**TINY["conditioner"], "kind": "tokens", "vocab_size": 30, "max_seq_len": 8}
    pipe = pipeline_of({**TINY, "conditioner": conditioner})
    images = [pipe(layout=[(3, (0, 0, 0.5, y))], seeds=[0], steps=2) for y in (0.5, 1.0)]
    assert (images[0] != images[1]).any()
    with pytest.raises(RequestError, match="conditioned on layout, not prompts"):
        pipe(RED)
    # Guided as configured, by default not at all.
    assert pipe.defaults.guidance == TINY["sampling"]["guidance"] == 3.0
    settings = {name: value for name, value in TINY["sampling"].items() if name != "guidance"}
    assert (
        pipeline_of({**TINY, "conditioner": conditioner, "sampling": settings}).defaults.guidance
        == 1.0
    )


def test_a_model_of_ready_made_embeddings(tmp_path):
    pipe = pipeline_of({**TINY, "conditioner": {"kind": "embeddings", "dim": 16}})
    vectors = RNG.standard_normal((2, 3, 16)).astype(np.float32)
    np.save(tmp_path / "one.npy", vectors[1])
    images = pipe(embeddings=[vectors[0], tmp_path / "one.npy"], seeds=[0, 0], steps=2)
    again = pipe(embeddings=str(tmp_path / "one.npy"), seeds=[1, 0], steps=2)
    assert (again[1] == images[1]).all()
    assert off(images[0], images[1]) > 1
    assert pipe.defaults.guidance == 3.0  # away from as many zeros
    for given, m in ((vectors[0, 0], 1), (vectors[0, :2], 2)):
        request = Request(embeddings=given, seeds=0)
        _, rows = make_inputs(pipe.model, request, pipe.complete(request))
        assert rows.encoded.shape == rows.null.shape == (1, m, 16)
        assert not rows.null.any()

    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "many.npz", vectors[0])
    for given, message in [
        ({}, "this model is conditioned on embeddings: give at least one"),
        ({"prompts": "x"}, "this model is conditioned on embeddings, not prompts"),
        ({"embeddings": []}, "this model is conditioned on embeddings: give at least one"),
        (
            {"embeddings": vectors},
            "embeddings of shape (2, 3, 16): give vectors of this model's 16 numbers, (m, 16)",
        ),
        (
            {"embeddings": vectors[0, :, :8]},
            "embeddings of shape (3, 8): give vectors of this model's 16 numbers",
        ),
        (
            {"embeddings": [vectors[0], vectors[1, :2]]},
            "embeddings of 3 and 2 vectors: every picture needs equally many",
        ),
        ({"embeddings": vectors[0] * np.nan}, "embeddings must be finite numbers"),
        (
            {"embeddings": list(vectors), "seeds": [1, 2, 3]},
            "2 embeddings and 3 seeds do not pair up",
        ),
        (
            {"embeddings": tmp_path / "none.npy"},
            "none.npy cannot be read: No such file or directory",
        ),
        *(
            ({"embeddings": tmp_path / name}, f"{name}: this is no .npy file of numbers")
            for name in ("text.npy", "objects.npy", "many.npz")
        ),
    ]:
        with pytest.raises(RequestError) as caught:
            pipe.stream(**given)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"mask": HALF}, "mask needs an image: give one"),
        ({"strength": 0.5}, "strength needs an image: give one"),
        ({"image": PICTURE, "strength": 1.5}, "strength must be above 0 and up to 1, not 1.5"),
        ({"image": PICTURE, "strength": 0.0}, "strength must be above 0 and up to 1, not 0.0"),
        ({"image": PICTURE, "variation": -1.0}, "variation must be from 0 to 1, not -1.0"),
        ({"image": PICTURE, "variation": 0.5, "mask": HALF}, "variation takes the whole image"),
        ({"image": PICTURE, "mask": np.zeros((16, 16), np.uint8)}, "the mask is black all over"),
        (
            {"image": PICTURE, "outpaint": (0, 0, 0, 0)},
            "outpaint 0,0,0,0: give top, right, bottom, left",
        ),
        ({"image": PICTURE, "outpaint": (1, 2)}, "outpaint 1,2: give top, right, bottom, left"),
        (
            {"image": np.zeros((4, 4, 3), np.float32)},
            "image is no readable picture: an array of float32",
        ),
        ({"image": "{tmp}/none.png"}, "none.png cannot be read: No such file or directory"),
        (
            {"image": "{tmp}/text.png"},
            "text.png is no readable picture: not a picture that Pillow can read",
        ),
        ({"image": PICTURE, "mask": "{tmp}/text.png"}, "text.png is no readable picture"),
        ({"image": []}, "there is no image; give at least one"),
        ({"image": [PICTURE] * 2, "seeds": [1, 2, 3]}, "2 prompts and 3 seeds do not pair up"),
        ({"image": PICTURE, "mask": HALF, "sampler": "dpm_adaptive"}, "keeps no part of an image"),
        ({"sampler": "ddim_inversion"}, "sampler 'ddim_inversion' does not exist"),
        ({"classes": [1]}, "this model is conditioned on prompts, not classes"),
        ({"negative": ["a", "b"], "seeds": [1, 2, 3]}, "2 negative prompts for 3 pictures"),
        (
            {"guidance_interval": (5.0, 1.0)},
            "guidance_interval (5.0, 1.0): give the first and the last timestep",
        ),
        ({"progress_every": -1}, "progress_every must be at least 0, not -1"),
        ({"progress_every": 5}, "progress_every 5: ddim has no such step here"),
        ({"progress_every": 1, "sampler": "dpm_adaptive"}, "dpm_adaptive has no such step here"),
        ({"tile": 3}, "tile must be 0 or a multiple of 2 from 8 on, not 3"),
        ({"decode_batch": -1}, "decode_batch must be at least 0, not -1"),
        (
            {"toward": ([BLUE], [1], [0.5, 0.6])},
            "toward needs as many ends, seeds and mixes as there are pictures, 1",
        ),
    ],
)
def test_a_task_that_cannot_be_done_is_refused_at_once_in_one_line(
    pipe, tmp_path, request_, message
):
    (tmp_path / "text.png").write_text("no picture")
    filled = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in request_.items()}
    with pytest.raises(RequestError) as caught:
        pipe.stream(RED, **filled)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"in_channels": 9}, "concatenates 5 channels to its latents"),
        ({"num_classes": 10}, "takes class numbers"),
    ],
)
def test_a_unet_with_more_inputs_than_its_conditioner_gives_is_refused(
    pipe, monkeypatch, unet, message
):
    monkeypatch.setattr(
        pipe, "model", dataclasses.replace(pipe.model, unet=pipe.model.unet.clone(**unet))
    )
    with pytest.raises(RequestError, match=message):
        pipe.stream(RED)


def test_pictures_of_any_size_and_mode_are_fitted_with_a_log_line(pipe, caplog, tmp_path):
    Image.fromarray(PICTURE).convert("LA").resize((40, 25)).save(tmp_path / "grey.png")
    mask = Image.new("1", (20, 20), 1)
    with caplog.at_level(logging.INFO, logger="ldm_jax"):
        images = pipe(RED, image=tmp_path / "grey.png", mask=mask, seeds=[0], steps=1)
    assert images.shape == (1, 16, 24, 3)  # the short side is the model's own
    assert "image of 25x40 cropped and resized to 16x24" in caplog.text
    assert "mask of 20x20 stretched to its image's 25x40" in caplog.text
    asked = pipe(RED, image=tmp_path / "grey.png", mask=mask, seeds=[0, 1], size=(16, 16))
    assert asked.shape == (2, 16, 16, 3)
