"""The conversion tables match the names and shapes of every published configuration."""

import functools
import gzip
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ldm_jax.convert.compvis import whole
from ldm_jax.convert.compvis.infer import Original, infer
from ldm_jax.convert.compvis.networks import table_of
from ldm_jax.convert.compvis.original import conditioning_key, config_of, fields_of, original_of
from ldm_jax.convert.compvis.targets import module_from_config
from ldm_jax.convert.tables import Duplicate, Entry, flatten, source_shapes
from ldm_jax.models.build import build, build_first_stage
from ldm_jax.models.unet import layout

from .golden import golden_folder

pytestmark = pytest.mark.parity

FILE = golden_folder() / "architectures.json.gz"


@functools.cache
def architectures() -> dict[str, Any]:
    return json.loads(gzip.decompress(FILE.read_bytes())) if FILE.is_file() else {}


@pytest.fixture(autouse=True, scope="module")
def traced_once() -> Iterator[None]:
    """Several architectures share a network, and tracing one takes a second."""
    patch = pytest.MonkeyPatch()
    patch.setattr(whole, "param_shapes", functools.cache(whole.param_shapes))
    yield
    patch.undo()


@pytest.mark.parametrize("name", architectures())
def test_every_array_is_one_parameter(name: str) -> None:
    spec = architectures()[name]
    # The list leaves out schedule, averages, losses and duplicates of the first stage.
    options = {"buffers": False} if "unet_config" in spec["params"] else {}
    model = whole.whole_from_config(spec["target"], spec["params"], losses=False, **options)
    table = [entry for entry in model.table if not isinstance(entry, Duplicate)]
    listed = {array: tuple(shape) for array, shape in spec["state_dict"].items()}
    # source_shapes also raises unless each path occurs once.
    assert source_shapes(table, model.shapes, name) == listed
    used = [entry for entry in table if isinstance(entry, Entry)]
    assert {entry.path for entry in used} == set(flatten(model.shapes))
    assert ("duplicates" in spec.get("cond_stage_keys", "")) == (len(table) < len(model.table))


def modules(target: str, params: dict[str, Any]) -> dict[str, Any]:
    """The networks of a configuration, by part; nothing is traced."""
    if "unet_config" not in params:
        return {"first_stage": module_from_config(target, params)}
    sections = {part: params[f"{part}_config"] for part in ("unet", "first_stage", "cond_stage")}
    return {
        part: module_from_config(section["target"], section.get("params"))
        for part, section in sections.items()
        if isinstance(section, dict) and section["target"] not in whole.IDENTITIES
    }


@pytest.mark.parametrize("name", architectures())
def test_names_and_shapes_determine_the_architecture(name: str) -> None:
    spec = architectures()[name]
    arrays = {
        array: np.broadcast_to(np.float32(0), shape) for array, shape in spec["state_dict"].items()
    }
    found = infer(arrays)
    ours, theirs = modules(found.target, found.params), modules(spec["target"], spec["params"])
    assert ours.keys() == theirs.keys()
    if "unet" in ours:
        # Includes the number of heads, which shapes do not show.
        assert layout(ours["unet"]) == layout(theirs["unet"])
    names = [
        [(entry.source, type(entry)) for entry in table_of(net["first_stage"])]
        for net in (ours, theirs)
    ]
    assert names[0] == names[1]
    assert ours.get("cond_stage") == theirs.get("cond_stage")


@pytest.mark.parametrize("name", architectures())
def test_our_config_is_equivalent_and_converts_back(name: str) -> None:
    spec = architectures()[name]
    theirs = modules(spec["target"], spec["params"])
    parts = {
        "conditioner" if part == "cond_stage" else part: module for part, module in theirs.items()
    }
    config = json.loads(json.dumps(config_of(Original(spec["target"], spec["params"]), parts)))
    back = original_of(config)
    assert back.target == spec["target"]
    again = modules(back.target, back.params)
    assert again.keys() == theirs.keys()
    if "unet" in theirs:
        model = build(config, None, None)
        assert layout(model.unet) == layout(theirs["unet"]) == layout(again["unet"])
        fields = [
            fields_of(net)
            for net in (model.first_stage.module, theirs["first_stage"], again["first_stage"])
        ]
        assert fields[0] == fields[1] == fields[2]
        assert (
            getattr(model.conditioner, "module", None)
            == theirs.get("cond_stage")
            == again.get("cond_stage")
        )
        section, lost = back.params["cond_stage_config"], spec["params"].get("cond_stage_config")
        assert section == lost or section["target"] == lost["target"]
        assert conditioning_key(back.params) == conditioning_key(spec["params"])
    else:
        assert fields_of(build_first_stage(config)) == fields_of(theirs["first_stage"])


def test_all_architectures_are_there() -> None:
    assert len(architectures()) == 39
