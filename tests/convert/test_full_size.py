"""The full-size benchmark: its checkpoints equal torch.save's, and its networks run."""

from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import convert_full_size
from ldm_jax.convert.compvis.whole import whole_from_config
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import source_shapes, to_ours

TARGET = "ldm.models.diffusion.ddpm.LatentDiffusion"
CODER = {
    "z_channels": 4,
    "resolution": 8,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1],
    "num_res_blocks": 1,
}
STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": {**CODER, "attn_type": "none"}},
}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1],
    "num_heads": 1,
}
PARAMS = {
    "timesteps": 10,
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": UNET | {"attention_resolutions": []},
    },
    "first_stage_config": STAGE,
    "cond_stage_config": "__is_first_stage__",
}


def test_the_checkpoint_is_one_that_the_reader_takes_whole(tmp_path: Path) -> None:
    size = convert_full_size.write_checkpoint(tmp_path / "a.ckpt", TARGET, PARAMS)
    whole = whole_from_config(TARGET, PARAMS)
    with open_checkpoint(tmp_path / "a.ckpt") as checkpoint:
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        params = to_ours(whole.table, checkpoint.tensors, shapes=whole.shapes, where="a.ckpt")
        twice = [name for name in shapes if name.startswith("cond_stage_model.")]
        assert checkpoint.tree["global_step"] == 1
    assert shapes == source_shapes(whole.table, whole.shapes)
    once = sum(4 * np.prod(shape) for name, shape in shapes.items() if name not in twice)
    assert twice
    assert once < size < once + 1000 * len(shapes)  # duplicates are stored once
    scales = [
        float(a.std()) * np.prod(a.shape[:-1]) ** 0.5
        for a in jax.tree.leaves(params)
        if a.size > 1000
    ]
    np.testing.assert_allclose(scales, 1, atol=0.1)


@pytest.mark.parametrize("name", convert_full_size.CONFIGS)
def test_the_released_architectures_are_there(name: str) -> None:
    given = convert_full_size.architecture(name)
    assert given["target"] == TARGET
    assert given["params"]["image_size"] == convert_full_size.SIDES[name]
