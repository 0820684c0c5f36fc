"""Networks without a recorded case: pools, codebooks across devices, resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditioning import CONDITIONERS
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build_first_stage
from ldm_jax.models.clip import CLIPVision
from ldm_jax.models.encoder_unet import EncoderUNet
from ldm_jax.models.ldm import FirstStage
from ldm_jax.models.permuter import PERMUTERS
from ldm_jax.models.quantize import EMAQuantizer, GumbelQuantizer, VectorQuantizer
from ldm_jax.nn.resize import resize

CLASSIFIER = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "num_heads": 2,
    "image_size": 8,
}
VQ = {
    "kind": "vq",
    "embed_dim": 2,
    "n_embed": 6,
    "ch": 32,
    "out_ch": 3,
    "in_channels": 3,
    "resolution": 8,
    "z_channels": 2,
    "num_res_blocks": 1,
    "ch_mult": [1, 1],
}


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_pools_give_one_row_a_picture(pool: str) -> None:
    net = EncoderUNet(**CLASSIFIER, num_head_channels=8, pool=pool)
    args = (jnp.zeros((2, 8, 8, 3)), jnp.zeros(2))
    y = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), *args)[0])
    assert (y.shape, y.dtype) == ((2, 4), jnp.float32)


@pytest.mark.fast
def test_an_unknown_pool_is_an_error() -> None:
    with pytest.raises(ValueError, match="'max' is not one of"):
        jax.eval_shape(
            EncoderUNet(**CLASSIFIER, pool="max").init,
            jax.random.key(0),
            jnp.zeros((1, 8, 8, 3)),
            jnp.zeros(1),
        )


def test_codes_come_back_from_their_indices() -> None:
    h = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    for module in (
        VectorQuantizer(5, 2, sane_index_shape=True),
        GumbelQuantizer(5, 2),
        EMAQuantizer(5, 2),
    ):
        variables = module.init(jax.random.key(1), h)
        rngs = {"gumbel": jax.random.key(2)}
        out = module.apply(variables, h, rngs=rngs)
        codes = module.apply(variables, out.indices.reshape(2, 3, 4), method="codes")
        np.testing.assert_allclose(codes, out.z, atol=1e-6)


def test_unknown_codes_become_random_ones_of_those_in_use() -> None:
    module = VectorQuantizer(8, 2, remap=(1, 3), sane_index_shape=True)
    h = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
    params = module.init(jax.random.key(1), h)
    first, second = (
        module.apply(params, h, rngs={"remap": jax.random.key(seed)}).indices for seed in (0, 1)
    )
    assert set(np.unique(first)) == {0, 1}
    assert (first != second).any()


def test_the_averaged_codebook_follows_the_whole_batch() -> None:
    h = jax.random.normal(jax.random.key(0), (jax.device_count() * 2, 3, 3, 2))
    whole = EMAQuantizer(5, 2)
    variables = whole.init(jax.random.key(1), h)
    _, expected = jax.jit(lambda v, h: whole.apply(v, h, train=True, mutable=["codebook"]))(
        variables, h
    )
    split = EMAQuantizer(5, 2, axis_name="batch")
    step = jax.pmap(
        lambda v, h: split.apply(v, h, train=True, mutable=["codebook"]),
        axis_name="batch",
        in_axes=(None, 0),
    )
    _, found = step(variables, h.reshape(jax.device_count(), 2, 3, 3, 2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-5, atol=1e-6), expected, found
    )


def test_resizing() -> None:
    x = jnp.arange(2 * 6 * 4 * 1.0).reshape(2, 6, 4, 1)
    squares = x.reshape(2, 3, 2, 2, 2, 1).mean((2, 4))
    for method in ("area", "bilinear"):  # between two pixels, which halving makes the same
        np.testing.assert_allclose(resize(x, 0.5, method), squares, rtol=1e-6)
    np.testing.assert_array_equal(resize(x, 0.5, "nearest"), x[:, ::2, ::2])
    np.testing.assert_allclose(
        resize(jnp.full((1, 7, 5, 2), 3.0), 0.4, "bicubic"), np.full((1, 2, 2, 2), 3.0), rtol=1e-6
    )
    with pytest.raises(ValueError, match="leave 0x0"):
        resize(x, 0.1)
    with pytest.raises(ValueError, match="'cubic' is not one of"):
        resize(x, 0.5, "cubic")  # type: ignore[arg-type]


def test_a_vq_first_stage_quantises_when_it_decodes() -> None:
    module = build_first_stage({"first_stage": VQ})
    assert module is not None
    params = jax.jit(lambda key: init_autoencoder(module, key))(jax.random.key(0))
    stage = FirstStage(params, 2.0, module)
    z = stage.encode(jnp.zeros((1, 8, 8, 3)))
    assert z.shape == (1, 4, 4, 2)
    assert stage.decode(z).shape == (1, 8, 8, 3)
    codes = params["quantize"]["embedding"]
    nearest = stage.quantized(z)
    assert all((np.abs(codes - c).sum(1).min() < 1e-6) for c in np.asarray(nearest).reshape(-1, 2))
    np.testing.assert_allclose(
        stage.decode(z), stage.decode(2.0 * stage.quantized(z / 2.0), quantize=False), atol=1e-5
    )


def test_clip_tokens() -> None:
    text = CONDITIONERS["clip"].from_config(dtype=jnp.float32)
    tokens = text.encode(
        ["a photograph of an astronaut riding a horse", "A  cat's 1st word, " + "word " * 90]
    )
    assert tokens.shape == (2, 77)
    assert tokens.dtype == np.int32
    assert tokens[0, :11].tolist() == [
        49406,
        320,
        8853,
        539,
        550,
        18376,
        6765,
        320,
        4558,
        49407,
        49407,
    ]
    assert tokens[1, :6].tolist() == [49406, 320, 2368, 568, 272, 545]
    assert tokens[1, -1] == 49407
    assert text.encode_null(2).tolist() == [[49406] + [49407] * 76] * 2


def test_conditioners() -> None:
    label = CONDITIONERS["class"].from_config(n_classes=5, embed_dim=4, dtype=jnp.float32)
    assert label.encode(["3", 0]).tolist() == [3, 0]
    assert label.encode_null(2).tolist() == [4, 4]
    assert label(label.init(jax.random.key(0)), label.encode([1])).crossattn.shape == (1, 1, 4)
    with pytest.raises(ValueError, match="from 0 to 4"):
        label.encode([5])

    maps = CONDITIONERS["rescale"].from_config(
        size=(8, 8), n_stages=2, in_channels=5, out_channels=3, dtype=jnp.float32
    )
    small = maps(maps.init(jax.random.key(0)), maps.encode([np.ones((8, 8, 5))]))
    assert small.concat.shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match=r"\[b, h, w, 5\]"):
        maps.encode([np.ones((8, 8, 3))])

    boxes = CONDITIONERS["tokens"].from_config(
        dim=8, depth=1, vocab_size=10, max_seq_len=3, heads=1, head_dim=4, dtype=jnp.float32
    )
    assert boxes.encode([[1, 2, 3]]).tolist() == [[1, 2, 3]]
    for wrong in ([[1, 2]], [[1, 2, 10]]):
        with pytest.raises(ValueError, match="tokens"):
            boxes.encode(wrong)


def test_the_image_tower_projects_its_class_token() -> None:
    tower = CLIPVision(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=6,
    )
    last, pooled = jax.eval_shape(
        lambda: tower.init_with_output(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))[0]
    )
    assert (last.shape, pooled.shape) == ((2, 5, 16), (2, 6))


@pytest.mark.fast
@pytest.mark.parametrize("name", PERMUTERS)
@pytest.mark.parametrize("size", [(4, 6), (3, 3), (1, 4)])
def test_permuters_are_permutations(name: str, size: tuple[int, int]) -> None:
    forward, back = PERMUTERS[name](*size)
    assert sorted(forward) == list(range(size[0] * size[1]))
    assert (forward[back] == np.arange(len(forward))).all()
