"""Conversion of whole checkpoints: nothing lost, nothing assumed in silence, the same bits back, and one line for each mistake."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import jax
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

import ldm_jax
from ldm_jax.checkpoint import CheckpointError, load_model, read_config
from ldm_jax.convert.__main__ import main
from ldm_jax.convert.conversion import read_model, sha256, to_compvis
from ldm_jax.convert.infer import LATENT_DIFFUSION, Original, infer
from ldm_jax.convert.original import config_of, read_yaml
from ldm_jax.convert.schedules import schedule_params
from ldm_jax.convert.tables import flatten, to_theirs
from ldm_jax.convert.targets import TargetError
from ldm_jax.convert.verify import outputs_of
from ldm_jax.convert.whole import BUFFERS, EMA, Whole, whole_from_config
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.diffusion.schedule import make_betas
from ldm_jax.generation import Form, Rows, generate
from ldm_jax.latent import build
from ldm_jax.pictures import read_settings
from ldm_jax.pipeline import Given, Pipeline, RequestError

EMBEDDERS = "ldm.modules.encoders.modules"
UNET: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_head_channels": 32,
}
CODER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [128],
    "dropout": 0.0,
}
KL = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": CODER}}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {"embed_dim": 4, "n_embed": 9, "ddconfig": CODER | {"double_z": False, "attn_resolutions": []}},
}
BERT = {"n_embed": 16, "n_layer": 1, "max_seq_len": 6}


def model(stage: Any, conditioner: Any, unet: dict[str, Any] = {}, **params: Any) -> dict[str, Any]:  # noqa: B006
    """Parameters of a tiny LatentDiffusion."""
    unet_config = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET | unet}
    return {
        "timesteps": 50,
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "image_size": 8,
        "unet_config": unet_config,
        "first_stage_config": stage,
        "cond_stage_config": conditioner,
    } | params


def crossattn(context: int) -> dict[str, Any]:
    return {"use_spatial_transformer": True, "context_dim": context}


# name -> (target, params): one of each kind that is published, in small.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (
        LATENT_DIFFUSION,
        model(
            KL,
            {"target": f"{EMBEDDERS}.BERTEmbedder", "params": BERT},
            crossattn(16),
            conditioning_key="crossattn",
            scale_factor=0.2,
        ),
    ),
    "class": (
        LATENT_DIFFUSION,
        model(
            VQ,
            {"target": f"{EMBEDDERS}.ClassEmbedder", "params": {"embed_dim": 12, "n_classes": 5, "key": "label"}},
            crossattn(12),
            conditioning_key="crossattn",
        ),
    ),
    "clip inpainting": (
        "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
        model(
            KL,
            {
                "target": f"{EMBEDDERS}.TinyCLIP",
                "params": {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
                | {"num_attention_heads": 1, "max_position_embeddings": 7},
            },
            crossattn(16) | {"in_channels": 9},
            conditioning_key="hybrid",
            scale_factor=1.0,
            finetune_keys=None,
        ),
    ),
    "rescale": (
        LATENT_DIFFUSION,
        model(
            VQ,
            {"target": f"{EMBEDDERS}.SpatialRescaler", "params": {"in_channels": 3, "out_channels": 2}},
            {"in_channels": 6, "resblock_updown": True, "use_scale_shift_norm": True},
            concat_mode=True,
            scale_by_std=True,
        ),
    ),
    "held twice": (LATENT_DIFFUSION, model(VQ, "__is_first_stage__", {"in_channels": 9}, concat_mode=True)),
    "small picture": (
        LATENT_DIFFUSION,
        model(VQ, {"target": "torch.nn.Identity"}, {"in_channels": 7}, conditioning_key="concat", scale_factor=1.0),
    ),
    "unconditional": (
        LATENT_DIFFUSION,
        model(KL, "__is_unconditional__", {"conv_resample": False}, learn_logvar=True, scale_by_std=True),
    ),
    "ready-made": (
        LATENT_DIFFUSION,
        model(KL, {"target": "torch.nn.Identity"}, crossattn(12), conditioning_key="crossattn", scale_factor=1.0),
    ),
    "kl": (KL["target"], KL["params"]),
    "vqgan": (
        "taming.models.vqgan.VQModel",
        {**VQ["params"], "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"}},
    ),
    "gumbel": ("taming.models.vqgan.GumbelVQ", VQ["params"]),
}


def arrays_of(whole: Whole, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random arrays under the original's names; constants and duplicates as they have to be."""
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {}
    for path, shape in flatten(whole.shapes).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        draw = (0.1 * rng.standard_normal(shape.shape)).astype(dtype)
        node[path[-1]] = np.int32(3) if path[-1] == "count" else draw + (path[-1] == "scale")
    return to_theirs(whole.table, {part: tree.get(part, {}) for part in whole.shapes})


Written = Callable[..., Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """``written(name)`` -> the .safetensors of one of MODELS, with its YAML beside it."""
    folder, there = tmp_path_factory.mktemp("originals"), {}

    def write(name: str, dtype: Any = np.float32, **options: Any) -> Path:
        key = name, np.dtype(dtype).name, *options
        if key not in there:
            target, params = MODELS[name]
            there[key] = path = folder / f"{len(there)}.safetensors"
            save_file(arrays_of(whole_from_config(target, params, **options), dtype), path)
            text = yaml.safe_dump({"model": {"target": target, "params": params}})
            path.with_suffix(".yaml").write_text(text)
        return there[key]

    return write


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


# ------------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("name", "dtype", "with_yaml"),
    [
        ("text", np.float16, True),
        ("class", np.float32, False),
        ("clip inpainting", np.float16, False),
        ("rescale", np.float32, True),
        ("held twice", np.float32, False),
        ("small picture", np.float16, False),
        ("unconditional", np.float16, False),
        ("ready-made", np.float32, False),
        ("kl", np.float32, False),
        ("vqgan", np.float16, True),
        ("gumbel", np.float32, False),
    ],
)
def test_there_and_back_is_the_same_to_the_bit(written, tmp_path, name, dtype, with_yaml):
    source, out, back = written(name, dtype), tmp_path / "model", tmp_path / "back.safetensors"
    config = ["--config", str(source.with_suffix(".yaml"))] if with_yaml else []
    assert main([str(source), "--out", str(out), *config]) == 0
    assert main(["export", str(out), "--to", "compvis", "--out", str(back)]) == 0

    theirs, ours = load_file(source), load_file(back)
    assert ours.keys() == theirs.keys()  # so that the original loads it strictly
    report = json.loads((out / "conversion.json").read_text())
    kept = {entry["source"]: entry for entry in report["entries"]}
    left = {entry["source"]: entry["why"] for entry in report["left_out"]}
    assert kept.keys() | left.keys() == theirs.keys()
    assert not kept.keys() & left.keys()
    for source_name, a in theirs.items():
        b = ours[source_name]
        assert b.shape == a.shape
        if source_name in kept:
            entry = kept[source_name]
            assert (entry["shape"], entry["dtype"]) == (list(a.shape), a.dtype.name)
            assert sha256(b) == sha256(a) == entry["sha256"], source_name
        else:
            assert np.allclose(a.astype(np.float64), b, rtol=2e-3, atol=1e-6), source_name
            known = (*BUFFERS.split(), "scale_factor")
            assert source_name in known or source_name.startswith("cond_stage_model.") or "position_ids" in source_name
    # What the YAML that comes with it describes is again the same model.
    again = read_yaml(back.with_suffix(".yaml"))
    whole = whole_from_config(again.target, again.params)
    config = read_config(out)
    del config["format"]
    assert config_of(again, whole.modules, config.get("scale_factor")) == config


def without_size(section: Any) -> Any:
    """How large its maps are, a file does not tell."""
    return {k: without_size(v) for k, v in section.items() if k != "size"} if isinstance(section, dict) else section


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_tell_what_the_yaml_says(written, name):
    arrays, (target, params) = load_file(written(name)), MODELS[name]
    found, given = infer(arrays), read_yaml(written(name).with_suffix(".yaml"))
    options = {"buffers": False} if "unet_config" in params else {}
    whole, known = (whole_from_config(o.target, o.params, losses=False, **options) for o in (found, given))
    assert whole.modules == known.modules
    assert sorted(e.source for e in whole.table) == sorted(e.source for e in known.table)
    ours, theirs = config_of(found, whole.modules, 1.0), config_of(given, known.modules, 1.0)
    for section in ("unet", "first_stage", "conditioner", "objective", "kind"):
        assert without_size(ours.get(section)) == without_size(theirs.get(section))
    if "unet_config" in params:
        assert found.target == target
        schedule = {"beta_schedule": "linear", **{n: params[n] for n in ("timesteps", "linear_start", "linear_end")}}
        assert ours["schedule"] == schedule
        assumed = " ".join(found.assumed)
        assert all(word in assumed for word in ("num_head_channels 32", "eps", "size"))
        assert ("scale_factor" in assumed) == ("scale_by_std" not in params)


def test_averages_are_taken_unless_the_weights_are_asked_for(written, tmp_path, capsys):
    source = written("class", ema=True)
    arrays = load_file(source)
    raw, average = "model.diffusion_model.out.2.bias", "model_ema.diffusion_modelout2bias"
    for flag, taken in (([], average), (["--no-ema"], raw)):
        out = tmp_path / f"model{len(flag)}"
        assert main([str(source), "--out", str(out), *flag]) == 0
        report = json.loads((out / "conversion.json").read_text())
        (entry,) = (e for e in report["entries"] if e["path"] == "unet/out_conv/bias")
        assert (entry["source"], entry["sha256"]) == (taken, sha256(arrays[taken]))
        (other,) = (e for e in report["left_out"] if e["source"] in {raw, average} - {taken})
        assert "average" in other["why"]
        shadows = {n for n in arrays if n.startswith(EMA)} - {f"{EMA}decay", f"{EMA}num_updates"}
        assert {e["source"] for e in report["entries"]} & shadows == (shadows if taken == average else set())
    assert "averaged" in capsys.readouterr().out
    assert main([str(written("class")), "--out", str(tmp_path / "none"), "--ema"]) == 2
    assert told(capsys) == [f"error: {written('class').name} holds no averages of its weights; leave --ema out"]


def test_what_is_no_part_of_the_model_is_left_out_by_name(written, tmp_path):
    arrays = load_file(written("class"))
    beside = {"model_ema.decay", "model_ema.num_updates", "safety_checker.visual_projection.weight"}
    save_file(arrays | {name: np.zeros(2, np.float32) for name in beside}, tmp_path / "x.safetensors")
    converted = read_model(tmp_path)  # a folder that holds nothing else
    assert beside <= {entry["source"] for entry in converted.left_out}
    assert not beside & {entry["source"] for entry in converted.entries}
    assert converted.about["ema"] is False


def test_dtype_casts_the_parameters(written, tmp_path):
    out = tmp_path / "model"
    assert (
        main([str(written("kl")), "--out", str(out), "--dtype", "bfloat16", "--report", str(tmp_path / "r.json")]) == 0
    )
    _, params = load_model(out)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert json.loads((tmp_path / "r.json").read_text())["dtype"] == "bfloat16"
    assert not (out / "conversion.json").exists()


# ---------------------------------------------------------------------------------------------------------------- .ckpt


def ckpt(arrays: dict[str, np.ndarray], **beside: bytes) -> bytes:
    """A .ckpt as PyTorch Lightning saves it, with what it holds beside the weights."""
    storages, state = {}, {}
    kinds = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "int32": "IntStorage"}
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
    more = {"global_step": hostile.number(7), "callbacks": b"}" + callback + b"}s", "optimizer_states": b"]"}
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
    plan, rows = pipe.plan(chosen, Given()), Rows(np.zeros(1, np.uint32), encoded, null, np.full(1, 2, np.float32))

    def made(model, plan, rows):
        return generate(model, SAMPLERS["ddim"], plan, rows, Form((16, 16))).images

    picture = jax.eval_shape(made, pipe.model, plan, rows)  # traced, not compiled
    assert (picture.shape, picture.dtype) == ((1, 16, 16, 3), np.uint8)


def test_sample_takes_a_checkpoint_and_its_yaml(written, tmp_path, script):
    source, out = written("class", ema=True), tmp_path / "out"
    flags = [f"--model={source}", f"--model_config={source.with_suffix('.yaml')}", "--num=1", "--steps=2"]
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
    loss = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": options}
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
        ("held twice", None, "this model is asked by image, not by prompts"),
        ("small picture", None, "this model is asked by image, not by prompts"),
        ("clip inpainting", None, "give a mask or outpaint with the image"),
        ("clip inpainting", ["masked_image", "mask"], "joins 5 channels to its latents"),
    ],
)
def test_what_lacks_something_or_cannot_be_sampled_loads_and_says_so(written, name, keys, message):
    target, params = MODELS[name]
    config = None if keys is None else Original(target, params | {"concat_keys": keys})
    read = read_model(written(name), config=config)
    model = build(read.config, {"conditioner": {}, **read.params}, read.params["first_stage"])
    with pytest.raises(RequestError) as error:
        Pipeline(model, devices=1).stream("x")
    assert message in str(error.value)


def test_text_and_channels_of_stable_diffusion_s_inpainting_are_told_apart(written):
    config = read_model(written("clip inpainting")).config
    assert config["conditioner"]["text"]["kind"] == "clip"
    assert config["conditioner"]["joined"] == {"channels": 5, "of": "masked_sd", "size": [256, 256]}
    assert config["sampling"]["guidance"] == 7.5


def test_masked_and_small_pictures_are_told_apart(written):
    assert read_model(written("held twice")).config["conditioner"] == {
        "kind": "joined", "channels": 5, "of": "masked", "size": [128, 128]
    }  # fmt: skip
    assert read_model(written("small picture")).config["conditioner"] == {
        "kind": "joined", "channels": 3, "of": "picture", "size": [128, 128]
    }  # fmt: skip


def test_reading_takes_no_more_memory_than_the_parameters(tmp_path):
    coder = {**CODER, "ch": 128, "attn_resolutions": []}
    arrays = arrays_of(whole_from_config(KL["target"], {"embed_dim": 4, "ddconfig": coder}))
    save_file(arrays, tmp_path / "kl.safetensors")
    size, largest = sum(a.nbytes for a in arrays.values()), max(a.nbytes for a in arrays.values())
    del arrays
    read_model(tmp_path / "kl.safetensors")  # whatever is imported or traced once
    tracemalloc.start()
    converted = read_model(tmp_path / "kl.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(converted.params)) == size > 5e6
    assert peak < size + 3 * largest + 2e6


# ------------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "params",
    [
        {"beta_schedule": "linear", "timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012},
        {"beta_schedule": "linear", "timesteps": 50, "linear_start": 0.0015, "linear_end": 0.0195},
        {"beta_schedule": "sqrt_linear", "timesteps": 1000, "linear_start": 0.0001, "linear_end": 0.02},
        {"beta_schedule": "sqrt", "timesteps": 100, "linear_start": 0.0001, "linear_end": 0.02},
        {"beta_schedule": "cosine", "timesteps": 100},
    ],
    ids=lambda params: f"{params['beta_schedule']}{params['timesteps']}",
)
def test_schedules_are_told_from_their_betas(params, dtype):
    betas = make_betas(**{"kind" if name == "beta_schedule" else name: value for name, value in params.items()})
    found, assumed = schedule_params({"betas": betas.astype(dtype)})
    assert assumed == []
    if params["beta_schedule"] != "sqrt" or dtype == np.float32:
        assert found == params
    assert found["beta_schedule"] == params["beta_schedule"]
    if dtype == np.float32 and params["beta_schedule"] == "linear":
        assert schedule_params({"alphas_cumprod": np.cumprod(1 - betas).astype(dtype)}) == (params, [])


def test_other_schedules_are_an_error_and_none_is_an_assumption():
    with pytest.raises(TargetError, match="no known schedule; give the original's YAML"):
        schedule_params({"betas": np.linspace(0.1, 0.3, 20, dtype=np.float32) ** 3})
    found, (line,) = schedule_params({})
    assert found["timesteps"] == 1000
    assert "the file has no schedule" in line


# ---------------------------------------------------------------------------------------------------------------- errors


def test_everything_that_does_not_fit_is_listed(written, tmp_path, capsys):
    arrays = load_file(written("class"))
    gone, bad = "model.diffusion_model.out.2.bias", "cond_stage_model.embedding.weight"
    arrays["surplus"] = arrays.pop(gone)
    arrays[bad] = arrays[bad][:, :-1].copy()
    arrays["betas"] = arrays["betas"] * 2
    save_file(arrays, tmp_path / "x.safetensors")
    yaml_file = written("class").with_suffix(".yaml")
    assert main([str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "m"), "--config", str(yaml_file)]) == 2
    text = capsys.readouterr().err
    for part in (f"missing (1):\n    {gone}", "unexpected (1):\n    surplus", f"{bad}: found (5, 11)", "    betas"):
        assert part in text
    assert not (tmp_path / "m").exists()
    with pytest.raises(CheckpointError, match="surplus"):
        ldm_jax.load(tmp_path / "x.safetensors", config=yaml_file)


UNET_ROW, STAGE_ROW = "model.diffusion_model.output_blocks.3.0.", "first_stage_model.encoder.down.1.block.0."


@pytest.mark.parametrize(
    ("old", "new", "shape"),
    [
        (UNET_ROW, UNET_ROW.replace("3", "3" * 30), None),  # a number that a loop would not come to the end of
        (STAGE_ROW, STAGE_ROW.replace("1", "9" * 12), None),
        ("model.diffusion_model.input_blocks.0.0.weight", None, ()),
        ("model.diffusion_model.input_blocks.0.0.weight", None, (0, 4, 3, 3)),
        ("model.diffusion_model.input_blocks.0.0.weight", None, (31, 4, 3, 3)),
        ("first_stage_model.encoder.conv_in.weight", None, (0, 0)),
        ("first_stage_model.decoder.conv_in.weight", None, (5,)),
        ("betas", None, ()),
        ("betas", None, (0,)),
    ],
)
def test_names_and_shapes_of_nothing_are_refused(written, tmp_path, capsys, old, new, shape):
    arrays = load_file(written("class"))
    renamed = {name.replace(old, new) if new else name: a for name, a in arrays.items()}
    if shape is not None:
        renamed[old] = np.zeros(shape, np.float32)
    save_file(renamed, tmp_path / "x.safetensors")
    assert main([str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "m")]) == 2
    assert told(capsys)[0].startswith("error: ")
    assert not (tmp_path / "m").exists()
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0


def test_nothing_is_written_over(written, tmp_path, capsys):
    source, out = str(written("kl")), tmp_path / "model"
    assert main([source, "--out", str(out)]) == 0
    back = tmp_path / "back.safetensors"
    back.write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    report = ["--report", str(back)]
    for argv in (
        [source, "--out", str(out)],
        [source, "--out", str(tmp_path / "new"), *report],
        ["export", str(out), "--to", "compvis", "--out", str(back)],
    ):
        capsys.readouterr()
        assert main(argv) == 2
        (line,) = told(capsys)
        assert "give a new" in line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is no YAML"),
        ("lr: 1", "describes no model"),
        ("model: {target: a.B, params: {x: '${y.z}'}}", r"refers to ${y.z}"),
        ("model: {target: no.such.Class}", "no.such.Class is not supported"),
        ("model: {target: ldm.models.autoencoder.AutoencoderKL}", "AutoencoderKL cannot be built: KeyError"),
        ("model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {unet_config: 3}}", "cannot be built"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_yaml_that_says_nothing_is_one_line(written, tmp_path, capsys, text, message):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    assert main([str(written("kl")), "--out", str(tmp_path / "m"), "--config", str(file)]) == 2
    (line,) = told(capsys)
    assert message in line


def test_numbers_in_yaml_are_numbers(tmp_path):
    (tmp_path / "x.yaml").write_text("target: a.B\nparams: {a: 1e-4, b: [2E3, text, 1.5e-06], c: 1}")
    assert read_yaml(tmp_path / "x.yaml") == ("a.B", {"a": 1e-4, "b": [2e3, "text", 1.5e-06], "c": 1}, ())


def test_files_of_no_known_family_are_one_line(tmp_path, capsys):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    assert main([str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "m")]) == 2
    assert "neither a latent diffusion model nor a first stage" in told(capsys)[0]
    assert main([str(tmp_path / "missing"), "--out", str(tmp_path / "m")]) == 2
    assert "no such file" in told(capsys)[0]
    assert main([str(tmp_path / "x.safetensors")]) == 2  # argparse says that --out is required


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "v"}, "cannot hold a model that predicts v"),
        ({"unet": {"norm_groups": 8}}, "norm_groups"),
        ({"schedule": {"zero_terminal_snr": True}}, "zero terminal SNR"),
    ],
)
def test_what_the_original_cannot_hold_is_named(tmp_path, change, message):
    target, params = MODELS["class"]
    config = config_of(Original(target, params), whole_from_config(target, params).modules)
    for section, value in change.items():
        config[section] = {**config[section], **value} if isinstance(value, dict) else value
    with pytest.raises(TargetError, match=message):
        to_compvis(config, {}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- verify


def test_verify_prints_the_error_of_a_recorded_case(written, tmp_path, capsys):
    converted = read_model(written("kl"))
    rng = np.random.default_rng(1)
    given = {
        "x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32),
        "z": rng.normal(size=(1, 4, 8, 8)).astype(np.float32),
    }
    found = {name: np.asarray(a) for name, a in outputs_of(converted.config, converted.params, given).items()}
    assert set(found) == {"mean", "logvar", "decode_z"}
    found["mean"] = found["mean"] + np.float32(0.5)
    arrays = {f"in/{n}": a for n, a in given.items()} | {f"out/{n}": np.ascontiguousarray(a) for n, a in found.items()}
    save_file(arrays, tmp_path / "case.safetensors")
    spec = {"atol": dict.fromkeys(found, 0.1), "rtol": 0.0}
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": {"case": spec}}))
    case = str(tmp_path / "case.safetensors")
    assert main([str(written("kl")), "--out", str(tmp_path / "m"), "--verify", case]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verified")]
    assert len(lines) == 3
    assert any("mean: error 0.5, 5 of what is allowed" in line for line in lines)
    assert any("decode_z: error 0, 0 of" in line for line in lines)
