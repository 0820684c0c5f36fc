"""VGG-16 features and the LPIPS distance (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", arXiv:1801.03924), with strict readers for the published weights.

Nothing is downloaded: the caller names the safetensors files, or sets LDM_JAX_VGG16 (the network) and LDM_JAX_LPIPS
(the heads).
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from ldm_jax.nn.layers import conv

VGG_VARIABLE = "LDM_JAX_VGG16"
HEADS_VARIABLE = "LDM_JAX_LPIPS"

VGG16_WIDTHS = (64, 128, 256, 512, 512)
# torchvision's `features.N` index of every convolution, by block: LPIPS' slice n holds block n under the same indices.
VGG16_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))

# ImageNet's mean and standard deviation on images in [-1, 1]: LPIPS' scaling layer, also torchvision's normalisation.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
_CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)  # on 0..255

Params = dict[str, Any]


class VGG16Features(nn.Module):
    """The 13 convolutions of VGG-16 (Simonyan & Zisserman 2014, arXiv:1409.1556, configuration D).

    Takes RGB images [b, h, w, 3] in [-1, 1], with h and w of at least 16, and returns the feature maps after relu1_2,
    relu2_2, relu3_3, relu4_3 and relu5_3: [b, h // 2**i, w // 2**i, widths[i]] for i = 0..4, in `dtype`.
    Raises ValueError for other shapes, or when `widths` has not one entry per block.

    `preprocess` belongs to the weights: "torchvision" (mean and deviation of ImageNet) or "caffe" (BGR on 0..255 minus
    the mean). Both happen in here, so a caller never sees the difference.
    """

    widths: Sequence[int] = VGG16_WIDTHS
    preprocess: str = "torchvision"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        _, h, w, c = images.shape
        if c != 3 or min(h, w) < 16:
            raise ValueError(
                f"VGG16Features takes images [b, h >= 16, w >= 16, 3], not {images.shape}"
            )
        if len(self.widths) != len(VGG16_LAYERS):
            raise ValueError(
                f"VGG16Features has {len(VGG16_LAYERS)} blocks: widths={tuple(self.widths)} does not fit"
            )
        x = _PREPROCESS[self.preprocess](images.astype(jnp.float32)).astype(self.dtype)
        maps = []
        for block, (layers, width) in enumerate(
            zip(VGG16_LAYERS, self.widths, strict=True), start=1
        ):
            if block > 1:
                x = max_pool(x)
            for i in range(1, len(layers) + 1):
                x = nn.relu(conv(width, 3, x, name=f"conv{block}_{i}", dtype=self.dtype)(x))
            maps.append(x)
        return tuple(maps)


class LPIPS(nn.Module):
    """The LPIPS distance with VGG-16 features (arXiv:1801.03924, equation 1).

    Takes two batches of RGB images [b, h, w, 3] in [-1, 1] and returns distances [b], float32, not bounded. Raises
    ValueError when the shapes differ. The dropout before each head acts only while heads are trained, which is never
    done here, so there is none.

    With preprocess="caffe" this is an approximation of LPIPS: the published heads were fitted on torchvision's VGG-16,
    not on the Caffe weights that this preprocessing belongs to. Figures from the two must not be compared.
    """

    widths: Sequence[int] = VGG16_WIDTHS
    preprocess: str = "torchvision"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        if a.shape != b.shape:
            raise ValueError(
                f"LPIPS compares image with image: shapes {a.shape} and {b.shape} differ"
            )
        vgg = VGG16Features(self.widths, self.preprocess, self.dtype, name="vgg")
        distance = jnp.zeros(a.shape[0], jnp.float32)
        for i, (fa, fb) in enumerate(zip(vgg(a), vgg(b), strict=True)):
            difference = jnp.square(unit_length(fa) - unit_length(fb))
            # The head is a 1x1 convolution to one channel without bias: it commutes with the mean over space.
            head = nn.Dense(1, use_bias=False, precision="highest", name=f"lin{i}")
            distance += head(difference.mean(axis=(1, 2)))[:, 0]
        return distance


def max_pool(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, h // 2, w // 2, c], the largest of each 2x2 square; an odd last row or column is dropped.

    Of equal numbers the first takes the gradient, as in PyTorch. XLA's own pooling finds it again in the backward pass, in five to ten times the time
    on a CPU.
    """
    b, h, w, c = x.shape
    squares = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    rows = [_larger(squares[:, :, i, :, 0], squares[:, :, i, :, 1]) for i in (0, 1)]
    return _larger(*rows)


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def unit_length(x: jax.Array) -> jax.Array:
    """X [..., c] over its Euclidean length along c, in float32, as LPIPS divides: x / (|x| + 1e-10).

    The gradient where all channels are zero is zero. (The original's is NaN there: its square root has no slope at 0.)
    """
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    positive = squares > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
    return x / (norm + 1e-10)


def _torchvision(x: jax.Array) -> jax.Array:
    return (x - jnp.array(SHIFT)) / jnp.array(SCALE)


def _caffe(x: jax.Array) -> jax.Array:
    return ((x + 1) * 127.5)[..., ::-1] - jnp.array(_CAFFE_MEAN_BGR)


_PREPROCESS = {"torchvision": _torchvision, "caffe": _caffe}


# --- weights ---------------------------------------------------------------------------------------------------------


def load_vgg16(
    path: str | os.PathLike | None = None, widths: Sequence[int] = VGG16_WIDTHS
) -> tuple[VGG16Features, Params]:
    """Read VGG-16 from a safetensors file in torchvision's naming (`features.N.weight` OIHW, `features.N.bias`).

    path: the file; without one the environment variable LDM_JAX_VGG16 names it. Its metadata may hold "preprocess":
    "torchvision" (also taken when there is none) or the Caffe rule. The unused `classifier.*` entries are passed over.
    Returns (module, params) with float32 params: `module.apply({"params": params}, images)`.
    Raises FileNotFoundError, or ValueError listing every missing, unexpected and misshapen name.
    """
    tensors, metadata = _read(path, VGG_VARIABLE, "VGG-16 weights")
    params = vgg16_params(
        {k: v for k, v in tensors.items() if not k.startswith("classifier.")}, widths
    )
    return VGG16Features(tuple(widths), _preprocess_of(metadata)), params


def load_lpips(
    vgg_path: str | os.PathLike | None = None,
    heads_path: str | os.PathLike | None = None,
    widths: Sequence[int] = VGG16_WIDTHS,
) -> tuple[LPIPS, Params]:
    """Read LPIPS from VGG-16 in torchvision's naming and the published heads (`linN.model.1.weight` [1, c, 1, 1]).

    Without a path the environment variables LDM_JAX_VGG16 and LDM_JAX_LPIPS name the files. The module's `preprocess`
    follows the VGG file: with the Caffe weights the result only approximates LPIPS (see LPIPS).
    Returns (module, params): `module.apply({"params": params}, a, b)`. Raises as load_vgg16 does.
    """
    module, vgg = load_vgg16(vgg_path, widths)
    heads, _ = _read(heads_path, HEADS_VARIABLE, "LPIPS heads")
    return LPIPS(module.widths, module.preprocess), {
        "vgg": vgg,
        **_assemble(heads, _head_names(widths)),
    }


def vgg16_params(tensors: Mapping[str, np.ndarray], widths: Sequence[int] = VGG16_WIDTHS) -> Params:
    """VGG16Features params from arrays under torchvision's names (`features.N.weight` OIHW, `features.N.bias`).

    Raises ValueError listing every missing, unexpected and misshapen name.
    """
    return _assemble(tensors, _vgg_names(widths, "features.{layer}"))


def lpips_params(tensors: Mapping[str, np.ndarray], widths: Sequence[int] = VGG16_WIDTHS) -> Params:
    """LPIPS params from arrays under the names of the original module, as checkpoints carry them.

    Those are `net.sliceN.M.weight`, `net.sliceN.M.bias` and `linN.model.1.weight`. The constants `scaling_layer.*` may
    be there and must then be LPIPS' own. Raises ValueError listing every missing, unexpected and misshapen name.
    """
    for name, values in (("scaling_layer.shift", SHIFT), ("scaling_layer.scale", SCALE)):
        if name in tensors and not np.allclose(np.ravel(tensors[name]), values, rtol=0, atol=1e-6):
            raise ValueError(f"{name} is {np.ravel(tensors[name])}, and LPIPS has {values}")
    rest = {k: v for k, v in tensors.items() if not k.startswith("scaling_layer.")}
    vgg = {
        name: (("vgg", *path), shape)
        for name, (path, shape) in _vgg_names(widths, "net.slice{block}.{layer}").items()
    }
    return _assemble(rest, vgg | _head_names(widths))


_Names = dict[
    str, tuple[tuple[str, ...], tuple[int, ...]]
]  # original name -> (our path, original shape)


def _vgg_names(widths: Sequence[int], pattern: str) -> _Names:
    names, fan_in = {}, 3
    for block, (layers, width) in enumerate(zip(VGG16_LAYERS, widths, strict=True), start=1):
        for i, layer in enumerate(layers, start=1):
            name, ours = pattern.format(block=block, layer=layer), f"conv{block}_{i}"
            names[f"{name}.weight"] = ((ours, "kernel"), (width, fan_in, 3, 3))
            names[f"{name}.bias"] = ((ours, "bias"), (width,))
            fan_in = width
    return names


def _head_names(widths: Sequence[int]) -> _Names:
    return {
        f"lin{i}.model.1.weight": ((f"lin{i}", "kernel"), (1, width, 1, 1))
        for i, width in enumerate(widths)
    }


def _assemble(tensors: Mapping[str, np.ndarray], names: _Names) -> Params:
    missing = sorted(names.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - names.keys())
    misshapen = [
        f"{name} {np.shape(tensors[name])} instead of {shape}"
        for name, (_, shape) in names.items()
        if name in tensors and np.shape(tensors[name]) != shape
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"the weights do not fit: missing {missing}, unexpected {unexpected}, misshapen {misshapen}"
        )
    params: Params = {}
    for name, (path, shape) in names.items():
        *parents, leaf = path
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        value = np.asarray(tensors[name], np.float32)
        if len(shape) == 4:  # OIHW -> HWIO; a head's 1x1 kernel becomes a dense one, [c, 1]
            value = (
                value[:, :, 0, 0].T
                if leaf == "kernel" and shape[2:] == (1, 1)
                else value.transpose(2, 3, 1, 0)
            )
        node[leaf] = jnp.asarray(value)
    return params


def _read(
    path: str | os.PathLike | None, variable: str, what: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    path = path or os.environ.get(variable)
    if not path:
        raise FileNotFoundError(f"{what}: give the path of a safetensors file or set {variable}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{what}: there is no file {os.fspath(path)}")
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _preprocess_of(metadata: Mapping[str, str]) -> str:
    rule = metadata.get("preprocess", "torchvision")
    if rule in _PREPROCESS:
        return rule
    # The rule in words, as converted Caffe weights carry it: "RGB 0..255 -> BGR, minus mean (103.939,116.779,123.68)".
    if "BGR" in rule and all(str(mean) in rule for mean in _CAFFE_MEAN_BGR):
        return "caffe"
    raise ValueError(f"unknown preprocessing {rule!r}: expected one of {sorted(_PREPROCESS)}")
