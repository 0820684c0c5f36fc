"""Every published name of kohya's LoRA files and of ControlNets finds its parameter."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.original import fields_of
from ldm_jax.convert.compvis.targets import module_from_config
from ldm_jax.convert.diffusers.tables import TABLES
from ldm_jax.convert.lora.merge import _network, _targets
from ldm_jax.convert.tables import Entry, flatten, source_shapes
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.controlnet import ControlNet
from ldm_jax.models.unet import UNet

from .golden import REPO

FOLDER = Path(os.environ.get("LDM_JAX_GOLDEN2", REPO.parent / "shared" / "golden2"))
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not (FOLDER / "manifest.json").is_file(), reason="LDM_JAX_GOLDEN2 names no reference data"
    ),
]


def architectures() -> dict:
    if not (FOLDER / "architectures2.json.gz").is_file():
        return {}
    with gzip.open(FOLDER / "architectures2.json.gz", "rt") as file:
        return json.load(file)


def places(table) -> dict:
    return {(e.path, e.part): e.source for e in table if isinstance(e, Entry)}


@pytest.mark.parametrize("name", [n for n in architectures() if "control_stage_config" in n])
def test_every_name_and_shape_of_a_controlnet(name):
    listed = architectures()[name]
    net = module_from_config(listed["target"], listed["params"])
    shapes = param_shapes(net)
    found = source_shapes(table_of(net), shapes, name)
    assert found == {n: tuple(shape) for n, shape in listed["state_dict"].items()}
    theirs = source_shapes(TABLES[ControlNet](net), shapes, name)
    assert len(theirs) == len(found)


def test_diffusers_names_of_a_controlnet():
    case = json.loads((FOLDER / "manifest.json").read_text())["cases"]["ckpt_controlnet"]
    stage = case["kwargs"]["control_stage_config"]
    net = module_from_config(stage["target"], stage["params"])
    ours, theirs = places(table_of(net)), places(TABLES[ControlNet](net))
    assert {theirs[path]: ours[path] for path in ours} == case["diffusers_names"]


def test_kohya_names_of_stable_diffusion_v1():
    (names,) = (a["names"] for n, a in architectures().items() if "kohya LoRA names, SD1.5" in n)
    unet = UNet(
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=2,
        attention_resolutions=(4, 2, 1),
        channel_mult=(1, 2, 4, 4),
        num_heads=8,
        use_spatial_transformer=True,
        context_dim=768,
        legacy=False,
    )
    tower = CLIPText()
    config = {"unet": fields_of(unet), "conditioner": {"kind": "clip"}}
    params = {"unet": param_shapes(unet), "conditioner": param_shapes(tower)}
    targets, shapes = _targets(config, params), flatten(params)
    sources = {("unet", *path): source for (path, _), source in places(table_of(unet)).items()} | {
        ("conditioner", *path): source for (path, _), source in places(table_of(tower)).items()
    }
    for name, (down, up, key) in names.items():
        network, rest = _network(name)
        path, entry = targets[network][rest]
        assert sources[path] == key, name
        shape = entry.op.to_theirs(np.broadcast_to(np.float32(0), shapes[path].shape)).shape
        assert (shape[0], shape[1]) == (up[0], down[1]), name
