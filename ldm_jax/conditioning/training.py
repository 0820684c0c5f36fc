"""Between the data and the conditioner: which condition a config's model needs of the data, and how a loader's batch becomes what it reads."""

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from ldm_jax.conditioning.base import (
    Conditioner,
    Embeddings,
    Hybrid,
    Joined,
    RescaledMap,
    joined_of,
)
from ldm_jax.conditioning.columns import (
    ClassOf,
    LabelMap,
    Layout,
    Mask,
    SmallPicture,
    Vectors,
    class_names,
)
from ldm_jax.data import make_source
from ldm_jax.data.transforms import Condition
from ldm_jax.errors import ConfigError
from ldm_jax.io.checkpoint import find_model, load_model
from ldm_jax.models.ldm import LatentDiffusion, construct

# Settings of data that say how it is read, not where it lies.
READING = ("size", "crop", "min_crop", "flip", "caption", "cache", "num_workers", "condition")


def source_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """What `make_source` is asked for by a config's "data"."""
    return {name: value for name, value in data.items() if name not in READING}


def make_condition(config: Mapping[str, Any]) -> Condition | None:
    """The condition that a plain config's model needs of the data beside the caption; None for text, or for none at all.

    "data.condition" has the settings of its class (``column``, ``kinds`` ...), the model the rest: its "conditioner" sizes, its "classes" names.
    """
    conditioner, settings = (
        config["model"].get("conditioner", {}),
        dict(config["data"]["condition"]),
    )
    kind = conditioner.get("kind")
    if kind == "hybrid":  # the text is the caption
        kind, conditioner = "joined", conditioner.get("joined", {})
        if not str(conditioner.get("of")).startswith("masked"):
            raise ConfigError(
                "model.conditioner.joined.of must be 'masked', 'masked_sd' or 'masked_filled' beside text"
            )
    if kind == "joined":
        kind = conditioner.get("of", "picture")
    if kind == "class":
        return construct(ClassOf, "data.condition", settings, names=_names(config))
    if kind in ("masked", "masked_sd", "masked_filled"):
        return construct(Mask, "data.condition", settings)
    if kind == "picture":
        return construct(
            SmallPicture,
            "data.condition",
            settings,
            size=tuple(conditioner.get("size", Joined.size)),
        )
    if kind == "rescale":
        if conditioner.get("in_channels", 3) == 3:  # sampling takes three channels for a picture's
            raise ConfigError(
                "model.conditioner.in_channels is 3, which is for pictures: maps of labels need 4 or more"
            )
        return construct(
            LabelMap, "data.condition", settings, labels=conditioner.get("in_channels", 3)
        )
    if kind == "tokens":
        sizes = {
            "length": conditioner.get("max_seq_len", 77),
            "vocabulary": conditioner.get("vocab_size", 30522),
        }
        return construct(Layout, "data.condition", settings, **sizes, names=_names(config))
    if kind == "embeddings":
        sizes = {
            "count": conditioner.get("count", Embeddings.count),
            "dim": conditioner.get("dim", 0),
        }
        return construct(Vectors, "data.condition", settings, **sizes)
    if settings:
        raise ConfigError(
            f"data.condition: a conditioner of the kind {kind!r} takes none: leave it empty"
        )
    return None


def _names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """model.classes, else the names in the data's column, of all their parts."""
    if config["model"].get("classes"):
        return tuple(config["model"]["classes"])
    column = config["data"]["condition"].get("column")
    if not column:
        return ()
    return _names_in(
        json.dumps(source_settings(config["data"])),
        column,
        config["model"]["conditioner"]["kind"] == "tokens",
    )


@lru_cache(maxsize=4)  # two loaders and the task ask for the same
def _names_in(settings: str, column: str, boxes: bool) -> tuple[str, ...]:
    return tuple(
        class_names(make_source({**json.loads(settings), "part": "all"}).rows, column, boxes)
    )


def name_classes(model: dict[str, Any], condition: Condition | None, dropout: float) -> None:
    """Puts the names of classes into a model config, and how many there are where that is not said: one more, last, is the null class."""
    if not isinstance(condition, ClassOf | Layout):
        return
    if condition.names:
        model["classes"] = list(condition.names)
    if isinstance(condition, Layout):
        return
    conditioner, known = model["conditioner"], len(condition.names)
    if "n_classes" not in conditioner:
        if not known:
            raise ConfigError(
                "model.conditioner.n_classes is missing: the classes have no names to count; add one for the null class"
            )
        conditioner["n_classes"] = known + 1
    if conditioner["n_classes"] < known + (dropout > 0):
        raise ConfigError(
            f"model.conditioner.n_classes is {conditioner['n_classes']}: there are {known} classes, and loss.caption_dropout needs one more"
        )


def load_frozen(conditioner: dict[str, Any]) -> Any:
    """Parameters of a conditioner that is not trained ("frozen", from the model directory "path"), else None; takes both entries out of its config.

    Entries that the config does not give are those of the directory. Of a "hybrid" all of this is about its "text".
    """
    if conditioner.get("kind") == "hybrid" and isinstance(conditioner.get("text"), dict):
        return load_frozen(conditioner["text"])
    path, frozen = conditioner.pop("path", None), conditioner.pop("frozen", False)
    if not frozen and path:
        raise ConfigError(
            "model.conditioner.path is where a frozen conditioner comes from: set model.conditioner.frozen too"
        )
    if not frozen:
        return None
    if not path:
        raise ConfigError(
            "model.conditioner.frozen: give the model directory that its parameters come from as model.conditioner.path"
        )
    saved, params = load_model(find_model(path))
    if "conditioner" not in params:
        raise ConfigError(f"model.conditioner.path {path} has no conditioner with parameters")
    merged = {**saved["conditioner"], **conditioner}
    if different := [k for k in saved["conditioner"] if merged[k] != saved["conditioner"][k]]:
        raise ConfigError(
            f"model.conditioner.{different[0]} is not that of {path}, {saved['conditioner'][different[0]]!r}: leave it out"
        )
    conditioner.update(merged)
    return params["conditioner"]


@dataclasses.dataclass(frozen=True)
class Conditions:
    """A loader's batches -> what the conditioner's ``__call__`` takes; see `make_condition`."""

    conditioner: Conditioner
    condition: Condition | None

    def encode(self, raw: Mapping[str, Any]) -> Any:
        """Host arrays [b, ...]. Those of inpainting are the masks: their latents are made on the device, in the step."""
        if "encoded" in raw:  # of the latent cache
            return raw["encoded"]
        if isinstance(self.conditioner, Hybrid):
            return {
                "text": self.conditioner.text.encode(raw["caption"]),
                "joined": raw["condition"],
            }
        if self.condition is None:
            return self.conditioner.encode(raw["caption"])
        if isinstance(self.condition, Mask):
            return raw["condition"]
        if isinstance(self.condition, SmallPicture):
            return self.conditioner.encode(raw["condition"] / np.float32(127.5) - 1)
        return self.conditioner.encode(raw["condition"])

    def null(self) -> Any:
        """The condition of one row that takes the place of those that are dropped; of a `Hybrid`, of its text, which alone is dropped."""
        if isinstance(self.conditioner, Hybrid):
            return self.conditioner.text.encode_null(1)
        if isinstance(self.conditioner, RescaledMap) and isinstance(self.condition, LabelMap):
            return self.conditioner.no_labels(1)
        return self.conditioner.encode_null(1)


def check_sizes(model: LatentDiffusion, size: tuple[int, int]) -> None:
    """ConfigError where conditions do not fit latents of pictures of ``size``."""
    conditioner, f = model.conditioner, model.first_stage.downsampling
    latent = (size[0] // f, size[1] // f)
    if (part := joined_of(conditioner)) is not None and tuple(part.size) != latent:
        where = "model.conditioner.size" if part is conditioner else "model.conditioner.joined.size"
        raise ConfigError(
            f"{where} is {tuple(part.size)}: latents of pictures of {size} are {latent}"
        )
    if isinstance(conditioner, RescaledMap) and tuple(conditioner.size) != size:
        raise ConfigError(
            f"model.conditioner.size is {tuple(conditioner.size)}: maps are cut as the pictures are, data.size={size}"
        )
    cond = jax.eval_shape(
        lambda: conditioner(conditioner.init(jax.random.key(0)), conditioner.encode_null(1))
    )
    if cond.concat is not None and cond.concat.shape[1:3] != latent:
        raise ConfigError(
            f"model.conditioner brings maps to {cond.concat.shape[1:3]}: latents of pictures of {size} are {latent}"
        )
    joined = 0 if cond.concat is None else cond.concat.shape[-1]
    channels = model.first_stage.channels + joined
    if model.unet.in_channels != channels:
        raise ConfigError(
            f"model.unet.in_channels is {model.unet.in_channels}: the latents have {model.first_stage.channels} channels "
            f"and their condition {joined}, {channels} together"
        )
