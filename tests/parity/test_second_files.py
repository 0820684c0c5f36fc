"""Files of Stable Diffusion 2.x and SDXL against the second set of reference data."""

import gzip
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ldm_jax.convert.compvis.infer import Original, infer
from ldm_jax.convert.compvis.names import UNET
from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.reading import from_compvis
from ldm_jax.convert.compvis.targets import module_from_config
from ldm_jax.convert.compvis.whole import whole_from_config
from ldm_jax.convert.compvis.writing import to_compvis
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import source_shapes
from ldm_jax.convert.verify import outputs_of

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


WHOLE = [n for n in architectures() if "(SD 2.0-base)" in n or "768-v" in n or "SD 2-inpaint" in n]
SGM = [n for n in architectures() if "(SDXL base" in n or "(SDXL refiner" in n]


@pytest.mark.parametrize("name", WHOLE)
def test_every_name_and_shape_of_sd2(name):
    listed = architectures()[name]
    whole = whole_from_config(listed["target"], listed["params"], buffers=False, losses=False)
    found = source_shapes(whole.table, whole.shapes, name)
    assert found == {n: tuple(shape) for n, shape in listed["state_dict"].items()}
    shapes = {n: np.broadcast_to(np.float32(0), s) for n, s in listed["state_dict"].items()}
    inferred = infer(shapes)
    again = whole_from_config(inferred.target, inferred.params, buffers=False, losses=False)
    assert source_shapes(again.table, again.shapes, name) == found
    assert again.modules["conditioner"] == whole.modules["conditioner"]
    assert again.modules["unet"].num_head_channels == whole.modules["unet"].num_head_channels


@pytest.mark.parametrize("name", SGM)
def test_every_name_and_shape_of_sdxl_s_unet(name):
    listed = architectures()[name]
    config = listed["params"]["network_config"]
    unet = module_from_config(config["target"], config["params"])
    found = source_shapes(table_of(unet, UNET), param_shapes(unet), name)
    names = {n: tuple(s) for n, s in listed["state_dict"].items() if n.startswith(UNET)}
    assert found == names


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


def test_sdxl_is_named(tmp_path):
    arrays = {
        f"{UNET}input_blocks.0.0.weight": np.zeros((4, 4, 3, 3), np.float32),
        "conditioner.embedders.0.transformer.text_model.x": np.zeros(3, np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="Stable Diffusion XL"):
        from_compvis(tmp_path / "x.safetensors")
