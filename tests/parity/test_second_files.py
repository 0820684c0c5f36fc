"""Files of Stable Diffusion 2.x and SDXL against the second set of reference data."""

import gzip
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm_jax.convert.compvis.infer import Original
from ldm_jax.convert.compvis.reading import from_compvis
from ldm_jax.convert.compvis.whole import Whole
from ldm_jax.convert.compvis.writing import to_compvis
from ldm_jax.convert.originals import config_of, infer, original_of, whole_from_config
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Unused, source_shapes
from ldm_jax.convert.verify import outputs_of
from ldm_jax.models.unet import layout

from .golden import REPO

FOLDER = Path(os.environ.get("LDM_JAX_GOLDEN2", REPO.parent / "shared" / "golden2"))
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not (FOLDER / "manifest.json").is_file(), reason="LDM_JAX_GOLDEN2 names no reference data"
    ),
]
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def architectures() -> dict:
    if not (FOLDER / "architectures2.json.gz").is_file():
        return {}
    with gzip.open(FOLDER / "architectures2.json.gz", "rt") as file:
        return json.load(file)


WHOLE = [n for n, listed in architectures().items() if "ddpm" in str(listed.get("target"))]
ENGINES = [n for n, listed in architectures().items() if "engine" in n.lower() or "SDXL" in n]
ENGINES = [n for n in ENGINES if "target" in architectures()[n]]


@pytest.mark.parametrize("name", [*WHOLE, *ENGINES])
def test_every_name_and_shape_of_a_released_model(name):
    listed = architectures()[name]
    alone = listed["target"].endswith("AutoencoderKL")
    options: dict = {"losses": False} | ({} if alone else {"buffers": False})
    whole = whole_from_config(listed["target"], listed["params"], **options)
    found = source_shapes(whole.table, whole.shapes, name)
    names = {n: tuple(s) for n, s in listed["state_dict"].items() if not n.startswith("depth_mo")}
    assert found == names
    shapes = {n: np.broadcast_to(np.float32(0), s) for n, s in names.items()}
    schedule = {n: np.asarray(a) for n, a in low_scale(whole).items() if n in shapes}
    inferred = infer(shapes | schedule)
    again = whole_from_config(inferred.target, inferred.params, **options)
    assert source_shapes(again.table, again.shapes, name) == found
    for part, module in whole.modules.items():
        if part == "unet":
            other = again.modules[part]
            assert layout(other) == layout(module)
            assert other.num_classes == module.num_classes
        elif part == "conditioner":
            assert again.modules[part] == module
    if alone:
        return
    described = config_of(Original(listed["target"], listed["params"]), whole.modules)
    config = json.loads(json.dumps(described))
    back = original_of(config)
    assert back.target == listed["target"]
    third = whole_from_config(back.target, back.params, **options)
    assert source_shapes(third.table, third.shapes, name) == found


def low_scale(whole: Whole) -> dict[str, np.ndarray]:
    return {e.source: e.value() for e in whole.table if isinstance(e, Unused) and e.fixed}


def test_a_checkpoint_of_sd2_computes_what_the_original_does(tmp_path):
    spec = json.loads((FOLDER / "manifest.json").read_text())["cases"]["ckpt_sd2"]
    kwargs = {n: v for n, v in spec["kwargs"].items() if not n.startswith("_")}
    kwargs["cond_stage_config"]["params"] |= TOWER
    config = Original("ldm.models.diffusion.ddpm.LatentDiffusion", kwargs)
    converted = from_compvis(FOLDER / "ckpt_sd2.ckpt", config=config)
    assert converted.config["conditioner"]["pad_token_id"] == 0
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), converted.params)
    arrays = load_file(FOLDER / "ckpt_sd2.safetensors")
    given = {name: arrays[f"in/{name}"] for name in ("tokens", "uncond_tokens", "x", "t")}
    with jax.default_matmul_precision("highest"):
        results = outputs_of(converted.config, params, given)
    for name in ("c", "uc", "apply_model"):
        atol, expected = spec["atol"][name], arrays[f"out/{name}"]
        np.testing.assert_allclose(
            np.broadcast_to(results[name], expected.shape),
            expected,
            rtol=spec["rtol"],
            atol=atol,
            err_msg=name,
        )

    # There and back: every parameter to the bit, and names that the original loads.
    to_compvis(converted.config, converted.params, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    with open_checkpoint(FOLDER / "ckpt_sd2.ckpt") as checkpoint:
        kept = {entry["source"] for entry in converted.entries}
        for name in kept:
            assert np.array_equal(back[name], checkpoint.tensors[name].numpy()), name
        assert checkpoint.tensors.keys() - back.keys() <= {"model_ema.decay"}
