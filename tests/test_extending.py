"""The examples of docs/extending.md run and work."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import KL, SMALL, pipeline_of, random_params
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from ldm_jax.conditioning import CONDITIONERS
from ldm_jax.configs.common import base
from ldm_jax.convert.compvis.networks import param_shapes
from ldm_jax.convert.conversion import FORMATS, convert
from ldm_jax.convert.tables import flatten, to_theirs
from ldm_jax.data import SOURCES
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import ConversionError, DataError
from ldm_jax.io.checkpoint import load_model
from ldm_jax.models.build import build_first_stage
from ldm_jax.train import loop
from ldm_jax.train.tasks import TASKS

pytestmark = pytest.mark.compile

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text("utf-8")
REGISTRIES = (SAMPLERS, CONDITIONERS, SOURCES, FORMATS, TASKS)
PIXELS = {
    **SMALL,
    "first_stage": {"kind": "identity"},
    "unet": {**SMALL["unet"], "in_channels": 3, "out_channels": 3},
    "sampling": {"size": [8, 8], "steps": 2},
}


@pytest.fixture
def block(tmp_path, monkeypatch):
    """Runs the only block under a heading, and returns its names."""
    monkeypatch.chdir(tmp_path)
    before = [dict(registry) for registry in REGISTRIES]

    def run(heading):
        section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
        (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        names = {"__name__": "extending"}
        exec(compile(code, f"extending.md, {heading}", "exec"), names)
        return names

    yield run
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.fast
def test_every_section_of_the_table_has_one_block():
    listed = re.findall(r"^\| \[(.*?)\]", PAGE, re.MULTILINE)
    assert [f"A{name[1:]}" for name in listed] == re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert PAGE.count("```python\n") == len(listed) == 5


@pytest.mark.fast
def test_the_sampler_has_its_order(block):
    names = block("A sampler")
    assert SAMPLERS["ab2"].order == 2
    assert 3.2 < names["ratio"] < 5
    assert names["error"](40) < 1e-2


def test_the_condition_is_read_and_changes_pictures(block):
    names = block("A condition")
    assert names["cond"].crossattn.shape == (2, 1, 16)
    row = CONDITIONERS["score"].row_condition({}, {"column": "score"}, tuple)
    assert row({"score": 0.25}, None, None, None) == np.float32(0.25)
    pipe = pipeline_of({**PIXELS, "conditioner": {"kind": "score", "dim": 16}})
    first, second = pipe(condition=[0.1, 0.9], seeds=[0, 0])
    assert first.shape == (8, 8, 3)
    assert (first != second).any()


@pytest.mark.fast
def test_the_source_is_read_and_selected(block):
    names = block("A data source")
    batch, pictures = names["batch"], names["pictures"]
    assert batch["caption"] == ["b", "d"]
    assert batch["image"].shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(names["source"][1]["image"], pictures[3])
    with pytest.raises(DataError, match=r"give an \.npz with image and caption"):
        SOURCES["arrays"]("pictures.npz", captions="caption")


@pytest.mark.fast
def test_the_family_is_converted_and_its_table_is_total(block):
    names = block("A checkpoint family")
    module = build_first_stage({"first_stage": KL})
    params = random_params(param_shapes(module), 0)
    arrays = to_theirs(names["slashed_table"](module), params)
    assert "vae/encoder/conv_in/weight" in arrays
    about = {"vae": json.dumps(KL)}
    save_file(arrays, "one.slashed.safetensors", metadata=about)
    convert("one.slashed.safetensors", "model")
    config, found = load_model("model")
    assert config["first_stage"] == KL
    expected = flatten(params)
    assert expected.keys() == flatten(found["first_stage"]).keys()
    for path, array in flatten(found["first_stage"]).items():
        np.testing.assert_array_equal(array, expected[path])
    arrays["vae/encoder/conv_im/weight"] = arrays.pop("vae/encoder/conv_in/weight")
    save_file(arrays, "two.slashed.safetensors", metadata=about)
    with pytest.raises(ConversionError, match="conv_in/weight"):
        convert("two.slashed.safetensors", "other")


def test_the_task_trains_previews_and_exports(block, tmp_path, monkeypatch):
    block("A training task")
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
    config = base("denoise")
    config.update(steps=2, batch_size=4, save_every=2, eval_every=2, preview_every=2)
    config.eval_batches = 1
    config.data.update(path="pkg:assets/emoji_subset.zip", size=(8, 8))
    unet = {**PIXELS["unet"], "use_spatial_transformer": False, "context_dim": None}
    config.model.update(objective="eps", schedule=ConfigDict(SMALL["schedule"]))
    for name, fields in {
        "unet": unet,
        "first_stage": {"kind": "identity"},
        "conditioner": {"kind": "none"},
        "sampling": PIXELS["sampling"],
    }.items():
        config.model[name] = ConfigDict(fields)
    model = loop.train(config, tmp_path / "run")
    assert (tmp_path / "run/previews/0000002.png").is_file()
    _, params = load_model(model)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
