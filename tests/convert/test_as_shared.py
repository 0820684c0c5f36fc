"""Checkpoints as shared online: wrapped, prefixed, with extra arrays, without a part."""

import hostile
import numpy as np
import pytest
from originals import Written, writer
from safetensors.numpy import load_file, save_file

from ldm_jax.convert.compvis.names import UNET
from ldm_jax.convert.conversion import read_model, replace_parts
from ldm_jax.convert.converted import MISSING
from ldm_jax.convert.tables import flatten
from ldm_jax.errors import ConversionError, ReaderError, TargetError

CLIP = "cond_stage_model.transformer."


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return writer(tmp_path_factory.mktemp("originals"))


@pytest.fixture(scope="module")
def inpainting(written):
    """(arrays, the model they convert to)."""
    path = written("clip inpainting")
    return load_file(path), read_model(path)


def saved(tmp_path, arrays, name="x.safetensors"):
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, tmp_path / name)
    return tmp_path / name


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("rename", "note"),
    [
        (lambda n: f"module.{n}", "module."),
        (lambda n: f"_orig_mod.module.{n}", "_orig_mod."),
        (lambda n: n.replace(UNET, f"{UNET}_orig_mod."), "_orig_mod."),
        (lambda n: f"ema.{n}", "the prefix ema."),
        (lambda n: f"net.model.{n}", "the prefix model."),
        (lambda n: n.replace("transformer.text_model.", "transformer."), "without text_model."),
    ],
)
def test_wrappers_and_prefixes_are_removed_and_reported(inpainting, tmp_path, rename, note):
    arrays, expected = inpainting
    renamed = {rename(name): a for name, a in arrays.items()}
    converted = read_model(saved(tmp_path, renamed))
    assert same(converted.params, expected.params)
    assert any(note in line for line in converted.assumed)
    assert {e["source"] for e in converted.entries} <= renamed.keys()


@pytest.mark.parametrize("place", ["model_state_dict", "net", "ema", "params_ema", "params"])
def test_state_dicts_are_found_under_their_usual_keys(tmp_path, place):
    state = hostile.mapping(**{"encoder.weight": hostile.tensor()})
    tree = {"step": hostile.number(5), place: state, "optimizer": hostile.mapping(state=b"}")}
    (tmp_path / "x.pt").write_bytes(hostile.archive(hostile.mapping(**tree)))
    from ldm_jax.convert.reader.reader import open_checkpoint

    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert (list(checkpoint.tensors), checkpoint.place) == (["encoder.weight"], place)


EXTRA = {
    f"{CLIP}text_projection.weight": np.zeros((16, 16), np.float32),
    f"{CLIP}text_model.embeddings.position_ids": np.full((1, 7), 3.5, np.float16),
    "cond_stage_model.logit_scale": np.zeros((), np.float32),
    "lora_unet_x.lora_down.weight": np.zeros((4, 4), np.float32),
    "control_model.time_embed.0.weight": np.zeros((4, 4), np.float32),
    "denoiser.sigmas": np.ones(10, np.float32),
    "first_stage_model.loss.logvar": np.zeros((), np.float32),
    "lvlb_weights": np.ones(50, np.float32),
}


def test_harmless_arrays_are_left_out_with_a_reason(inpainting, tmp_path):
    arrays, expected = inpainting
    converted = read_model(saved(tmp_path, arrays | EXTRA))
    assert same(converted.params, expected.params)
    whys = {e["source"]: e["why"] for e in converted.left_out}
    assert EXTRA.keys() <= whys.keys()
    assert all(whys[name] for name in EXTRA)
    assert "LoRA" in whys["lora_unet_x.lora_down.weight"]


def test_unexpected_arrays_are_refused_unless_allowed(inpainting, tmp_path):
    arrays, expected = inpainting
    file = saved(tmp_path, arrays | {"model.diffusion_model.extra.weight": np.zeros(2, np.float32)})
    with pytest.raises(ConversionError, match=r"diffusion_model\.extra\.weight"):
        read_model(file)
    converted = read_model(file, allow_unexpected=True)
    assert same(converted.params, expected.params)
    assert "model.diffusion_model.extra.weight" in {e["source"] for e in converted.left_out}


def test_markers_of_the_objective_are_read(inpainting, tmp_path):
    arrays, _ = inpainting
    markers = {name: np.zeros(0, np.float32) for name in ("v_pred", "ztsnr")}
    config = read_model(saved(tmp_path, arrays | markers)).config
    assert (config["objective"], config["schedule"]["zero_terminal_snr"]) == ("v", True)


def test_weights_that_are_not_finite_are_named(inpainting, tmp_path):
    arrays, _ = inpainting
    for i, (name, value) in enumerate(
        [("out.2.weight", np.nan), ("input_blocks.0.0.bias", np.inf)]
    ):
        bad = {n: a.copy() for n, a in arrays.items()}
        bad[UNET + name].reshape(-1)[1] = value
        with pytest.raises(ConversionError, match=name) as caught:
            read_model(saved(tmp_path, bad, f"{i}.safetensors"))
        assert caught.value.not_finite == [UNET + name]
        assert "NaN or infinity" in str(caught.value).splitlines()[0]


def test_missing_parts_are_named_and_taken_from_elsewhere(written, inpainting, tmp_path):
    arrays, expected = inpainting
    vae = {n: a for n, a in arrays.items() if n.startswith("first_stage_model.")}
    text = {n: a for n, a in arrays.items() if n.startswith("cond_stage_model.")}
    rest = {n: a for n, a in arrays.items() if n not in vae}
    lacking = read_model(saved(tmp_path, rest, "no_vae.safetensors"))
    assert lacking.config["first_stage"] == {"kind": MISSING}
    assert "no VAE" in lacking.lacks[0]
    alone = saved(tmp_path, vae, "vae.safetensors")
    assert read_model(alone).config["kind"] == "first_stage"
    whole = read_model(tmp_path / "no_vae.safetensors", vae=alone)
    assert same(whole.params["first_stage"], expected.params["first_stage"])
    assert not whole.lacks
    with pytest.raises(TargetError, match="without a first_stage"):
        replace_parts(lacking.config, lacking.params, vae=tmp_path / "no_vae.safetensors")

    rest = {n: a for n, a in arrays.items() if n not in text}
    lacking = read_model(saved(tmp_path, rest, "no_text.safetensors"))
    assert "no text encoder" in lacking.lacks[0]
    only = {n: a for n, a in arrays.items() if n.startswith(UNET)}
    unet = read_model(saved(tmp_path, only, "unet.safetensors"))
    assert unet.config["kind"] == "unet"
    assert len(unet.lacks) == 2
    assert same(unet.params["unet"], expected.params["unet"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"lora_te_x.lora_down.weight": (4, 8), "lora_te_x.lora_up.weight": (8, 4)}, "a LoRA"),
        ({"unet.down_blocks.0.to_q.lora_A.weight": (4, 8)}, "a LoRA"),
        ({"lora_unet_x.hada_w1_a": (4, 8)}, "a LoRA"),
        ({"clip_l": (2, 8), "clip_g": (2, 16)}, "textual inversion"),
        ({"emb_params": (2, 8)}, "textual inversion"),
        ({"<cat>": (8,)}, "textual inversion"),
        ({"sks": (8,)}, "textual inversion"),
        ({"control_model.zero_convs.0.0.weight": (4, 4, 1, 1)}, "a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (4, 3, 3, 3)}, "a ControlNet"),
        ({"conv_first.weight": (4, 3, 3, 3), "body.0.rdb1.conv1.weight": (4, 4)}, "ESRGAN"),
        ({"model.diffusion_model.double_blocks.0.x": (4,)}, "FLUX"),
        (
            {
                "encoder.conv_in.weight": (4, 3, 3, 3),
                "encoder.down_blocks.0.resnets.0.norm1.weight": (4,),
            },
            "a diffusers folder",
        ),
        ({"down_blocks.0.resnets.0.norm1.weight": (4,)}, "a diffusers folder"),
    ],
)
def test_files_that_are_no_models_are_named(tmp_path, arrays, message):
    file = saved(tmp_path, {n: np.zeros(shape, np.float32) for n, shape in arrays.items()})
    with pytest.raises(TargetError, match=message) as caught:
        read_model(file)
    assert len(str(caught.value).splitlines()) == 1


def test_embeddings_and_hypernetworks_in_pickles_are_named(tmp_path):
    params = hostile.mapping(**{"*": hostile.tensor(shape=(1, 4), strides=(4, 1))})
    tree = {"string_to_param": params, "name": hostile.text("cat")}
    (tmp_path / "cat.pt").write_bytes(hostile.archive(hostile.mapping(**tree)))
    with pytest.raises(TargetError, match="textual inversion"):
        read_model(tmp_path / "cat.pt")
    layer = hostile.mapping(weight=hostile.tensor())
    network = b"}" + hostile.number(320) + b"](" + layer + layer + b"es"
    (tmp_path / "h.pt").write_bytes(hostile.archive(network))
    with pytest.raises(ReaderError, match="hypernetwork"):
        read_model(tmp_path / "h.pt")


def test_two_names_that_become_one_are_an_error(inpainting, tmp_path):
    arrays, _ = inpainting
    name = f"{UNET}out.2.bias"
    with pytest.raises(ConversionError, match="duplicate"):
        read_model(saved(tmp_path, arrays | {f"module.{name}": arrays[name]}))


@pytest.mark.parametrize(
    ("files", "wanted", "expected"),
    [
        (["m.safetensors", "m.fp16.safetensors"], None, ("m.safetensors", "")),
        (["m.safetensors", "m.fp16.safetensors"], "fp16", ("m.fp16.safetensors", "fp16")),
        (["m.fp16.safetensors"], None, ("m.fp16.safetensors", "fp16")),
        (["m.fp16.safetensors", "m.bin"], None, ("m.bin", "")),
        (
            ["m.non_ema.safetensors", "m.safetensors"],
            "non_ema",
            ("m.non_ema.safetensors", "non_ema"),
        ),
        (
            ["m.safetensors.index.fp16.json", "m.fp16-00001-of-00002.safetensors"],
            None,
            ("m.safetensors.index.fp16.json", "fp16"),
        ),
        (
            ["m.safetensors.index.json", "m-00001-of-00001.safetensors", "m.fp16.safetensors"],
            None,
            ("m.safetensors.index.json", ""),
        ),
        (["v1-5.pruned.ckpt"], None, ("v1-5.pruned.ckpt", "pruned")),
    ],
)
def test_variants_of_a_folder(tmp_path, files, wanted, expected):
    from ldm_jax.convert.reader.reader import _inside

    for file in files:
        (tmp_path / file).write_bytes(b"")
    path, variant = _inside(tmp_path, wanted)
    assert (path.name, variant) == expected
    with pytest.raises(ReaderError, match="no variant 'int8'"):
        _inside(tmp_path, "int8")
