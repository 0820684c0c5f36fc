"""Checkpoints of other programs to models here and back: behind `ldm_jax.load` and ``ldm-convert``.

FORMATS lists what can be read, EXPORTS what can be written. Every array of a file is either a
parameter here or reported as left out with the reason; anything else is an error that lists it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.conditioning import conditioner_class
from ldm_jax.convert.clip import from_clip, is_clip, to_clip
from ldm_jax.convert.compvis.infer import Original
from ldm_jax.convert.compvis.reading import from_compvis, is_compvis
from ldm_jax.convert.compvis.writing import to_compvis
from ldm_jax.convert.converted import MISSING, Converted, report_of
from ldm_jax.convert.diffusers import from_diffusers, is_diffusers, to_diffusers
from ldm_jax.convert.embedding_writing import to_a1111, to_embedding
from ldm_jax.convert.lora.writing import to_kohya, to_peft
from ldm_jax.errors import CheckpointError, TargetError, did_you_mean
from ldm_jax.io.atomic import atomic_path, write_atomic
from ldm_jax.io.checkpoint import find_model, load_model, save_model
from ldm_jax.io.paths import as_path, is_bucket, local_copy
from ldm_jax.models.build import build, check_params

__all__ = ["Converted", "convert", "export", "is_foreign", "read_model", "replace_parts"]


class Format(NamedTuple):
    """A family of checkpoints: whether a path is one, and its reader, called as `read_model`."""

    recognises: Callable[[Path], bool]
    read: Callable[..., Converted]


# The first format that recognises a path reads it.
FORMATS: dict[str, Format] = {
    "diffusers": Format(is_diffusers, from_diffusers),
    "clip": Format(is_clip, from_clip),
    "compvis": Format(is_compvis, from_compvis),
}
# (config, params, the new file or folder).
EXPORTS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], Path], None]] = {
    "compvis": to_compvis,
    "diffusers": to_diffusers,
    "clip": to_clip,
    "a1111": to_a1111,
    "embedding": to_embedding,
    "kohya": to_kohya,
    "peft": to_peft,
}


def is_foreign(path: Path) -> bool:
    """Whether a path is a checkpoint to convert, not a model directory."""
    return any(format.recognises(path) for format in FORMATS.values())


def read_model(
    path: str | Path,
    *,
    config: str | Path | Original | None = None,
    ema: bool | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    allow_unexpected: bool = False,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    clip: str | Path | None = None,
) -> Converted:
    """Converts a checkpoint in memory.

    Args:
      path: A checkpoint file, or a folder of diffusers or with a checkpoint.
      config: The original's YAML, or its content; None: inferred from names and shapes.
      ema: Whether to take averaged weights; None: where the file has them.
      dtype: The dtype of floating-point parameters; None: as stored.
      variant: The variant of a folder's files ("fp16"); None: full precision where it is there.
      allow_unexpected: Leave out arrays that the model does not have instead of refusing them.
      vae: A model or checkpoint whose first stage replaces that of ``path``.
      text_encoder: A model or checkpoint whose text encoder replaces that of ``path``.
      clip: A CLIP model whose text tower makes the vectors of prompts, for a model of embeddings.

    Raises:
      ReaderError, TargetError or ConversionError: The checkpoint cannot be read or converted.
    """
    path = local_copy(path)
    format = next((format for format in FORMATS.values() if format.recognises(path)), None)
    if format is None:
        reason = "there is nothing to convert in it" if path.exists() else "no such file"
        raise TargetError(f"{path} is no checkpoint: {reason}")
    converted = format.read(
        path,
        config=config,
        ema=ema,
        dtype=dtype,
        variant=variant,
        allow_unexpected=allow_unexpected,
    )
    if vae is None and text_encoder is None and clip is None:
        return converted
    config_, params = replace_parts(
        converted.config, converted.params, vae=vae, text_encoder=text_encoder, clip=clip
    )
    given = [word for word, part in (("VAE", vae), ("text encoder", text_encoder or clip)) if part]
    lacks = tuple(
        line for line in converted.lacks if not any(f"no {word}" in line for word in given)
    )
    return converted._replace(config=config_, params=params, lacks=lacks)


def replace_parts(
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    clip: str | Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a latent diffusion model with its first stage or text encoder taken from elsewhere.

    Args:
      config: The config of the model.
      params: Its parameters.
      vae: A model directory, checkpoint or diffusers folder that is or has a first stage.
      text_encoder: The same for a text encoder.
      clip: A CLIP model, whose text tower a model of embeddings gets beside its own condition.

    Raises:
      TargetError: There is no such part in the given model, or it does not fit.
    """
    config, params = dict(config), dict(params)
    for part, source in (("first_stage", vae), ("conditioner", text_encoder)):
        if source is None:
            continue
        if config.get("kind") != "latent_diffusion":
            raise TargetError(f"a {config.get('kind')} takes no {part.replace('_', ' ')}")
        other, others = read_any(source)
        section = other.get(part)
        if section is None or section.get("kind") in (MISSING, "identity", "none", "embeddings"):
            raise TargetError(f"{source} is a {other.get('kind')} without a {part}")
        if part == "first_stage":
            channels, here = section["embed_dim"], config["unet"]["out_channels"]
            if channels != here:
                raise TargetError(
                    f"{source} has {channels} latent channels, the model {here}: another VAE"
                )
            if "scale_factor" in other and config.get("first_stage", {}).get("kind") == MISSING:
                config["scale_factor"] = other["scale_factor"]
        elif "text" in config[part]:
            section = {**config[part], "text": section}
        config[part], params[part] = section, others[part]
    if clip is not None:
        other, others = read_any(clip)
        if other.get("kind") != "clip":
            raise TargetError(f"{clip} is a {other.get('kind')}, not a CLIP model")
        fields = config.get("conditioner", {"kind": "none"})
        try:
            section = conditioner_class(fields).with_clip(fields, other["conditioner"])
        except ValueError as error:
            raise TargetError(f"{clip}: {error}") from None
        config["conditioner"], params["conditioner"] = section, others["conditioner"]
    return config, params


def read_any(path: str | Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns (config, parameters) of a model directory, or of a checkpoint converted in memory."""
    path = local_copy(path)
    if is_foreign(path):
        converted = read_model(path)
        return converted.config, converted.params
    return load_model(path)


def convert(
    source: str | Path, out: str | Path, *, report: str | Path | None = None, **options: Any
) -> Converted:
    """Converts ``source`` to the model directory ``out`` and writes a report.

    Args:
      source: The checkpoint.
      out: The new model directory.
      report: The report; None: ``out``/conversion.json.
      **options: As for `read_model`.

    Raises:
      CheckpointError: ``out`` or ``report`` exists already.
      ReaderError, TargetError or ConversionError: The checkpoint cannot be read or converted.
    """
    out = as_path(out)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; give a new folder or remove it first")
    if report is not None:
        check_new(as_path(report))
    converted = read_model(source, **options)
    config, params = converted.config, converted.params
    if config["kind"] == "latent_diffusion" and config["first_stage"]["kind"] != MISSING:
        check_params(build(config, {"conditioner": {}, **params}, params.get("first_stage")))
    save_model(out, config, params, dtype=None)
    text = report_of(as_path(source), converted, options.get("dtype"))
    write_atomic(report or out / "conversion.json", text)
    return converted


def export(model: str | Path, to: str, out: str | Path) -> None:
    """Writes a model directory, or a model that ships with the package, in the layout ``to``.

    Raises:
      CheckpointError: ``out`` exists already.
      TargetError: The layout is unknown or cannot hold the model.
    """
    if to not in EXPORTS:
        raise TargetError(f"cannot write {to!r}{did_you_mean(to, EXPORTS)}")
    config, params = load_model(find_model(model))
    if config.get("first_stage", {}).get("kind") == MISSING:
        raise TargetError(f"{model} has no first stage; convert it with --vae PATH")
    out, arrays = check_new(as_path(out)), jax.tree.map(np.asarray, params)
    if not is_bucket(out):
        EXPORTS[to](config, arrays, out)
        return
    with atomic_path(out) as temporary:
        EXPORTS[to](config, arrays, temporary)


def check_new(path: Path) -> Path:
    """Returns ``path``; raises CheckpointError where it exists or cannot be created."""
    if path.exists():
        raise CheckpointError(f"{path} is already there; give a new name or remove it first")
    if not is_bucket(path) and not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: {path.absolute().parent} is no folder")
    return path
