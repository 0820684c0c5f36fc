"""The tables against every published configuration: each array's name and shape, without allocating one."""

import gzip
import json
from typing import Any

import pytest

from ldm_jax.convert.compvis import param_shapes, table_of
from ldm_jax.convert.tables import source_shapes
from ldm_jax.convert.targets import TARGETS, module_from_config

from .golden import golden_folder

FILE = golden_folder() / "architectures.json.gz"
# Parts of a LatentDiffusion: the section of its configuration, and the prefix of its arrays.
PARTS = {
    "unet_config": "model.diffusion_model.",
    "first_stage_config": "first_stage_model.",
    "cond_stage_config": "cond_stage_model.",
}
# What the BERT embedders put between their prefix and the network.
INNER = {"ldm.modules.encoders.modules.BERTEmbedder": "transformer."}


def networks() -> list[Any]:
    """(module, prefix, arrays by name) of every part that there is a module for, each module once."""
    found: dict[Any, Any] = {}
    for name, spec in json.loads(gzip.decompress(FILE.read_bytes())).items() if FILE.is_file() else ():
        parts = {prefix: spec["params"][part] for part, prefix in PARTS.items() if part in spec["params"]} or {"": spec}
        for prefix, config in parts.items():
            arrays = {n: tuple(shape) for n, shape in spec["state_dict"].items() if n.startswith(prefix)}
            if isinstance(config, dict) and config["target"] in TARGETS and arrays:
                module = module_from_config(config["target"], config.get("params"))
                test_id = f"{name.removesuffix('/config.yaml').removesuffix('.yaml')}-{prefix.rstrip('.')}"
                found.setdefault(
                    module, pytest.param(module, prefix + INNER.get(config["target"], ""), arrays, id=test_id)
                )
    return list(found.values())


@pytest.mark.parametrize(("module", "prefix", "arrays"), networks())
def test_table_names_every_array(module: Any, prefix: str, arrays: dict[str, tuple[int, ...]]) -> None:
    assert source_shapes(table_of(module, prefix), param_shapes(module)) == arrays
