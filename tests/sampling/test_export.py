"""The exported program, run without ldm_jax as in docs/exporting.md, and refused options."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL, TINY, pipeline_of
from jax import export as jax_export
from PIL import Image
from safetensors.numpy import load_file

from ldm_jax.cli.export import main
from ldm_jax.conditioning.text import BertText
from ldm_jax.conditioning.tokenizers import clip_tokenizer
from ldm_jax.errors import RequestError
from ldm_jax.io.checkpoint import save_model
from ldm_jax.sampling.export import export, parameters

pytestmark = pytest.mark.compile

README = (ROOT / "docs" / "exporting.md").read_text(encoding="utf-8")
LINES = re.search(r"<!-- export-lines -->\n```python\n(.*?)```", README, re.DOTALL)[1]
PROMPTS = '["red apple, noto style", "rocket, twemoji style"]'


@pytest.fixture(scope="module")
def exported(tiny_dir, tmp_path_factory):
    """The exported tiny model, where the code in docs/exporting.md finds it."""
    out = tmp_path_factory.mktemp("export") / "emoji_export"
    assert main([str(tiny_dir), "--out", str(out), "--steps", "3", "--cache_interval", "2"]) == 0
    return out


def written(tmp_path, config):
    """A model directory of random parameters."""
    pipe, path = pipeline_of(config), tmp_path / "model"
    save_model(path, config, jax.tree.map(np.asarray, parameters(pipe)))
    return pipe, path


@pytest.mark.processes
def test_the_ten_lines_of_the_readme_make_the_pipelines_pictures_without_this_package(
    exported, pipe, tmp_path
):
    prompts = ["red apple", "blue boat", "x" * 40]
    lines = [line for line in LINES.splitlines() if line.strip()]
    assert len(lines) == 10
    assert PROMPTS in LINES
    (tmp_path / "emoji_export").symlink_to(exported)
    (tmp_path / "ldm_jax.py").write_text("raise ImportError('the model code is not to be used')\n")
    (tmp_path / "run.py").write_text(LINES.replace(PROMPTS, repr(prompts)))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    made = np.stack([np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(len(prompts))])
    expected = pipe(prompts, seeds=range(len(prompts)), guidance=4.0, steps=3, cache_interval=2)
    assert np.abs(made.astype(int) - expected).max() <= 1
    assert expected.std() > 10


@pytest.mark.processes
def test_the_lines_cannot_import_the_package(tmp_path):
    (tmp_path / "ldm_jax.py").write_text("raise ImportError('the model code is not to be used')\n")
    (tmp_path / "run.py").write_text("import ldm_jax\n")
    assert (
        subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True).returncode
        == 1
    )


def test_it_is_lowered_for_three_platforms_with_a_signature(exported, tiny_dir):
    program = jax_export.deserialize(bytearray((exported / "program.jax").read_bytes()))
    signature = json.loads((exported / "signature.json").read_text())
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    assert str(program.out_avals[0].shape) == "(b, 16, 16, 3)"
    assert signature["inputs"]["tokens"] == {"shape": ["b", 12], "dtype": "int32"}
    assert signature["inputs"]["guidance"] == {"shape": ["b"], "dtype": "float32", "default": 3.0}
    assert signature["outputs"] == {"images": {"shape": ["b", 16, 16, 3], "dtype": "uint8"}}
    assert (signature["settings"]["steps"], signature["settings"]["cache_interval"]) == (3, 2)
    weights = load_file(exported / "weights.safetensors")
    # The weights are not in the program.
    assert (exported / "program.jax").stat().st_size < sum(a.nbytes for a in weights.values())


@pytest.mark.parametrize("text", ["bert", "clip"])
def test_the_exported_tokenizer_gives_the_same_ids(text):
    from tokenizers import Tokenizer

    from ldm_jax.models.build import build_conditioner

    tiny_clip = {
        "kind": "clip",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    conditioner = (
        build_conditioner({"conditioner": tiny_clip})
        if text == "clip"
        else BertText.from_config(dim=16, depth=1, max_seq_len=12)
    )
    tokenizer = Tokenizer.from_str(conditioner.tokenizer_json())
    captions = [
        "",
        "red apple, noto style",
        "Ünïcödé 東京 \u200d 🚀",
        "one two three four five " * 20,
    ]
    ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(captions)])
    assert (ids == conditioner.encode(captions)).all()
    assert clip_tokenizer().backend_tokenizer.padding is None  # the model's own is left as it was


@pytest.mark.parametrize("kind", ["class", "none", "embeddings"])
def test_other_conditions_are_exported_too(tmp_path, kind):
    conditioner = {
        "class": {"kind": "class", "embed_dim": 16, "n_classes": 5},
        "none": {"kind": "none"},
        "embeddings": {"kind": "embeddings", "dim": 16, "count": 2},
    }[kind]
    unet = {**SMALL["unet"], "use_spatial_transformer": kind != "none"}
    unet |= {"context_dim": None} if kind == "none" else {"attention_resolutions": [1]}
    pipe, path = written(tmp_path, {**SMALL, "conditioner": conditioner, "unet": unet})
    out = export(path, tmp_path / "out", steps=2)
    program = jax_export.deserialize(bytearray((out / "program.jax").read_bytes()))
    vectors = np.random.default_rng(0).standard_normal((2, 2, 16)).astype(np.float32)
    given, options = {
        "class": (
            {"classes": np.int32([3, 1]), "null_classes": np.int32([4, 4])},
            {"classes": [3, 1]},
        ),
        "none": ({}, {}),
        "embeddings": (
            {"embeddings": vectors, "null_embeddings": 0 * vectors},
            {"embeddings": list(vectors)},
        ),
    }[kind]
    guidance = {} if kind == "none" else {"guidance": np.float32([2, 3])}
    weights, seeds = load_file(out / "weights.safetensors"), np.uint32([7, 8])
    made = np.asarray(jax.jit(program.call)(weights, seeds=seeds, **given, **guidance))
    expected = pipe(
        seeds=[7, 8], steps=2, **options, **({"guidance": [2.0, 3.0]} if guidance else {})
    )
    assert np.abs(made.astype(int) - expected).max() <= 1
    assert set(json.loads((out / "signature.json").read_text())["inputs"]) == {
        "seeds",
        *given,
        *guidance,
    }
    assert not (out / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{model}", "--steps", "0"], "steps must be from 1 to 100, not 0"),
        (["{model}", "--size", "16x18"], "size 16x18: height and width must be multiples of 4"),
        (["{model}", "--size", "16"], "write HEIGHTxWIDTH, for example 64x96"),
        (["{model}", "--sampler", "dimm"], "sampler 'dimm' does not exist; did you mean 'ddim'?"),
        (["{model}", "--cache_interval", "0"], "cache_interval must be at least 1"),
        (["nowhere"], "model 'nowhere' is neither a path nor a model that ships with ldm_jax"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tiny_dir, tmp_path, capsys, argv, message):
    out = tmp_path / "out"
    assert main([*(arg.format(model=tiny_dir) for arg in argv), "--out", str(out)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last
    assert message in last
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tiny_dir, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("kept")
    assert main([str(tiny_dir), "--out", str(tmp_path)]) == 2
    assert "is not empty; give a new folder or remove it first" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_model_of_pictures_is_refused(tmp_path):
    unet = {
        **SMALL["unet"],
        "in_channels": 7,
        "use_spatial_transformer": False,
        "context_dim": None,
    }
    config = {
        **TINY,
        **SMALL,
        "conditioner": {"kind": "joined", "channels": 3, "size": [8, 8]},
        "unet": unet,
    }
    _, path = written(tmp_path, config)
    with pytest.raises(
        RequestError,
        match="conditioned on image: only models of text, classes, embeddings or nothing",
    ):
        export(path, tmp_path / "out")


def test_a_missing_flatbuffers_is_named(tiny_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert main([str(tiny_dir), "--out", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err
        == 'error: exporting needs flatbuffers: pip install "ldm_jax[export]"\n'
    )
