"""Loading checkpoints to sample from: supported files, left-out arrays, memory."""

import json
import tracemalloc

import hostile
import jax
import numpy as np
import pytest
from originals import CODER, KL, MODELS, Written, arrays_of, writer
from PIL import Image
from safetensors.numpy import load_file, save_file

import ldm_jax
from ldm_jax.cli.convert import main
from ldm_jax.convert.compvis.infer import Original
from ldm_jax.convert.compvis.whole import whole_from_config
from ldm_jax.convert.conversion import read_model
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.errors import RequestError
from ldm_jax.io.png import read_settings
from ldm_jax.models.build import build
from ldm_jax.sampling.inputs import Inputs
from ldm_jax.sampling.pipeline import Pipeline
from ldm_jax.sampling.program import SamplingConfig, generate

pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return writer(tmp_path_factory.mktemp("originals"))


def ckpt(arrays: dict[str, np.ndarray], **beside: bytes) -> bytes:
    """A .ckpt as PyTorch Lightning saves it, with its training state."""
    storages, state = {}, {}
    kinds = {
        "float32": "FloatStorage",
        "float16": "HalfStorage",
        "int64": "LongStorage",
        "int32": "IntStorage",
    }
    for i, (name, a) in enumerate(arrays.items()):
        a = np.asarray(a, order="C")
        strides = [s // a.itemsize for s in a.strides]
        storage = hostile.storage(kinds[a.dtype.name], str(i), a.size)
        state[name], storages[str(i)] = hostile.tensor(storage, 0, a.shape, strides), a.tobytes()
    return hostile.archive(hostile.mapping(state_dict=hostile.mapping(**state), **beside), storages)


def test_a_ckpt_loads_and_samples_like_its_model_directory(written, tmp_path):
    source = written("class", ema=True)
    file = tmp_path / "last.ckpt"
    callback = hostile.name("pytorch_lightning.callbacks", "ModelCheckpoint")
    more = {
        "global_step": hostile.number(7),
        "callbacks": b"}" + callback + b"}s",
        "optimizer_states": b"]",
    }
    file.write_bytes(ckpt(load_file(source), **more))
    assert main([str(file), "--out", str(tmp_path / "model")]) == 0
    report = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert report["beside the weights"]["global_step"] == 7
    assert "left out" in report["beside the weights"]["callbacks"]
    assert "left out" in report["beside the weights"]["optimizer_states"]
    assert report["inert classes"] == {"pytorch_lightning.callbacks.ModelCheckpoint": 1}

    request = {"classes": [0, 3], "seeds": 0, "steps": 2, "guidance": 2.0}
    before = sorted(tmp_path.iterdir())
    pictures = ldm_jax.load(file, config=source.with_suffix(".yaml"), devices=1)(**request)
    assert sorted(tmp_path.iterdir()) == before  # nothing is written
    assert pictures.shape == (2, 16, 16, 3)
    assert (pictures[0] != pictures[1]).any()
    # Of its names alone nothing is missing but the size, which is another's.
    for other in (ldm_jax.load(file, devices=1), ldm_jax.load(tmp_path / "model", devices=1)):
        assert (other(**request, size=(16, 16)) == pictures).all()
    raw = ldm_jax.load(file, ema=False, devices=1)(**request, size=(16, 16))
    assert (raw != pictures).any()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("text", "red apple"),
        ("unconditional", ""),
        ("rescale", np.ones((16, 16, 3), np.float32)),
        ("class", 2),
        ("ready-made", np.ones((1, 12))),
    ],
)
def test_every_kind_of_condition_reaches_its_network(written, name, given):
    source = written(name)
    pipe = ldm_jax.load(source, config=source.with_suffix(".yaml"), devices=1)
    chosen, conditioner = pipe.settings(steps=2), pipe.model.conditioner
    encoded, null = conditioner.encode([given]), conditioner.encode_null(1)
    plan, rows = (
        pipe.steps(chosen),
        Inputs(np.zeros(1, np.uint32), encoded, null, np.full(1, 2, np.float32)),
    )

    def made(model, plan, rows):
        return generate(model, SAMPLERS["ddim"], plan, rows, SamplingConfig((16, 16))).images

    picture = jax.eval_shape(made, pipe.model, plan, rows)  # traced, not compiled
    assert (picture.shape, picture.dtype) == ((1, 16, 16, 3), np.uint8)


def test_sample_takes_a_checkpoint_and_its_yaml(written, tmp_path, script):
    source, out = written("class", ema=True), tmp_path / "out"
    flags = [
        f"--model={source}",
        f"--model_config={source.with_suffix('.yaml')}",
        "--num=1",
        "--steps=2",
    ]
    ran = script("sample.py", f"--out={out}", "--class=3", *flags)
    assert (ran.status, len(list(out.iterdir()))) == (0, 1), ran.stderr
    (picture,) = out.iterdir()
    assert read_settings(picture)["model_config"] == str(source.with_suffix(".yaml"))
    assert script("sample.py", f"--out={out}", f"--replay={picture}").status == 0
    again = next(path for path in out.iterdir() if path != picture)
    assert (np.asarray(Image.open(again)) == np.asarray(Image.open(picture))).all()
    ran = script("sample.py", f"--out={out}", "--class=3", f"--model={written('kl')}")
    assert (ran.status, len(ran.lines)) == (2, 1)
    assert "is a first_stage" in ran.stderr


def test_the_losses_of_a_first_stage_are_left_out_by_name(written, tmp_path):
    target, params = MODELS["vqgan"]
    options = {"disc_start": 1, "disc_ndf": 4, "disc_num_layers": 1}
    loss = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": options,
    }
    whole = whole_from_config(target, params | {"lossconfig": loss}, vgg=(4, 4, 4, 4, 4))
    file = tmp_path / "vqgan.ckpt"
    arrays = arrays_of(whole)
    arrays = {name: a.astype(np.int64) if "tracked" in name else a for name, a in arrays.items()}
    file.write_bytes(ckpt(arrays))
    assert main([str(file), "--out", str(tmp_path / "model")]) == 0
    report = json.loads((tmp_path / "model" / "conversion.json").read_text())
    left = {e["source"] for e in report["left_out"]}
    assert left == {name for name in arrays if name.startswith("loss.")}
    assert {e["why"] for e in report["left_out"] if "discriminator" in e["source"]} == {
        "of the loss that the first stage was trained with"
    }
    with pytest.raises(RequestError, match="is a first_stage, which makes no pictures by itself"):
        ldm_jax.load(file)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("held twice", None, "this model paints a masked part of an image: give an image, and"),
        ("small picture", None, "this model is conditioned on image, not prompts"),
        ("clip inpainting", None, "give an image, and a mask or outpaint"),
        ("clip inpainting", ["masked_image", "mask"], "concatenates 5 channels to its latents"),
    ],
)
def test_incomplete_or_unsampleable_models_load_with_a_warning(written, name, keys, message):
    target, params = MODELS[name]
    config = None if keys is None else Original(target, params | {"concat_keys": keys})
    read = read_model(written(name), config=config)
    model = build(read.config, {"conditioner": {}, **read.params}, read.params["first_stage"])
    with pytest.raises(RequestError) as error:
        Pipeline(model, devices=1).stream("x")
    assert message in str(error.value)


def test_text_and_channels_of_stable_diffusion_s_inpainting_are_separated(written):
    config = read_model(written("clip inpainting")).config
    assert config["conditioner"]["text"]["kind"] == "clip"
    assert config["conditioner"]["joined"] == {"channels": 5, "of": "masked_sd", "size": [256, 256]}
    assert config["sampling"]["guidance"] == 7.5


def test_masked_and_small_pictures_are_distinguished(written):
    assert read_model(written("held twice")).config["conditioner"] == {
        "kind": "joined",
        "channels": 5,
        "of": "masked",
        "size": [128, 128],
    }
    assert read_model(written("small picture")).config["conditioner"] == {
        "kind": "joined",
        "channels": 3,
        "of": "picture",
        "size": [128, 128],
    }


def test_reading_takes_no_more_memory_than_the_parameters(tmp_path):
    coder = {**CODER, "ch": 128, "attn_resolutions": []}
    arrays = arrays_of(whole_from_config(KL["target"], {"embed_dim": 4, "ddconfig": coder}))
    save_file(arrays, tmp_path / "kl.safetensors")
    size, largest = sum(a.nbytes for a in arrays.values()), max(a.nbytes for a in arrays.values())
    del arrays
    read_model(tmp_path / "kl.safetensors")  # warms up imports and traces
    tracemalloc.start()
    converted = read_model(tmp_path / "kl.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(converted.params)) == size > 5e6
    assert peak < size + 3 * largest + 2e6
