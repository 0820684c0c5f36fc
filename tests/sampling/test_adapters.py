"""Adapters at sampling: LoRA files, ControlNets, and prompts with weights."""

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.conversion import read_any
from ldm_jax.convert.diffusers.tables import TABLES
from ldm_jax.convert.merging import merge
from ldm_jax.convert.tables import to_theirs
from ldm_jax.errors import CheckpointError, RequestError
from ldm_jax.io import png
from ldm_jax.models.controlnet import ControlNet
from ldm_jax.models.unet import FIELDS
from ldm_jax.sampling.hints import edges
from ldm_jax.sampling.pipeline import load

LAYER = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    """A kohya LoRA of one layer, whose context has 16 channels."""
    rng = np.random.default_rng(0)
    arrays = {
        f"lora_unet_{LAYER}.lora_up.weight": rng.normal(size=(64, 2)),
        f"lora_unet_{LAYER}.lora_down.weight": rng.normal(size=(2, 16)),
        f"lora_unet_{LAYER}.alpha": np.float32(4),
    }
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file({name: np.asarray(a, np.float32) for name, a in arrays.items()}, file)
    return file


def test_strengths_share_one_program(pipe, tiny_dir, lora_file, compilations, tmp_path):
    base = pipe("red apple", seeds=3)
    before = len(compilations)
    strong = pipe.with_lora(f"{lora_file}:0.5")
    pictures = strong("red apple", seeds=3)
    twice = pipe.with_lora((lora_file, 0.25), (lora_file, 0.25))("red apple", seeds=3)
    without = pipe.with_lora((lora_file, 0.0))("red apple", seeds=3)
    assert len(compilations) == before
    assert (without == base).all()
    assert np.abs(pictures.astype(int) - base).max() > 3
    assert np.abs(twice.astype(int) - pictures).max() <= 1
    assert (pipe("red apple", seeds=3) == base).all()
    assert strong.name != pipe.name

    merge([tiny_dir], tmp_path / "merged", loras=[f"{lora_file}:0.5"])
    loaded = load(tiny_dir, devices=1, lora=[f"{lora_file}:0.5"])
    _, merged = read_any(tmp_path / "merged")
    for part in ("unet", "conditioner"):
        found = loaded.model.params[part]
        assert np.array_equal(
            np.concatenate([np.ravel(a) for a in _leaves(found)]),
            np.concatenate([np.ravel(a) for a in _leaves(merged[part])]),
        )


def _leaves(tree):
    return [leaf for _, leaf in sorted(_walk(tree))]


def _walk(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _walk(value, (*path, key))
        else:
            yield (*path, key), np.asarray(value)


def test_a_lora_that_does_not_fit_is_one_line(pipe, lora_file, tmp_path):
    odd = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": np.zeros((4, 4), "f4")}
    save_file(odd, tmp_path / "odd.safetensors")
    cases = {
        str(tmp_path / "none.safetensors"): "none.safetensors",
        f"{lora_file}:0,1": "one strength",
        str(tmp_path / "odd.safetensors"): "another base model",
    }
    for file, message in cases.items():
        with pytest.raises(CheckpointError, match=message) as error:
            pipe.with_lora(file)
        assert "\n" not in str(error.value)


def test_a_sweep_of_strengths_is_a_labelled_grid(script, tiny_dir, lora_file, tmp_path):
    out, common = tmp_path / "out", ["--prompt=red apple", "--num=1", "--seed=3", "--batch=1"]
    ran = script(
        "sample.py", f"--model={tiny_dir}", f"--lora={lora_file}:0,0.5", f"--out={out}", *common
    )
    assert ran.status == 0, ran.stderr
    grid, *files = sorted(out.glob("*.png"))
    assert "grid" in grid.name
    kept = [png.read_settings(file)["lora"] for file in files]
    assert kept == [[f"{lora_file}:0"], [f"{lora_file}:0.5"]]
    again = script("sample.py", f"--replay={files[1]}", f"--out={tmp_path / 'again'}")
    assert again.status == 0, again.stderr
    (picture,) = sorted((tmp_path / "again").glob("*.png"))
    assert (np.asarray(Image.open(picture)) == np.asarray(Image.open(files[1]))).all()


# ------------------------------------------------------------------------------------- ControlNet


def write_controlnet(unet, folder, seed, layout="control_model."):
    """A ControlNet of random weights that fits ``unet``, under the names of a layout."""
    net = ControlNet(**{name: getattr(unet, name) for name in FIELDS})
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda s: rng.normal(size=s.shape, scale=0.1).astype(np.float32), param_shapes(net)
    )
    table = TABLES[ControlNet](net) if layout == "diffusers" else table_of(net, layout)
    file = folder / f"control{seed}.safetensors"
    save_file(to_theirs(table, params), file)
    return file


@pytest.fixture(scope="module")
def control_files(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    unet = pipe.model.unet
    return [
        write_controlnet(unet, folder, 0),
        write_controlnet(unet, folder, 1, "diffusers"),
        write_controlnet(unet, folder, 2, ""),
    ]


@pytest.fixture(scope="module")
def hint():
    return np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)


def test_hints_change_pictures_by_their_scale(pipe, control_files, hint):
    base = pipe("red apple", seeds=[3]).astype(int)
    one = pipe.with_control(control_files[0])
    full = one("red apple", seeds=[3], control_image=hint)
    without = one("red apple", seeds=[3], control_image=hint, control_scale=0)
    assert np.abs(without - base).max() <= 1
    assert np.abs(full - base).max() > 3
    other = one("red apple", seeds=[3], control_image=255 - hint)
    assert np.abs(other.astype(int) - full).max() > 0
    both = pipe.with_control(*control_files[:2])
    first = both("red apple", seeds=[3], control_image=[hint, hint], control_scale=[1, 0])
    assert np.abs(first.astype(int) - full).max() <= 1
    cached = one("red apple", seeds=[3], control_image=hint, cache_interval=2)
    assert cached.shape == full.shape
    assert (pipe("red apple", seeds=[3]) == base).all()


def test_all_layouts_are_one_network(pipe, control_files):
    nets = [pipe.with_control(file).model for file in control_files]
    assert len({model.controls for model in nets}) == 1
    shapes = [jax.tree.map(np.shape, model.params["controls"]["0"]) for model in nets]
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_request_and_its_controlnets_must_fit(pipe, control_files, hint, lora_file, tmp_path):
    one = pipe.with_control(control_files[0])
    with pytest.raises(RequestError, match="1 control images for 0 ControlNets"):
        pipe("x", control_image=hint)
    with pytest.raises(RequestError, match="0 control images for 1 ControlNets"):
        one("x")
    with pytest.raises(RequestError, match="2 control scales for 1"):
        one("x", control_image=hint, control_scale=[1, 2])
    with pytest.raises(RequestError, match="lower and the upper"):
        one("x", control_image=hint, control_edges=[2, 1])
    with pytest.raises(RequestError, match="needs a ControlNet"):
        pipe("x", control_scale=0.5)
    wide = pipe.model.unet.clone(context_dim=24)
    bad = {
        write_controlnet(wide, tmp_path, 7): "another base model",
        lora_file: "no ControlNet",
        tmp_path / "none.safetensors": "none.safetensors",
    }
    for file, message in bad.items():
        with pytest.raises(CheckpointError, match=message) as error:
            pipe.with_control(file)
        assert "\n" not in str(error.value)


@pytest.mark.fast
def test_edges_are_thin_connected_lines():
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:, 15:] = 200
    found = edges(picture, 100, 200)
    assert set(np.unique(found)) == {0, 255}
    assert (found[:, :, 0].sum(1) == 255).all()  # one pixel in each row
    assert np.abs(np.argmax(found[:, :, 0], axis=1) - 14.5).max() == 0.5
    # A weak part is kept where it touches a strong one, and only there.
    picture[:10, 15:] = 40
    weak, strong = (edges(picture, low, 400)[5, 10:20].any() for low in (100, 300))
    assert (weak, strong) == (True, False)
    assert not edges(np.full((9, 9, 3), 90, np.uint8), 10, 20).any()


def test_a_picture_of_several_hints_is_made_again(script, tiny_dir, control_files, hint, tmp_path):
    for i in range(2):
        Image.fromarray(np.roll(hint, i, 0)).save(tmp_path / f"hint{i}.png")
    out = tmp_path / "out"
    flags = [f"--control={file}" for file in control_files[:2]]
    flags += [f"--control_image={tmp_path / f'hint{i}.png'}" for i in range(2)]
    flags += ["--control_scale=1,0.5", "--control_edges=50,100", "--num=1", "--batch=1"]
    ran = script("sample.py", f"--model={tiny_dir}", "--prompt=x", f"--out={out}", *flags)
    assert ran.status == 0, ran.stderr
    (file,) = out.glob("*.png")
    kept = png.read_settings(file)
    assert kept["control_image"] == [str(tmp_path / f"hint{i}.png") for i in range(2)]
    assert kept["control_scale"] == [1.0, 0.5]
    again = script("sample.py", f"--replay={file}", f"--out={tmp_path / 'again'}")
    assert again.status == 0, again.stderr
    (picture,) = (tmp_path / "again").glob("*.png")
    assert (np.asarray(Image.open(picture)) == np.asarray(Image.open(file))).all()
    (tmp_path / "hint1.png").unlink()
    gone = script("sample.py", f"--replay={file}", f"--out={tmp_path / 'again'}")
    assert gone.status == 2
    assert "hint1.png, which is missing" in gone.stderr


# ---------------------------------------------------------------------------------------- prompts


def test_weights_and_long_prompts_reach_the_pictures(pipe, tiny_dir):
    weighted = load(tiny_dir, devices=1, prompt_weights=True)
    same = weighted("red apple", seeds=[3])
    assert np.abs(same.astype(int) - pipe("red apple", seeds=[3])).max() <= 1
    heavy = weighted("(red:3) apple", seeds=[3])
    assert np.abs(heavy.astype(int) - same).max() > 0
    long = weighted(["red " * 30, "red apple"], negative="blue", seeds=[3, 4])
    assert long.shape[0] == 2
    with pytest.raises(RequestError, match="clip_skip needs"):
        load(tiny_dir, devices=1, clip_skip=2)
