"""softmax(scale q k^T) v without its weights in memory, where that is faster: which form is used is `TABLE`'s to say.

Every form takes q [b, n, h, d], k [b, m, h, d], v [b, m, h, e] and a float ``scale``, and gives [b, n, h, e] in v's type. `plain` writes the weights
[b, h, n, m] down in float32, `compact` in v's type; the others are flash attention (Dao et al. 2022): blocks of weights are computed, used and
forgotten, and computed again by the backward pass (`batched` makes one block of all).
"""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from ldm_jax.distributed.parallel import ROWS, row_shards, target
from ldm_jax.kernels.vjp import own_gradient

Array = jax.Array
Form = Callable[..., Array]
SAVED = "attention"  # the name of what a backward pass needs of a kernel, for rematerialisation to keep: computing it again costs a whole kernel


def plain(q: Array, k: Array, v: Array, scale: float, mask: Array | None = None) -> Array:
    """Two products and a float32 softmax. ``mask`` is boolean, broadcastable to [b, h, n, m]; a row masked whole attends uniformly."""
    if (
        q.dtype == jnp.float32
    ):  # fewer values to scale than logits, of which XLA's CPU compiler would also write an array of scales
        q, scale = q * scale, 1.0
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhe->bnhe", weights, v)


# ------------------------------------------------------------------------------------------------------------------------ CPU

_CHUNK = 256  # rows of weights at a time: what they take stays in the cache


def chunked(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Head after head, in chunks of queries forwards and of keys backwards, in float32."""
    return _chunked(q, k, v, scale)


def _chunked_forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    def head(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        def rows(q: Array) -> tuple[Array, Array]:
            logits = q @ k.T * scale
            top = logits.max(-1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = weights.sum(-1, keepdims=True)
            return weights @ v / total, (top + jnp.log(total))[:, 0]

        y, lse = jax.lax.map(rows, _chunks(q))
        return y.reshape(-1, v.shape[-1]), lse.reshape(-1)

    heads = _heads(q), _heads(k), _heads(v)
    like = heads[0] if q.shape[-1] == v.shape[-1] else jnp.zeros((*heads[0].shape[:2], v.shape[-1]))
    y, lse = _map_onto((like, heads[0][..., 0]), head, heads)
    y, lse = checkpoint_name(_unheads(y, v), SAVED), checkpoint_name(lse, SAVED)
    return y, (q, k, v, y, lse)


def _chunked_backward(
    scale: float, kept: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    """No product has its left operand transposed, but for small ones: XLA's CPU compiler takes many times as long for those."""
    q, k, v, y, lse = kept
    delta = (_heads(dy) * _heads(y)).sum(-1)

    def head(
        q: Array, k: Array, v: Array, dy: Array, lse: Array, delta: Array
    ) -> tuple[Array, ...]:
        def columns(dq_t: Array, kv: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            k, v = kv
            weights = jnp.exp(k @ q.T * scale - lse)  # transposed: [keys, queries]
            dlogits = weights * (v @ dy.T - delta) * scale
            return dq_t + k.T @ dlogits, (dlogits @ q, weights @ dy)

        dq_t, (dk, dv) = jax.lax.scan(columns, jnp.zeros_like(q.T), (_chunks(k), _chunks(v)))
        return dq_t.T, dk.reshape(k.shape), dv.reshape(v.shape)

    heads = _heads(q), _heads(k), _heads(v)
    grads = _map_onto(heads, head, (*heads, _heads(dy), lse, delta))
    dq, dk, dv = (_unheads(grad, like) for grad, like in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


_chunked = own_gradient(_chunked_forward, _chunked_backward, (3,))


def batched(q: Array, k: Array, v: Array, scale: float) -> Array:
    """All heads at once, heads first, in float32: for few keys, of whose weights the compiler needs only some rows at a time."""
    return _unheads(_batched(_heads(q) * scale, _heads(k), _heads(v)), v)


def _batched_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    logits = q @ k.mT
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    y, lse = (
        checkpoint_name(weights @ v / total, SAVED),
        checkpoint_name(top + jnp.log(total), SAVED),
    )
    return y, (q, k, v, y, lse)


def _batched_backward(kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    """Sums over queries have the small operand on the left, transposed: of the weights XLA's CPU compiler would write a transposed copy."""
    q, k, v, y, lse = kept
    delta = (dy * y).sum(-1, keepdims=True)
    # By adding nothing: not the logits of the forward pass, which would be kept, nor before dy is there (XLA's CPU compiler computes what it can).
    weights = jnp.exp((q + 0 * delta) @ k.mT - lse)
    dlogits = weights * (dy @ v.mT - delta)
    return dlogits @ k, (q.mT @ dlogits).mT, (dy.mT @ weights).mT


_batched = own_gradient(_batched_forward, _batched_backward)


def _heads(x: Array) -> Array:
    """[b, n, h, d] -> float32 [b * h, n, d]."""
    b, n, h, d = x.shape
    return x.swapaxes(1, 2).reshape(b * h, n, d).astype(jnp.float32)


def _unheads(x: Array, like: Array) -> Array:
    """[b * h, n, d] -> [b, n, h, d], of the type and with the b and h of ``like``."""
    b, _, h, _ = like.shape
    return x.reshape(b, h, *x.shape[1:]).swapaxes(1, 2).astype(like.dtype)


def _map_onto(
    places: tuple[Array, ...], function: Callable[..., tuple[Array, ...]], given: tuple[Array, ...]
) -> tuple[Array, ...]:
    """``function`` of each row of ``given``, written over the rows of ``places``.

    `jax.lax.map` begins with zeros, and XLA's CPU compiler makes those of all loops of a program at its start, where they stay in memory.
    """

    def one(i: Array, places: tuple[Array, ...]) -> tuple[Array, ...]:
        made = function(*(a[i] for a in given))
        return tuple(a.at[i].set(b) for a, b in zip(places, made, strict=True))

    return jax.lax.fori_loop(0, given[0].shape[0], one, places)


def _chunks(x: Array) -> Array:
    """[n, d] -> [n / c, c, d]."""
    return x.reshape(-1, math.gcd(len(x), _CHUNK), x.shape[-1])


# ------------------------------------------------------------------------------------------------------------------------ GPU


def cudnn(q: Array, k: Array, v: Array, scale: float) -> Array:
    """CuDNN's flash attention; it wants head sizes in multiples of 8, to which zeros fill up."""
    d = q.shape[-1]
    fill = ((0, 0), (0, 0), (0, 0), (0, -d % 8))
    q, k, v = (jnp.pad(x, fill) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")[..., :d]


def _cuda_is_installed() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


# ------------------------------------------------------------------------------------------------------------------------ TPU


def compact(q: Array, k: Array, v: Array, scale: float) -> Array:
    """`plain` with less traffic to memory: what it writes down, and keeps for the backward pass, are weights that are not divided by their sum yet,
    in v's type; the backward pass takes its sum over keys from the result (Dao et al. 2022, section 3.1).
    """
    return _compact(q, k, v, scale)


def _compact_forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    hold = jax.lax.optimization_barrier

    def logits(q: Array) -> Array:
        return jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32) * scale

    # Twice, for what comes of them each time is one pass; and left free the compiler writes float32 logits down, and reads them several times.
    top = hold(logits(hold(q)).max(-1, keepdims=True))
    weights = jnp.exp(logits(q) - top)
    weights, total = hold((weights.astype(v.dtype), weights.sum(-1)))
    share = 1 / total.swapaxes(1, 2)[..., None]  # [b, n, h, 1]
    y = jnp.einsum("bhnm,bmhe->bnhe", weights, v, preferred_element_type=jnp.float32) * share
    y = y.astype(v.dtype)
    return y, (q, k, v, y, weights, share)


def _compact_backward(
    scale: float, kept: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    q, k, v, y, weights, share = kept
    delta = (dy.astype(jnp.float32) * y * share).sum(-1).swapaxes(1, 2)[..., None]  # [b, h, n, 1]
    dy = (dy * share).astype(dy.dtype)
    dweights = jnp.einsum("bnhe,bmhe->bhnm", dy, v, preferred_element_type=jnp.float32)
    dlogits = (weights * (dweights - delta) * scale).astype(q.dtype)
    dq, dk = jnp.einsum("bhnm,bmhd->bnhd", dlogits, k), jnp.einsum("bhnm,bnhd->bmhd", dlogits, q)
    return dq, dk, jnp.einsum("bhnm,bnhe->bmhe", weights, dy)


_compact = own_gradient(_compact_forward, _compact_backward, (3,))


def splash(q: Array, k: Array, v: Array, scale: float, *, interpret: bool = False) -> Array:
    """The Pallas kernel that comes with jax: it takes any head size as it is. ``interpret`` runs it anywhere, slowly."""
    kernel = _splash_kernel(q.shape[1], k.shape[1], q.shape[2], q.dtype == jnp.bfloat16, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)


def _splash_kernel(n: int, m: int, h: int, half: bool, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    # Blocks that fit the 16 MiB which the compiler gives a kernel. One backward kernel makes all gradients; it writes that of the queries once for
    # each block of keys, to be summed, hence the long ones. (In float32 long ones compile for minutes.)
    sizes = library.BlockSizes(
        block_q=math.gcd(n, 1024 if half else 512),
        block_kv=math.gcd(m, 1024 if half else 512),
        block_q_dkv=math.gcd(n, 256 if half else 512),
        block_kv_dkv=math.gcd(m, 4096 if half else 512),
        block_kv_dkv_compute=math.gcd(m, 1024 if half else 512),
        use_fused_bwd_kernel=True,
        # As the compiler lays these arrays by itself: heads of 40 would fill 31 % of a row, and were copied before the kernel.
        q_layout=library.QKVLayout.SEQ_MINOR,
        k_layout=library.QKVLayout.SEQ_MINOR,
        v_layout=library.QKVLayout.SEQ_MINOR,
    )
    mask = masks.MultiHeadMask([masks.FullMask((n, m))] * h)
    return library.make_splash_mha_single_device(
        mask=mask, block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret
    )


# ----------------------------------------------------------------------------------------------------------------- the choice


class Row(NamedTuple):
    """A ``form`` for so many ``queries`` and ``keys`` (least, most), both in multiples of ``multiple``, and heads of at most ``head`` channels."""

    form: Form
    queries: tuple[float, float]
    keys: tuple[float, float]
    multiple: int
    head: float
    dtypes: tuple[str, ...]


# The first row that fits; everything else is plain: short sequences, masks. CPU: measured by benchmarks/attention.py. GPU and TPU: what the kernels
# accept, and where plain weights begin to cost memory; not measured. TPU's second row: by the compiler's estimate.
_ANY = ("float32", "bfloat16", "float16")
TABLE = {
    "cpu": (
        Row(
            chunked,
            queries=(256, math.inf),
            keys=(256, math.inf),
            multiple=64,
            head=128,
            dtypes=_ANY,
        ),
        Row(batched, queries=(256, math.inf), keys=(1, 255), multiple=1, head=256, dtypes=_ANY),
    ),
    "gpu": (
        Row(
            cudnn,
            queries=(256, math.inf),
            keys=(256, math.inf),
            multiple=1,
            head=128,
            dtypes=_ANY[1:],
        ),
    ),
    "tpu": (
        Row(
            splash,
            queries=(1024, math.inf),
            keys=(1024, math.inf),
            multiple=128,
            head=128,
            dtypes=_ANY[:2],
        ),
        Row(
            compact,
            queries=(1, math.inf),
            keys=(1, math.inf),
            multiple=1,
            head=math.inf,
            dtypes=_ANY,
        ),
    ),
}


def choose(platform: str, q: Any, k: Any, v: Any) -> Form:
    """The form for these arrays, or shapes, on a platform ("cpu", "gpu", "tpu"; others are plain)."""
    if not q.dtype == k.dtype == v.dtype or q.shape[-1] != v.shape[-1]:
        return plain
    n, m = q.shape[1], k.shape[1]
    for row in TABLE.get(platform, ()):
        lengths = row.queries[0] <= n <= row.queries[1] and row.keys[0] <= m <= row.keys[1]
        if (
            lengths
            and n % row.multiple == m % row.multiple == 0
            and q.shape[-1] <= row.head
            and q.dtype.name in row.dtypes
        ):
            return row.form
    return plain


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """softmax(scale q k^T) v, in the form for what the program is compiled for.

    `parallel.compile_step` tells platform and mesh. Where nobody does, the lowering decides; a TPU program then is plain, since the compiler does not
    split a Pallas kernel over devices by itself.
    """
    told = target()
    if told is None:
        forms = {"cpu": choose("cpu", q, k, v)}
        if _cuda_is_installed():  # without it the kernel cannot even be traced
            forms["cuda"] = choose("gpu", q, k, v)
        if all(form is plain for form in forms.values()):
            return plain(q, k, v, scale)
        bound = {platform: partial(form, scale=scale) for platform, form in forms.items()}
        return jax.lax.platform_dependent(q, k, v, **bound, default=partial(plain, scale=scale))
    form = choose(told.platform, q, k, v)
    if form in (plain, compact) or told.mesh is None:
        return form(q, k, v, scale)
    return over_mesh(form, told.mesh, q, k, v, scale)


def over_mesh(form: Form, mesh: Mesh, q: Array, k: Array, v: Array, scale: float) -> Array:
    """``form`` on each device's rows, and its heads where the tensor axis divides them. Nothing is exchanged."""
    if q.shape[0] % row_shards(mesh):
        return plain(q, k, v, scale)
    split = PartitionSpec(*ROWS, None, "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None)
    # check_vma would ask the library's kernel to declare along which axes its results vary.
    mapped = partial(
        jax.shard_map, mesh=mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False
    )
    return mapped(partial(form, scale=scale))(q, k, v)
