"""VGG-16 features and the LPIPS distance (Zhang et al. 2018, arXiv:1801.03924).

Weights are read from safetensors files that the caller names, or the environment variables
LDM_JAX_VGG16 (the network) and LDM_JAX_LPIPS (the heads).
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from ldm_jax.nn.layers import Conv, Module

VGG_VARIABLE = "LDM_JAX_VGG16"
HEADS_VARIABLE = "LDM_JAX_LPIPS"

VGG16_WIDTHS = (64, 128, 256, 512, 512)
# torchvision's `features.N` index of each convolution, by block; LPIPS' slice n holds block n.
VGG16_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))

# ImageNet's mean and standard deviation of images in [-1, 1], as of LPIPS and torchvision.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
_CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)  # on 0..255

Params = dict[str, Any]


class VGG16Features(Module):
    """The 13 convolutions of VGG-16 (Simonyan & Zisserman 2014, arXiv:1409.1556, configuration D).

    RGB images [b, h, w, 3] in [-1, 1], with h and w of at least 16 -> the feature maps after
    relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3: [b, h // 2**i, w // 2**i, widths[i]], i = 0..4.

    ``preprocess`` belongs to the weights: "torchvision" (mean and deviation of ImageNet) or "caffe"
    (BGR on 0..255 minus the mean).
    """

    widths: Sequence[int] = VGG16_WIDTHS
    preprocess: str = "torchvision"

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        _, h, w, c = images.shape
        if c != 3 or min(h, w) < 16:
            raise ValueError(
                f"VGG16Features takes images [b, h >= 16, w >= 16, 3], not {images.shape}"
            )
        if len(self.widths) != len(VGG16_LAYERS):
            raise ValueError(
                f"VGG16Features: widths={tuple(self.widths)} needs {len(VGG16_LAYERS)} entries"
            )
        x = _PREPROCESS[self.preprocess](images.astype(jnp.float32)).astype(self.dtype)
        maps, conv = [], self.layer(Conv)
        for block, (layers, width) in enumerate(zip(VGG16_LAYERS, self.widths, strict=True), 1):
            if block > 1:
                x = max_pool(x)
            for i in range(1, len(layers) + 1):
                x = nn.relu(conv(width, name=f"conv{block}_{i}")(x))
            maps.append(x)
        return tuple(maps)


class LPIPS(Module):
    """The LPIPS distance with VGG-16 features (arXiv:1801.03924, equation 1).

    Two batches of RGB images [b, h, w, 3] in [-1, 1] -> distances float32 [b], not bounded.
    ``use_dropout`` is the dropout of one half before the heads, which acts only with ``train``: in
    the training of the heads, and in the original also while a first stage is trained.

    With preprocess="caffe" this is an approximation of LPIPS: the published heads were fitted to
    torchvision's VGG-16, not to the Caffe weights. Figures from the two must not be compared.
    """

    widths: Sequence[int] = VGG16_WIDTHS
    preprocess: str = "torchvision"
    use_dropout: bool = True

    @nn.compact
    def __call__(
        self,
        a: jax.Array,
        b: jax.Array,
        train: bool = False,
        uniforms: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """Returns the distances.

        Args:
          a: Images.
          b: As many images.
          train: Whether features are dropped.
          uniforms: Uniform numbers [b, h_i, w_i, widths[i]] of the dropout, which keeps features
            from 0.5 on; else drawn from the rng "dropout".

        Raises:
          ValueError: The shapes differ.
        """
        if a.shape != b.shape:
            raise ValueError(f"LPIPS: the shapes {a.shape} and {b.shape} differ")
        vgg = self.layer(VGG16Features)(self.widths, self.preprocess, name="vgg")
        distance = jnp.zeros(a.shape[0], jnp.float32)
        for i, (fa, fb) in enumerate(zip(vgg(a), vgg(b), strict=True)):
            difference = jnp.square(unit_length(fa) - unit_length(fb))
            if train and self.use_dropout:
                if uniforms is None:
                    u = jax.random.uniform(self.make_rng("dropout"), difference.shape)
                else:
                    u = uniforms[i]
                difference = jnp.where(u >= 0.5, 2.0 * difference, 0.0)
            # The head is a 1x1 convolution to one channel without bias: it commutes with the mean
            # over space.
            head = nn.Dense(1, use_bias=False, precision="highest", name=f"lin{i}")
            distance += head(difference.mean(axis=(1, 2)))[:, 0]
        return distance


def max_pool(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, h // 2, w // 2, c]; an odd last row or column is dropped.

    Of equal numbers the first takes the gradient, as in PyTorch. XLA's own pooling searches it
    again in the backward pass, which is slow on a CPU.
    """
    b, h, w, c = x.shape
    squares = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    rows = [_larger(squares[:, :, i, :, 0], squares[:, :, i, :, 1]) for i in (0, 1)]
    return _larger(*rows)


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def unit_length(x: jax.Array) -> jax.Array:
    """``x`` [..., c] divided by its Euclidean length along c, in float32: x / (|x| + 1e-10).

    Where all channels are zero the gradient is zero. (The original's is NaN there.)
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


# ------------------------------------------------------------------------------------------ weights


def load_vgg16(
    path: str | os.PathLike | None = None, widths: Sequence[int] = VGG16_WIDTHS
) -> tuple[VGG16Features, Params]:
    """Reads VGG-16 from a safetensors file in torchvision's naming.

    Args:
      path: File with ``features.N.weight`` OIHW and ``features.N.bias``; entries ``classifier.*``
        are not used. Its metadata may hold "preprocess", "torchvision" (the default) or the Caffe
        rule. By default the environment variable LDM_JAX_VGG16 names it.
      widths: Channels of the blocks.

    Returns:
      (module, params): ``module.apply({"params": params}, images)``.

    Raises:
      FileNotFoundError: There is no file.
      ValueError: Names or shapes do not fit; the message lists all.
    """
    tensors, metadata = _read(path, VGG_VARIABLE, "VGG-16 weights")
    tensors = {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
    return VGG16Features(tuple(widths), _preprocess_of(metadata)), vgg16_params(tensors, widths)


def load_lpips(
    vgg_path: str | os.PathLike | None = None,
    heads_path: str | os.PathLike | None = None,
    widths: Sequence[int] = VGG16_WIDTHS,
) -> tuple[LPIPS, Params]:
    """Reads LPIPS from VGG-16 and the published heads (``linN.model.1.weight`` [1, c, 1, 1]).

    By default the environment variables LDM_JAX_VGG16 and LDM_JAX_LPIPS name the files. The
    module's ``preprocess`` is that of the VGG file. Returns and raises as `load_vgg16`; for a pair
    of images ``module.apply({"params": params}, a, b)``.
    """
    module, vgg = load_vgg16(vgg_path, widths)
    heads, _ = _read(heads_path, HEADS_VARIABLE, "LPIPS heads")
    params = {"vgg": vgg, **_assemble(heads, _head_names(widths))}
    return LPIPS(module.widths, module.preprocess), params


def vgg16_params(tensors: Mapping[str, np.ndarray], widths: Sequence[int] = VGG16_WIDTHS) -> Params:
    """Parameters of `VGG16Features` from arrays in torchvision's naming; raises as `load_vgg16`."""
    return _assemble(tensors, _vgg_names(widths, "features.{layer}"))


def lpips_params(tensors: Mapping[str, np.ndarray], widths: Sequence[int] = VGG16_WIDTHS) -> Params:
    """Parameters of `LPIPS` from arrays under the names of the original module in checkpoints.

    Those are ``net.sliceN.M.weight``, ``net.sliceN.M.bias`` and ``linN.model.1.weight``. The
    constants ``scaling_layer.*`` may be there and must then be those of LPIPS. Raises as
    `load_vgg16`.
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


# Original name -> (our path, original shape).
_Names = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]


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
    shapes = {f"lin{i}": (1, width, 1, 1) for i, width in enumerate(widths)}
    return {f"{n}.model.1.weight": ((n, "kernel"), shape) for n, shape in shapes.items()}


def _assemble(tensors: Mapping[str, np.ndarray], names: _Names) -> Params:
    problems = {
        "missing": sorted(names.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - names.keys()),
        "misshapen": [
            f"{name} {np.shape(tensors[name])} instead of {shape}"
            for name, (_, shape) in names.items()
            if name in tensors and np.shape(tensors[name]) != shape
        ],
    }
    if any(problems.values()):
        lists = ", ".join(f"{kind} {found}" for kind, found in problems.items())
        raise ValueError(f"the weights do not fit: {lists}")
    params: Params = {}
    for name, ((*parents, leaf), shape) in names.items():
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        value = np.asarray(tensors[name], np.float32)
        if len(shape) == 4:  # OIHW -> HWIO; a head's 1x1 kernel becomes a dense one, [c, 1]
            dense = leaf == "kernel" and shape[2:] == (1, 1)
            value = value[:, :, 0, 0].T if dense else value.transpose(2, 3, 1, 0)
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
    # In words, as in converted Caffe weights: "RGB 0..255 -> BGR, minus mean
    # (103.939,116.779,123.68)".
    if "BGR" in rule and all(str(mean) in rule for mean in _CAFFE_MEAN_BGR):
        return "caffe"
    raise ValueError(f"unknown preprocessing {rule!r}: expected one of {sorted(_PREPROCESS)}")
