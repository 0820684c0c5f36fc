"""Request: signatures, values, seeds, masks; non-finite results."""

import dataclasses
import inspect
import logging
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, pipeline_of
from PIL import Image

from ldm_jax.conditioning import CONDITIONERS, Cond, Conditioner
from ldm_jax.conditioning.pictures import Geometry, edit_canvas, read_mask, read_picture
from ldm_jax.errors import RequestError
from ldm_jax.kernels import cores
from ldm_jax.sampling import pipeline
from ldm_jax.sampling.export import arguments_of, program_of
from ldm_jax.sampling.inputs import seed_words
from ldm_jax.sampling.pipeline import Pipeline, reported_memory
from ldm_jax.sampling.program import keys_of
from ldm_jax.sampling.request import OPTIONS, Request, read_prompts


@pytest.mark.fast
@pytest.mark.parametrize("method", [Pipeline.__call__, Pipeline.stream])
def test_the_signature_is_that_of_the_record(method):
    found = list(inspect.signature(method).parameters.values())[1:]
    assert [(p.name, p.default) for p in found] == [
        (f.name, f.default) for f in dataclasses.fields(Request)
    ]
    types = typing.get_type_hints(Request)
    hints = typing.get_type_hints(method)
    assert {name: hints[name] for name in types} == types


@pytest.mark.fast
def test_every_option_of_the_record_has_a_help():
    assert all(f.metadata["help"] for f in OPTIONS.values() if f.metadata["kind"])


@pytest.mark.fast
@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 5},
        {"size": (64,)},
        {"seeds": "x"},
        {"seeds": [1.5]},
        {"steps": True},
        {"guidance": [1, "b"]},
        {"guidance_interval": 3},
        {"outpaint": 5},
        {"eta": None, "temperature": float("nan")},
        {"sampler": ["ddim"]},
        {"toward": (["x"], [1], ["far"])},
        {"strength": {"a": 1}},
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_one_line(wrong):
    with pytest.raises(RequestError) as caught:
        Request.from_row({}) if wrong is None else Request(**wrong)
    assert "\n" not in str(caught.value)
    assert any(name in str(caught.value) for name in (*wrong, "mixes"))


@pytest.mark.fast
def test_a_row_is_the_request_of_one_picture():
    request = Request(
        prompts=["a", "b"], negative="n", seeds=[3, 2**40], guidance=[1.0, 2.0], steps=7, eta=0.5
    )
    kept = {**request.settings(), **request.row(1)}
    assert (kept["prompt"], kept["negative"], kept["seed"]) == ("b", "n", 2**40)
    again = Request.from_row(kept)
    assert (again.prompts, again.seeds, again.guidance) == (["b"], [2**40], 2.0)
    assert (again.steps, again.eta) == (7, 0.5)


@pytest.mark.fast
def test_seeds_have_up_to_64_bits():
    assert seed_words([0, 2**32 - 1]).shape == (2,)
    words = seed_words([5, 2**32 + 5, 2**64 - 1])
    assert words.tolist() == [[0, 5], [1, 5], [2**32 - 1, 2**32 - 1]]
    short, long = keys_of(jnp.asarray(seed_words([5]))), keys_of(jnp.asarray(words))
    data = jax.random.key_data
    np.testing.assert_array_equal(data(short)[0], data(long)[0])
    assert len(np.unique(data(long), axis=0)) == 3


@pytest.mark.fast
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    for text in ("\ufeffred apple\n", "blue\n\ufeffred apple\n"):
        (tmp_path / "p.txt").write_text(text, encoding="utf-8")
        assert read_prompts(tmp_path / "p.txt")[-1] == "red apple"
    (tmp_path / "p.txt").write_text("\ufeff\n \n", encoding="utf-8")
    with pytest.raises(RequestError, match="no prompt in it"):
        read_prompts(tmp_path / "p.txt")


# -------------------------------------------------------------------------------------------- masks

HOLE = np.zeros((8, 12), bool)
HOLE[2:5, 3:6] = True


def layer(colour: int, alpha: np.ndarray) -> Image.Image:
    """One tone with an alpha channel."""
    tone = np.full((*HOLE.shape, 3), colour, np.uint8)
    return Image.fromarray(np.concatenate([tone, alpha[..., None].astype(np.uint8)], -1), "RGBA")


PHOTO = np.random.default_rng(0).integers(0, 256, (*HOLE.shape, 3)).astype(np.uint8)
MASKS = {
    "white paint on an empty layer": layer(255, 255 * HOLE),
    "black paint on an empty layer": layer(0, 255 * HOLE),
    "white with an erased hole": layer(255, 255 * ~HOLE),
    "grey and alpha": layer(255, 255 * HOLE).convert("LA"),
    "a photo with an erased hole": Image.fromarray(np.dstack([PHOTO, 255 * ~HOLE]).astype("u1")),
    "white and black, half of it empty": Image.fromarray(
        np.dstack([*[255 * HOLE] * 3, 255 * (np.arange(12) < 9) * np.ones((8, 1))]).astype("u1")
    ),
    "opaque": Image.fromarray((255 * HOLE).astype(np.uint8)).convert("RGBA"),
    "an array": (255 * HOLE).astype(np.uint8),
    "an array of booleans": HOLE,
    "one bit": Image.fromarray(HOLE),
    "sixteen bits": Image.fromarray(np.uint16(65535) * HOLE),
    "a palette": Image.fromarray((255 * HOLE).astype(np.uint8)).convert("P"),
    "four inks": Image.fromarray((255 * HOLE).astype(np.uint8)).convert("RGB").convert("CMYK"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", MASKS)
def test_the_alpha_of_a_mask_is_used(name, tmp_path):
    given = MASKS[name]
    if isinstance(given, Image.Image):
        file = tmp_path / ("mask.tif" if given.mode == "CMYK" else "mask.png")
        given.save(file)
        np.testing.assert_array_equal(read_mask(file) >= 128, HOLE)
    np.testing.assert_array_equal(read_mask(given) >= 128, HOLE)


@pytest.mark.fast
def test_a_picture_that_is_not_read_is_named_once(tmp_path):
    Image.fromarray(np.float32(HOLE)).save(tmp_path / "float.tif")
    (tmp_path / "cut.jfif").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 99)
    for read in (read_mask, read_picture):
        for name in ("float.tif", "cut.jfif", "x.heic"):
            with pytest.raises(RequestError) as caught:
                read(tmp_path / name)
            assert str(caught.value).count("is no readable picture") == 1
            assert "\n" not in str(caught.value)
        with pytest.raises(RequestError, match="cannot be read: Is a directory"):
            read(tmp_path)


@pytest.mark.fast
@pytest.mark.parametrize(("suffix", "kind"), [("jfif", "JPEG"), ("ppm", "PPM"), ("PNM", "PPM")])
def test_pictures_of_less_usual_suffixes_are_read(tmp_path, suffix, kind):
    Image.fromarray(PHOTO).save(tmp_path / f"x.{suffix}", kind)
    found = read_picture(tmp_path / f"x.{suffix}")
    assert np.abs(found.astype(int) - PHOTO).mean() < (60 if kind == "JPEG" else 1e-9)


@pytest.mark.fast
def test_prompts_of_other_encodings(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("ein Bär\r\nzwei\n".encode("utf-16"))
    assert read_prompts(file) == ["ein Bär", "zwei"]
    file.write_bytes("ein B\xe4r".encode("latin-1"))
    with pytest.raises(RequestError, match=r"--prompts_file .* is not UTF-8 .*: save it as UTF-8"):
        read_prompts(file)


@pytest.mark.fast
def test_a_picture_of_absurd_shape_is_one_line():
    geometry = Geometry(None, (64, 64), 4, 2)
    with pytest.raises(RequestError, match="aspect ratio is beyond 16:1"):
        edit_canvas(np.zeros((4, 100, 3), np.uint8), None, None, geometry)
    sized = edit_canvas(
        np.zeros((4, 100, 3), np.uint8), None, None, geometry._replace(size=(32, 32))
    )
    assert sized.size == (32, 32)


# --------------------------------------------------------------------- results that are not numbers


@pytest.mark.compile
def test_weights_that_are_not_numbers_are_named_not_painted_black():
    pipe = pipeline_of(SMALL)
    params = jax.tree.map(lambda a: a, pipe.model.params)
    kernel = params["unet"]["out_conv"]["kernel"]
    params["unet"]["out_conv"]["kernel"] = kernel.at[0].set(jnp.nan)
    pipe.model = dataclasses.replace(pipe.model, params=params)
    with pytest.raises(RequestError, match="weights hold NaN or infinite numbers: unet/out_conv"):
        pipe("x", steps=2)


@pytest.mark.compile
def test_a_decoder_that_overflows_in_float16_decodes_in_float32(caplog):
    pipe = pipeline_of(SMALL)
    params = jax.tree.map(lambda a: a, pipe.model.first_stage.params)
    # Activations above 65504, which the normalisation after them divides out again.
    kernel = params["decoder"]["conv_in"]["kernel"]
    params["decoder"]["conv_in"]["kernel"] = kernel * (3e4 / jnp.abs(kernel).max())
    stage = pipe.model.first_stage

    def of(dtype):
        cast = jax.tree.map(lambda a: a.astype(dtype), params)
        module = stage.module.clone(dtype=dtype)
        return dataclasses.replace(
            pipe.model, first_stage=stage.replace(params=cast, module=module)
        )

    pipe.model, pipe.dtype = of(jnp.float16), "float16"
    with caplog.at_level(logging.WARNING):
        retried = pipe("x", steps=2)
    assert "the first stage overflows in float16: it decodes in float32" in caplog.text
    pipe.model, pipe._programs, pipe._executables = of(jnp.float32), {}, {}
    assert np.abs(retried.astype(int) - pipe("x", steps=2)).mean() < 1
    assert retried.std() > 1


@pytest.mark.fast
def test_running_out_of_memory_names_the_largest_buffers():
    text = "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes."
    with (
        pytest.raises(RequestError, match=r"out of memory: 8 pictures .*8\.0 GiB.*--batch"),
        reported_memory("8 pictures of 64x64 at a time"),
    ):
        raise jax.errors.JaxRuntimeError(text)
    with pytest.raises(jax.errors.JaxRuntimeError), reported_memory("x"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.compile
def test_a_picture_too_large_for_the_memory_is_refused_before_it_runs(monkeypatch):
    pipe = pipeline_of(SMALL)
    plain = pipe("x", steps=1)
    monkeypatch.setattr(pipeline, "LARGE", 1)
    assert (pipe("x", steps=1) == plain).all()
    pipe._executables = {}
    monkeypatch.setattr(pipeline.cores, "free_memory", lambda mesh: 1000)
    message = (
        r"out of memory: 1 pictures of 16x16 at a time \(0\.0 GiB are needed, 0\.0 GiB are free\)"
    )
    with pytest.raises(RequestError, match=f"{message}; lower --batch or --size"):
        pipe("x", steps=1)


@pytest.mark.fast
def test_free_memory_is_what_the_limits_leave():
    free = cores.free_memory(cores.mesh_of(cores.all_devices()[:1]))
    assert free is None or 2**20 < free < 2**50


# --- a kind of its own


@dataclasses.dataclass(frozen=True)
class Brightness(Conditioner):
    """A number in [0, 1] as one context token."""

    dim: int

    field = "condition"
    argument = "brightness"
    default_guidance = 2.0

    def encode(self, values):
        return np.asarray(values, np.float32)

    def encode_null(self, n):
        return np.full(n, 0.5, np.float32)

    def __call__(self, params, encoded, *, train=False, rngs=None):
        return Cond(crossattn=jnp.broadcast_to(encoded[:, None, None], (len(encoded), 1, self.dim)))


@pytest.mark.compile
def test_a_kind_of_condition_is_registered_sampled_and_exported(monkeypatch):
    monkeypatch.setitem(CONDITIONERS, "brightness", Brightness)
    pipe = pipeline_of({**SMALL, "conditioner": {"kind": "brightness", "dim": 16}, "sampling": {}})
    assert pipe.defaults.guidance == 2.0
    images = pipe(condition=[0.1, 0.9], seeds=[0, 0], steps=2, size=(16, 16))
    assert (images[0] != images[1]).any()
    for wrong in ({"prompts": "x"}, {}):
        with pytest.raises(RequestError, match="conditioned on condition"):
            pipe.stream(**wrong)
    assert set(arguments_of(pipe)) == {"seeds", "brightness", "null_brightness", "guidance"}
    program, _ = program_of(pipe, pipe.settings(steps=2, size=(16, 16)))
    assert callable(program)
