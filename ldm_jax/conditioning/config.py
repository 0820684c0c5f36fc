"""From a training config to its condition: what the data give, what the model directory gives."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.conditioning import Conditioner, RowCondition, conditioner_class, make_conditioner
from ldm_jax.data import make_source
from ldm_jax.data.captions import CAPTION_SETTINGS
from ldm_jax.errors import ConfigError, DataError
from ldm_jax.io.checkpoint import find_model, load_model

# Fields of "data" that say how it is read, not where it is.
READING = (
    *("size", "buckets", "channels", "values", "crop", "min_crop", "flip"),
    *("cache", "num_workers", "condition", "prior"),
)


def source_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `make_source` in a config's "data"."""
    unused = (*READING, *CAPTION_SETTINGS)
    return {name: value for name, value in data.items() if name not in unused}


def row_condition(config: Mapping[str, Any]) -> RowCondition | None:
    """Returns what makes a training row's condition; None for captions, or for no condition.

    "data.condition" of the plain config holds the settings (``column``, ``kinds`` ...); sizes
    follow from "model.conditioner", names from "model.classes" or from the data.
    """
    fields = config["model"].get("conditioner", {"kind": "none"})
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config["data"]["condition"].items()
    }
    cls = conditioner_class(fields)
    try:
        return cls.row_condition(fields, settings, lambda: class_names(config, cls))
    except TypeError as error:  # of the dataclass: a setting that does not exist, or is missing
        text = str(error).split("() ", 1)[-1]
        text = re.sub("got an unexpected keyword argument (.*)", r"field \1 does not exist", text)
        raise ConfigError(f"data.condition: {text.replace(' required positional', '')}") from None
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(
            text if text.startswith("model.") else f"data.condition: {text}"
        ) from None


def class_names(config: Mapping[str, Any], cls: type[Conditioner]) -> tuple[str, ...]:
    """Returns model.classes, else the names in the data's column."""
    column = config["data"]["condition"].get("column")
    if config["model"].get("classes") or not column:
        return tuple(config["model"].get("classes") or ())
    return names_in_data(json.dumps(source_settings(config["data"])), column, cls)


@lru_cache(maxsize=4)  # both loaders and the task need the same names
def names_in_data(settings: str, column: str, cls: type[Conditioner]) -> tuple[str, ...]:
    """Returns `names_in_rows` of a data set."""
    rows = make_source({**json.loads(settings), "part": "all"}).rows
    return names_in_rows(rows, column, cls)


def names_in_rows(
    rows: Iterable[Mapping[str, Any]], column: str, cls: type[Conditioner]
) -> tuple[str, ...]:
    """Returns the sorted names in a column; () where it holds numbers."""
    found = {label for row in rows for label in cls.row_labels(row, column)}
    names = sorted(value for value in found if isinstance(value, str))
    if names and len(names) != len(found):
        other = next(value for value in found if not isinstance(value, str))
        raise DataError(f"column {column!r} holds names and {other!r}: every row needs a name")
    return tuple(names)


def complete_model(
    model: Mapping[str, Any], condition: RowCondition | None, dropout: float
) -> dict[str, Any]:
    """Returns a model config with the names of classes, and what follows from them, filled in."""
    fields = model.get("conditioner", {})
    try:
        completed = conditioner_class(fields).complete(fields, condition, dropout)
    except ValueError as error:
        raise ConfigError(f"model.conditioner.{error}") from None
    names = getattr(condition, "names", ())
    done = {**model, "conditioner": completed} | ({"classes": list(names)} if names else {})
    if follows := conditioner_class(fields).unet_fields(completed):
        done["unet"] = unet = {**follows, **model.get("unet", {})}
        for name, value in follows.items():
            if unet[name] != value:
                raise ConfigError(f"model.unet.{name} is {unet[name]}: the condition needs {value}")
    return done


def frozen_conditioner(
    fields: Mapping[str, Any], weights: bool = True
) -> tuple[dict[str, Any], Any]:
    """Returns a config's conditioner without "path" and "frozen", and its parameters.

    The parameters are None where they are trained. A frozen conditioner is that of the model
    directory "path", which gives the fields that the config leaves out; for a kind with a section
    "text" all of this is about that. Without ``weights`` no file is read: shapes stand for the
    parameters.
    """
    fields = dict(fields)
    if isinstance(fields.get("text"), Mapping):
        fields["text"], params = frozen_conditioner(fields["text"], weights)
        return fields, params
    part = conditioner_class(fields).pretrained
    path, frozen = fields.pop("path", None), fields.pop("frozen", part is not None)
    if not frozen:
        if path and weights:
            raise ConfigError(
                "model.conditioner.path is where a frozen conditioner comes from: set "
                "model.conditioner.frozen too"
            )
        return fields, None
    untrained = fields.pop("untrained", False)
    if not weights or (untrained and not path):
        init, key = make_conditioner(fields, jnp.float32).init, jax.random.key(0)
        return fields, jax.jit(init)(key) if weights else jax.eval_shape(init, key)
    if not path:
        raise ConfigError(
            "model.conditioner.frozen: give the model directory that its parameters come from as "
            "model.conditioner.path"
        )
    saved, params = load_model(find_model(path))
    if (part := part or "conditioner") not in params:
        raise ConfigError(f"model.conditioner.path {path} has no {part} with parameters")
    own = {k: v for k, v in saved[part].items() if k != "kind" or part == "conditioner"}
    return _merged(own, json.loads(json.dumps(fields)), str(path)), params[part]


def _merged(saved: Mapping[str, Any], fields: Mapping[str, Any], path: str, at: str = "") -> dict:
    """Returns the saved fields with those given; both must agree, in sections too."""
    merged = {**saved, **fields}
    for name, value in saved.items():
        if isinstance(value, Mapping) and isinstance(merged[name], Mapping):
            merged[name] = _merged(value, merged[name], path, f"{at}{name}.")
        elif merged[name] != value:
            raise ConfigError(
                f"model.conditioner.{at}{name} is not that of {path}, {value!r}: leave it out"
            )
    return merged


def check_sizes(model: Any, size: tuple[int, int]) -> None:
    """Raises ConfigError where conditions do not fit latents of pictures of ``size`` (H, W)."""
    conditioner, stage = model.conditioner, model.first_stage
    latent = (size[0] // stage.downsampling, size[1] // stage.downsampling)
    multiple = stage.downsampling * model.multiple
    if size[0] % multiple or size[1] % multiple:
        raise ConfigError(
            f"pictures of {size} do not divide over the levels of this model: "
            f"their sides must be multiples of {multiple} pixels"
        )
    try:
        conditioner.check_size(size, latent)
    except ValueError as error:
        text = str(error)
        where = "" if text.startswith("model.") else "model.conditioner."
        raise ConfigError(where + text) from None
    cond = jax.eval_shape(
        lambda: conditioner(conditioner.init(jax.random.key(0)), conditioner.encode_null(1))
    )
    if cond.concat is not None and cond.concat.shape[1:3] != latent:
        raise ConfigError(
            f"model.conditioner brings maps to {cond.concat.shape[1:3]}: latents of pictures of "
            f"{size} are {latent}"
        )
    joined = 0 if cond.concat is None else cond.concat.shape[-1]
    channels = stage.channels + joined
    if model.unet.in_channels != channels:
        raise ConfigError(
            f"model.unet.in_channels is {model.unet.in_channels}: the latents have "
            f"{stage.channels} channels and their condition {joined}, {channels} together"
        )
