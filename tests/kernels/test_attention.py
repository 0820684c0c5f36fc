"""Each form of attention equals the plain one, on one device and on a mesh; its choice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ldm_jax.distributed.compile import compile_step
from ldm_jax.distributed.mesh import ROWS, make_mesh
from ldm_jax.kernels import REFERENCE, SAVED, Kernels, for_platform
from ldm_jax.kernels.cpu import batched, chunked
from ldm_jax.kernels.gpu import cudnn
from ldm_jax.kernels.reference import attention as plain
from ldm_jax.kernels.tpu import compact, splash
from ldm_jax.plan.hlo import collectives, parse


def arrays(
    b: int, n: int, m: int, h: int, d: int, e: int | None = None, dtype: str = "float32"
) -> tuple:
    """q, k, v and a gradient of the result."""
    rng = np.random.default_rng(0)
    shapes = (b, n, h, d), (b, m, h, d), (b, m, h, e or d), (b, n, h, e or d)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def results(form, q, k, v, dy):
    """Values and the three gradients, in one jitted program."""

    def both(q, k, v, dy):
        y, pull = jax.vjp(form, q, k, v)
        return y, *pull(dy)

    return jax.jit(both)(q, k, v, dy)


def assert_agree(form, given, tolerance):
    scale = 0.7 * given[0].shape[-1] ** -0.5  # not what anyone would assume
    got = results(lambda q, k, v: form(q, k, v, scale), *given)
    expected = results(lambda q, k, v: plain(q, k, v, scale), *given)
    for name, a, b in zip(("values", "dq", "dk", "dv"), got, expected, strict=True):
        assert a.dtype == b.dtype
        error = (
            np.abs(np.asarray(a - b, np.float32)).max() / np.abs(np.asarray(b, np.float32)).max()
        )
        assert error < tolerance, (name, error)


@pytest.mark.parametrize(
    "shape",
    [(2, 320, 320, 2, 20), (1, 512, 256, 3, 8), (1, 192, 448, 1, 40, 24)],
    ids=["chunks of 64", "fewer keys", "more keys, values of another size"],
)
def test_chunked_attention_is_plain_attention(shape):
    assert_agree(chunked, arrays(*shape), 3e-6)


@pytest.mark.parametrize(
    "shape", [(2, 300, 77, 2, 20), (1, 256, 5, 3, 8)], ids=["words", "few words"]
)
def test_batched_attention_is_plain_attention(shape):
    assert_agree(batched, arrays(*shape), 3e-6)


@pytest.mark.parametrize(
    "shape",
    [(2, 300, 77, 2, 20), (1, 64, 64, 3, 8), (1, 192, 448, 1, 40, 24)],
    ids=["words", "pixels", "more keys"],
)
def test_compact_attention_is_plain_attention(shape):
    assert_agree(compact, arrays(*shape), 3e-6)


@pytest.mark.parametrize("form", [chunked, batched, compact])
def test_attention_keeps_the_type_of_its_arguments(form):
    assert_agree(form, arrays(1, 256, 256, 2, 16, dtype="bfloat16"), 2e-2)


@pytest.mark.parametrize("form", [chunked, batched, compact])
def test_logits_that_overflow_an_exponential_do_no_harm(form):
    q, k, v, dy = arrays(1, 256, 256, 2, 16)
    assert_agree(form, (10 * q, 10 * k, v, dy), 1e-4)


def test_batched_attention_keeps_no_weights_for_its_backward_pass():
    given = arrays(1, 256, 77, 2, 16)[:3]
    _, kept = jax.eval_shape(lambda *qkv: jax.vjp(lambda *a: batched(*a, 0.2), *qkv), *given)
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) < 256 * 77


def test_compact_attention_keeps_weights_once_and_in_half_precision():
    given = arrays(1, 256, 77, 2, 16, dtype="bfloat16")[:3]
    _, kept = jax.eval_shape(lambda *qkv: jax.vjp(lambda *a: compact(*a, 0.2), *qkv), *given)
    assert [leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.size >= 2 * 256 * 77] == [
        jnp.bfloat16
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 3e-2)])
def test_the_tpu_kernel_is_plain_attention(dtype, tolerance):
    given = arrays(2, 256, 384, 2, 40, dtype=dtype)
    assert_agree(partial(splash, interpret=True), given, tolerance)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_geglu_is_its_formula_and_on_a_cpu_keeps_its_argument_alone(platform):
    geglu = for_platform(platform).geglu
    rng = np.random.default_rng(0)
    h, dy = (
        jnp.asarray(4 * rng.standard_normal((3, 5, 16))),
        jnp.asarray(rng.standard_normal((3, 5, 8))),
    )

    def formula(h):
        return h[..., :8] * jax.nn.gelu(h[..., 8:], approximate=False)

    (y, pull), half = jax.vjp(geglu, h), geglu(h.astype(jnp.bfloat16))
    expected, expected_pull = jax.vjp(formula, h)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(pull(dy)[0], expected_pull(dy)[0], rtol=1e-5, atol=2e-6)
    assert ([leaf.shape for leaf in jax.tree.leaves(pull)] == [h.shape]) == (platform == "cpu")
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)


# ---------------------------------------------------------------------------------------- on a mesh


@pytest.mark.parametrize(
    "form",
    [chunked, batched, partial(splash, interpret=True)],
    ids=["chunked", "batched", "splash"],
)
@pytest.mark.parametrize(
    ("tensor", "heads"),
    [(1, 2), (2, 4), (2, 3)],
    ids=["rows", "rows and heads", "heads that tensor does not divide"],
)
def test_a_mesh_changes_nothing(form, tensor, heads):
    mesh = make_mesh(8, data=2, fsdp=-1, tensor=tensor)
    given = arrays(8, 128, 128, heads, 16)
    rows = NamedSharding(mesh, ROWS)

    def both(q, k, v, dy):
        y, pull = jax.vjp(partial(Kernels(mesh).per_device, lambda *qkv: form(*qkv, 0.2)), q, k, v)
        return y, *pull(dy)

    step = (
        jax.jit(both, in_shardings=(rows,) * 4, out_shardings=(rows,) * 4).lower(*given).compile()
    )
    placed = (jax.device_put(a, rows) for a in given)
    for got, expected in zip(
        step(*placed), results(lambda *qkv: plain(*qkv, 0.2), *given), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=3e-6)
    if tensor == 1:
        assert collectives(parse(step.as_text()), 8) == []


def test_rows_that_a_mesh_does_not_divide_are_plain():
    given = arrays(3, 256, 256, 1, 8)[:3]
    kernels = for_platform("cpu", make_mesh(8, data=8))
    assert kernels.attention_form(*given) is chunked  # type: ignore[attr-defined]
    np.testing.assert_array_equal(kernels.attention(*given, 0.3), plain(*given, 0.3))


# --------------------------------------------------------------------------------------- the choice


def shapes(n, m, d, dtype="bfloat16", heads=8):
    q, k = (jax.ShapeDtypeStruct((2, length, heads, d), jnp.dtype(dtype)) for length in (n, m))
    return q, k, k


@pytest.mark.parametrize(
    ("platform", "shape", "form"),
    [
        ("cpu", (1024, 1024, 40, "float32"), chunked),
        ("cpu", (1024, 77, 40, "float32"), batched),
        ("cpu", (64, 77, 160, "float32"), None),
        ("cpu", (64, 64, 160, "float32"), None),
        ("cpu", (1000, 1000, 40, "float32"), None),  # divides into no chunks
        ("gpu", (4096, 4096, 40), cudnn),
        ("gpu", (1024, 1024, 20), cudnn),  # filled up to 24
        ("gpu", (4096, 77, 40), cudnn),
        ("gpu", (4096, 4096, 40, "float32"), None),
        ("gpu", (256, 256, 160), None),
        ("tpu", (4096, 4096, 40), splash),
        ("tpu", (1024, 1024, 80), splash),
        ("tpu", (4096, 77, 40), compact),
        ("tpu", (256, 256, 160), compact),
        ("tpu", (4096, 4096, 512), compact),
    ],
)
def test_forms_are_chosen_by_platform_and_shape(platform, shape, form):
    q, k, v = shapes(*shape)
    assert for_platform(platform).attention_form(q, k, v) is form


def test_an_unknown_platform_is_plain():
    assert for_platform("rocm") == REFERENCE


@pytest.mark.parametrize("kernels", [REFERENCE, *map(for_platform, ("cpu", "gpu", "tpu"))])
def test_a_mask_or_values_of_another_size_are_plain(kernels):
    q, k, v, _ = arrays(1, 256, 256, 2, 8, 16)
    np.testing.assert_array_equal(kernels.attention(q, k, v, 0.3), plain(q, k, v, 0.3))
    mask = jnp.tril(jnp.ones((256, 256), bool))
    expected = plain(q, k, k, 0.3, mask)
    np.testing.assert_array_equal(kernels.attention(q, k, k, 0.3, mask), expected)


def weights_of(text: str) -> bool:
    """Whether a program has an array of all weights."""
    return "4x512x512" in text or "[2,4,512,512]" in text


def gradient(kernels):
    return lambda q, k, v: jax.grad(lambda q: kernels.attention(q, k, v, 0.3).sum())(q)


def test_the_cpu_form_has_no_array_of_all_weights():
    given = arrays(2, 512, 512, 4, 8)[:3]
    plainly, by_chunks = gradient(REFERENCE), gradient(for_platform("cpu"))
    assert weights_of(jax.jit(plainly).lower(*given).compile().as_text())
    assert not weights_of(jax.jit(by_chunks).lower(*given).compile().as_text())


def test_over_a_mesh_each_device_has_the_form():
    given = arrays(2, 512, 512, 4, 8)[:3]
    mesh, expected = make_mesh(2, data=2), gradient(REFERENCE)(*given)

    def compiled(mode, kernels):
        step = lambda *a, **_: gradient(kernels)(*a)  # noqa: E731
        return compile_step(step, mesh, mode, shared=(False,) * 3, out_shared=False)

    step = compiled("jit", for_platform("cpu", mesh))
    text = step.lower(*given).compile().as_text()
    assert not weights_of(text)
    assert "[1,4,512,512]" not in text
    assert collectives(parse(text), 2) == []
    np.testing.assert_allclose(step(*given), expected, atol=1e-6)
    np.testing.assert_allclose(compiled("pmap", for_platform("cpu"))(*given), expected, atol=1e-6)


def test_the_tpu_kernel_is_lowered_within_a_mesh_and_kept_by_rematerialisation():
    given = [jax.ShapeDtypeStruct((8, 1024, 2, 40), jnp.bfloat16)] * 3
    mesh = make_mesh(8, data=8)
    kernels = for_platform("tpu", mesh)

    def step(q, k, v):
        keep = jax.checkpoint_policies.save_only_these_names(SAVED)
        total = lambda q: kernels.attention(q, k, v, 0.2).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(jax.checkpoint(total, policy=keep))(q)

    rows = NamedSharding(mesh, ROWS)
    traced = jax.jit(step, in_shardings=(rows,) * 3).trace(*given)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("tpu_custom_call") == 2  # forwards once, backwards once


def test_the_gpu_kernel_is_lowered(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    given = [jax.ShapeDtypeStruct((2, 512, 4, 20), jnp.bfloat16)] * 3
    traced = jax.jit(jax.grad(lambda *a: cudnn(*a, 0.2).astype(jnp.float32).sum())).trace(*given)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in lowered
    assert "2x512x4x24xbf16" in lowered
