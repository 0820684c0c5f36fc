"""The weight updates of one layer, by the formulas of the methods that train them.

LoRA (arXiv 2106.09685) with LoCon's convolutions and Tucker cores, LoHa (arXiv 2108.06098), LoKr
(arXiv 2309.14859) and DoRA (arXiv 2402.09353), in PyTorch's layouts and float32.
"""

from collections.abc import Mapping

import numpy as np

from ldm_jax.errors import ConversionError

Arrays = Mapping[str, np.ndarray]
# The endings of a layer's arrays -> the role of the array. kohya, LyCORIS, peft, diffusers.
ROLES = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_B.weight": "up",
    "lora_A.weight": "down",
    "lora_B.default.weight": "up",
    "lora_A.default.weight": "down",
    "lora.up.weight": "up",
    "lora.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "diff": "diff",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f"lokr_{name}": f"lokr_{name}"
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
}
_EPS = float(np.finfo(np.float32).eps)


def delta(layer: str, arrays: Arrays, shape: tuple[int, ...], alpha: float | None) -> np.ndarray:
    """Returns the update of a weight at strength 1.

    Args:
      layer: The name of the layer, for messages.
      arrays: {role: array} of the layer.
      shape: The weight's shape in PyTorch's layout, [out, in] or [out, in, h, w].
      alpha: The scale's numerator where the layer has no array of it; None: the rank.

    Raises:
      ConversionError: Arrays are missing or do not fit the weight.
    """
    size = int(np.prod(shape))
    try:
        if "alpha" in arrays:
            alpha = float(arrays["alpha"].reshape(()))
        if "diff" in arrays:
            update, rank = arrays["diff"], None
        elif "up" in arrays and "down" in arrays:
            update, rank = _lora(arrays, size)
        elif {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= arrays.keys():
            update, rank = _loha(arrays, size)
        elif any(role.startswith("lokr_") for role in arrays):
            update, rank = _lokr(layer, arrays, size)
        else:
            names = [f"{layer}: up and down of {sorted(arrays)}"]
            raise ConversionError("the LoRA", missing=names)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        if isinstance(error, ConversionError):  # which is a ValueError
            raise
        found = max(arrays.values(), key=np.size).shape
        raise ConversionError("the LoRA", misshapen=[(layer, found, shape)]) from None
    if update.size != size:
        raise ConversionError("the LoRA", misshapen=[(layer, update.shape, shape)])
    scale = 1.0 if rank is None or alpha is None else alpha / rank
    return (update.reshape(shape) * np.float32(scale)).astype(np.float32, copy=False)


def _fit(found: int, size: int) -> None:
    """Raises ValueError where an update does not have the size of its weight, before it is made."""
    if found != size or not size:
        raise ValueError(f"{found} values, expected {size}")


def _lora(arrays: Arrays, size: int) -> tuple[np.ndarray, int]:
    up, down = arrays["up"], arrays["down"]
    rank = down.shape[0]
    up, down = up.reshape(len(up), -1), down.reshape(rank, -1)
    if "mid" in arrays:
        core = arrays["mid"]
        _fit(len(up) * down.shape[1] * core[0, 0].size, size)
        return np.einsum("oa,abkl,bi->oikl", up, core, down), rank
    _fit(len(up) * down.shape[1], size)
    return up @ down, rank


def _product(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> np.ndarray:
    """Returns a b, or with a core t of Tucker's form the convolution t x a x b."""
    return a @ b if core is None else np.einsum("ijkl,jr,ip->prkl", core, b, a)


def _size(a: np.ndarray, b: np.ndarray, core: np.ndarray | None) -> int:
    """Returns the number of values of `_product`."""
    return len(a) * b.shape[1] if core is None else a.shape[1] * b.shape[1] * core[0, 0].size


def _loha(arrays: Arrays, size: int) -> tuple[np.ndarray, int]:
    factors = []
    for i in (1, 2):
        parts = arrays[f"hada_w{i}_a"], arrays[f"hada_w{i}_b"], arrays.get(f"hada_t{i}")
        _fit(_size(*parts), size)
        factors.append(_product(*parts))
    return factors[0] * factors[1], arrays["hada_w1_b"].shape[0]


def _lokr(layer: str, arrays: Arrays, size: int) -> tuple[np.ndarray, int | None]:
    factors, sizes, rank = [], [], None
    for name in ("lokr_w1", "lokr_w2"):
        whole, a, b = (arrays.get(name + end) for end in ("", "_a", "_b"))
        core = arrays.get("lokr_t2") if name == "lokr_w2" else None
        if whole is not None:
            factors.append((whole,))
            sizes.append(whole.size)
        elif a is not None and b is not None:
            factors.append((a, b, core))
            sizes.append(_size(a, b, core))
            rank = b.shape[0]
        else:
            raise ConversionError("the LoRA", missing=[f"{layer}: {name}"])
    _fit(sizes[0] * sizes[1], size)
    first, second = (f[0] if len(f) == 1 else _product(*f) for f in factors)
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return np.kron(first, second), rank


def decomposed(weight: np.ndarray, update: np.ndarray, magnitude: np.ndarray, strength: float):
    """Returns the weight of DoRA: the direction of weight + update, with learned magnitudes.

    At other strengths than 1 the change of the magnitude is scaled, as LyCORIS does.

    Args:
      weight: The weight in PyTorch's layout.
      update: Its update at strength 1.
      magnitude: [out, 1, ...] or [1, in, ...], which decides the axis of the norms.
      strength: The strength.

    Raises:
      ConversionError: The magnitudes do not fit the weight.
    """
    new = weight + update
    if magnitude.size not in (new.shape[0], new.shape[1]) or magnitude.ndim not in (1, new.ndim):
        raise ConversionError(
            "the LoRA", misshapen=[("dora_scale", magnitude.shape, (new.shape[0], 1))]
        )
    magnitude = magnitude.astype(np.float32).reshape(
        magnitude.shape if magnitude.ndim == new.ndim else (-1, *[1] * (new.ndim - 1))
    )
    axes = tuple(i for i in range(new.ndim) if magnitude.shape[i] == 1)
    norm = np.sqrt(np.square(new).sum(axes, keepdims=True)) + _EPS
    return new * (1 + np.float32(strength) * (magnitude / norm - 1))
