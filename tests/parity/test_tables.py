"""Conversion is total and exact: bit-exact round trips, one error that lists every mismatch."""

from typing import Any

import flax.linen as nn
import numpy as np
import pytest

from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.targets import (
    autoencoder_kl_from_params,
    module_from_config,
    unet_from_params,
)
from ldm_jax.convert.tables import (
    CHANNELS,
    CONV,
    CONV1D,
    CONV1X1,
    DENSE,
    LEADING,
    Op,
    flatten,
    source_shapes,
    to_ours,
    to_theirs,
)
from ldm_jax.errors import ConversionError, TargetError
from ldm_jax.models.bert import TransformerEncoder
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.gpt import GPT
from ldm_jax.models.unet import UNet

pytestmark = pytest.mark.parity

SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 2,
}
TEXT = TransformerEncoder(8, 2, 10, 4, heads=2, head_dim=4, with_logits=True)


def checkpoint(module: nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays, half of them float16, under the original's names."""
    rng = np.random.default_rng(seed)
    shapes = source_shapes(table_of(module), param_shapes(module))
    arrays = {
        name: rng.normal(size=shape).astype((np.float32, np.float16)[i % 2])
        for i, (name, shape) in enumerate(shapes.items())
    }
    integers = {"num_batches_tracked": np.int64(7), "initialized": np.uint8(1)}
    return {name: np.array(integers.get(name.rsplit(".", 1)[-1], a)) for name, a in arrays.items()}


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (CONV, (5, 4, 3, 3)),
        (DENSE, (5, 4)),
        (CONV1X1, (5, 4, 1, 1)),
        (CONV1D, (5, 4, 1)),
        (CHANNELS, (1, 5, 1, 1)),
        (LEADING, (1, 5, 4)),
    ],
)
def test_ops_are_their_own_way_back(op: Op, shape: tuple[int, ...]) -> None:
    a = np.random.default_rng(0).normal(size=shape)
    assert np.array_equal(op.to_theirs(op.to_ours(a)), a)


@pytest.mark.parametrize(
    "module",
    [
        unet_from_params(SMALL),
        unet_from_params(
            SMALL
            | {
                "use_spatial_transformer": True,
                "context_dim": 8,
                "transformer_depth": 2,
                "conv_resample": False,
            }
        ),
        unet_from_params(SMALL | {"num_classes": 4, "resblock_updown": True}),
        TEXT,
        PatchDiscriminator(3, 4, 2),
        PatchDiscriminator(3, 4, 2, use_actnorm=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_round_trip_is_bit_identical(module: nn.Module) -> None:
    theirs, shapes = checkpoint(module), param_shapes(module)
    ours = to_ours(table_of(module), theirs, shapes=shapes, where="test")
    assert {path: a.shape for path, a in flatten(ours).items()} == {
        path: s.shape for path, s in flatten(shapes).items()
    }
    back = to_theirs(table_of(module), ours)
    assert back.keys() == theirs.keys()
    for name, a in theirs.items():
        assert back[name].dtype == a.dtype, name
        assert back[name].shape == a.shape, name
        assert back[name].tobytes() == a.tobytes(), name


def test_unused_arrays_may_be_missing_and_are_written() -> None:
    for module, name in (
        (unet_from_params(SMALL | {"n_embed": 6}), "out.2.weight"),
        (GPT(5, 4, 1, 1, 8), "blocks.0.attn.mask"),
    ):
        theirs = checkpoint(module)
        unused = next(n for n in theirs if n.endswith(name))
        del theirs[unused]
        ours = to_ours(table_of(module), theirs, shapes=param_shapes(module), where="test")
        assert unused in to_theirs(table_of(module), ours)
    assert np.array_equal(to_theirs(table_of(module), ours)[unused][0, 0], np.tril(np.ones((4, 4))))


def test_error_lists_everything() -> None:
    theirs = checkpoint(TEXT)
    prefix = "cond_stage_model.transformer."
    gone, bad = f"{prefix}norm.weight", f"{prefix}pos_emb.emb.weight"
    del theirs[gone]
    theirs[bad] = theirs[bad].T
    pairs = [
        *theirs.items(),
        ("a.b", np.zeros(1)),
        ("c", np.zeros(1)),
        (f"{prefix}norm.bias", np.zeros(8)),
    ]
    with pytest.raises(ConversionError, match="my checkpoint") as error:
        to_ours(table_of(TEXT), pairs, shapes=param_shapes(TEXT), where="my checkpoint")
    assert error.value.missing == [gone]
    assert error.value.unexpected == ["a.b", "c"]
    assert error.value.duplicate == [f"{prefix}norm.bias"]
    assert error.value.misshapen == [(bad, (8, 4), (4, 8))]
    for name in (gone, "a.b", "c", bad, "found (8, 4), expected (4, 8)"):
        assert name in str(error.value)


def test_a_table_that_does_not_fit_the_parameters_is_an_error() -> None:
    table, shapes = table_of(TEXT), param_shapes(TEXT)
    with pytest.raises(ConversionError) as error:
        source_shapes([*table[1:], table[1]], shapes)
    assert error.value.missing == ["token_emb/embedding"]
    assert len(error.value.duplicate) == 2  # its path and its name
    shapes.pop("norm")
    with pytest.raises(ConversionError) as error:
        to_theirs(table, shapes)
    assert error.value.unexpected == ["norm/bias", "norm/scale"]


@pytest.mark.parametrize(("extra", "match"), [({"no_such": 1}, "no_such"), ({"dims": 3}, "dims=3")])
def test_unknown_parameters_are_an_error(extra: dict[str, Any], match: str) -> None:
    with pytest.raises(TargetError, match=match):
        unet_from_params(SMALL | extra)


def test_known_parameters() -> None:
    module = unet_from_params(
        SMALL | {"image_size": 8, "use_fp16": False, "use_checkpoint": True, "dims": 2}
    )
    assert module == UNet(3, 32, 3, 1, (2,), (1, 2), num_heads=2, remat=True)
    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "num_res_blocks": 1,
        "use_linear_attn": True,
    }
    model = autoencoder_kl_from_params(
        {"embed_dim": 2, "lossconfig": {"target": "x"}, "monitor": "y", "ddconfig": ddconfig}
    )
    assert (model.embed_dim, model.attn_type) == (2, "linear")
    with pytest.raises(TargetError, match="double_z"):
        autoencoder_kl_from_params({"embed_dim": 2, "ddconfig": ddconfig | {"double_z": False}})
    with pytest.raises(TargetError, match=r"no\.such\.Class"):
        module_from_config("no.such.Class")
