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
    if "alpha" in arrays:
        alpha = float(arrays["alpha"].reshape(()))
    if "diff" in arrays:
        update, rank = arrays["diff"], None
    elif "up" in arrays and "down" in arrays:
        update, rank = _lora(arrays)
    elif {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= arrays.keys():
        update, rank = _loha(arrays)
    elif any(role.startswith("lokr_") for role in arrays):
        update, rank = _lokr(layer, arrays)
    else:
        raise ConversionError("the LoRA", missing=[f"{layer}: up and down of {sorted(arrays)}"])
    if update.size != int(np.prod(shape)):
        raise ConversionError("the LoRA", misshapen=[(layer, update.shape, shape)])
    scale = 1.0 if rank is None or alpha is None else alpha / rank
    return (update.reshape(shape) * np.float32(scale)).astype(np.float32, copy=False)


def _lora(arrays: Arrays) -> tuple[np.ndarray, int]:
    up, down = arrays["up"], arrays["down"]
    rank = down.shape[0]
    if "mid" in arrays:
        up, down = up.reshape(len(up), -1), down.reshape(rank, -1)
        return np.einsum("oa,abkl,bi->oikl", up, arrays["mid"], down), rank
    return up.reshape(len(up), -1) @ down.reshape(rank, -1), rank


def _tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ijkl,jr,ip->prkl", core, b, a)


def _loha(arrays: Arrays) -> tuple[np.ndarray, int]:
    factors = []
    for i in (1, 2):
        a, b = arrays[f"hada_w{i}_a"], arrays[f"hada_w{i}_b"]
        core = arrays.get(f"hada_t{i}")
        factors.append(a @ b if core is None else _tucker(core, a, b))
    return factors[0] * factors[1], arrays["hada_w1_b"].shape[0]


def _lokr(layer: str, arrays: Arrays) -> tuple[np.ndarray, int | None]:
    factors, rank = [], None
    for name in ("lokr_w1", "lokr_w2"):
        whole, a, b = (arrays.get(name + end) for end in ("", "_a", "_b"))
        core = arrays.get("lokr_t2") if name == "lokr_w2" else None
        if whole is not None:
            factors.append(whole)
        elif a is not None and b is not None:
            factors.append(a @ b if core is None else _tucker(core, a, b))
            rank = b.shape[0]
        else:
            raise ConversionError("the LoRA", missing=[f"{layer}: {name}"])
    first, second = factors
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
    """
    new = weight + update
    magnitude = magnitude.astype(np.float32).reshape(
        magnitude.shape if magnitude.ndim == new.ndim else (-1, *[1] * (new.ndim - 1))
    )
    axes = tuple(i for i in range(new.ndim) if magnitude.shape[i] == 1)
    norm = np.sqrt(np.square(new).sum(axes, keepdims=True)) + _EPS
    return new * (1 + np.float32(strength) * (magnitude / norm - 1))
