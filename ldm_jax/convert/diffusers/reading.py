"""A folder of diffusers as a model here."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_jax.convert.converted import Converted, Taking, describe
from ldm_jax.convert.diffusers import sdxl, second
from ldm_jax.convert.diffusers.components import (
    COMPONENTS,
    LEFT_OUT,
    MODULES,
    PIPELINES,
    class_of,
    read_json,
)
from ldm_jax.convert.diffusers.configs import Config
from ldm_jax.convert.diffusers.schedulers import schedule_from
from ldm_jax.convert.diffusers.tables import TABLES, join_qkv, modern, shapes_of
from ldm_jax.convert.diffusers.vocabulary import TOKENIZERS, read_tokenizer
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Entry, source_shapes, to_ours
from ldm_jax.errors import ConfigError, ConversionError, TargetError, did_you_mean
from ldm_jax.models.unet import UNet

_INPAINTING = "StableDiffusionInpaintPipeline"
_OFFSETTING = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", _INPAINTING)


def is_diffusers(path: str | Path) -> bool:
    """Whether a path is a pipeline folder, a component folder or the weights inside of one."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        return True
    folder = path.parent if path.is_file() else path
    try:
        return class_of(read_json(folder / "config.json")) in COMPONENTS
    except TargetError:
        return False


def from_diffusers(
    path: str | Path,
    *,
    config: Any = None,
    ema: bool | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    allow_unexpected: bool = False,
) -> Converted:
    """Reads a pipeline folder, or a component as a "first_stage", "unet" or "conditioner".

    Tensors are read one at a time.

    Args:
      path: The folder, or the weights inside a component folder.
      config: Must be None: the folder describes itself.
      ema: Must not be True: a folder holds one set of weights.
      dtype: The dtype of floating-point parameters; None: as stored.
      variant: Which variant of the weights to read ("fp16"); None: full precision where there is.
      allow_unexpected: Leave out arrays that the model does not have instead of refusing them.

    Raises:
      ReaderError, TargetError or ConversionError: See there.
    """
    path = Path(path)
    path = path.parent if path.is_file() else path
    if config is not None:
        raise TargetError(f"{path} describes itself: leave the YAML out")
    if ema:
        raise TargetError(f"{path} holds no averages beside its weights: leave ema out")
    reading = _Reading(dtype, variant, allow_unexpected)
    if (path / "model_index.json").is_file():
        model_config, params = reading.pipeline(path)
    else:
        part, section, arrays = reading.component(path)
        model_config, params = {"kind": part, part: section}, {part: arrays}
    model_config = json.loads(json.dumps(model_config))  # tuples are lists in a config.json
    reading.taking.check(str(path))
    return Converted(
        model_config, params, reading.entries, reading.left_out, tuple(reading.assumed)
    )


class _Reading:
    """One conversion: its options, and what it collects for the report."""

    def __init__(self, dtype: str | None, variant: str | None, allow_unexpected: bool):
        self.taking, self.variant, self.allow_unexpected = Taking(dtype), variant, allow_unexpected
        self.entries: list[Config] = []
        self.left_out: list[Config] = []
        self.assumed: list[str] = []

    def component(
        self, folder: Path, only: str | None = None, at: tuple[str, ...] = ()
    ) -> tuple[str, Config, Any]:
        """Returns (part, section, parameters) of a component folder of the part ``only``.

        ``at`` is the place of its parameters inside those of the part.
        """
        given = read_json(folder / "config.json")
        name = class_of(given)
        if name not in COMPONENTS or only not in (None, COMPONENTS[name].part):
            known = [known for known in COMPONENTS if only in (None, COMPONENTS[known].part)]
            raise TargetError(f"{folder}: {name} is not supported{did_you_mean(name, known)}")
        part = COMPONENTS[name].part
        with _understood(folder / "config.json"):
            section = COMPONENTS[name].section(given)
            module = MODULES[part]({part: section})
            table, shapes = TABLES[type(module)](module), shapes_of(module)
        digests: dict[str, str] = {}
        with open_checkpoint(folder, variant=self.variant) as checkpoint:
            if checkpoint.variant and self.variant is None:
                self.assumed.append(
                    f"{folder.name} in {checkpoint.variant}: the folder has no full precision"
                )
            found = modern(checkpoint.tensors, source_shapes(table, shapes))
            found = self._expected(folder, found, {entry.source for entry in table})
            stored = {name: describe(f"{folder.name}/{name}", tensor) for name, tensor in found}
            taken = [
                (name, self.taking.lazy(f"{folder.name}/{name}", tensor)) for name, tensor in found
            ]
            params = to_ours(table, taken, shapes=shapes, where=str(folder))
            digests = self.taking.digests
        for entry in (entry for entry in table if entry.source in stored):
            about = stored[entry.source]
            if isinstance(entry, Entry):
                place = {
                    "path": "/".join((part, *at, *entry.path)),
                    "sha256": digests[about["source"]],
                }
                self.entries.append(about | place)
            else:
                self.left_out.append(about | {"why": "no computation needs it"})
        return part, section, join_qkv(module, params) if isinstance(module, UNet) else params

    def _expected(
        self, folder: Path, found: list[tuple[str, Any]], expected: set[str]
    ) -> list[tuple[str, Any]]:
        """Returns ``found`` without the arrays that no model needs, which are reported."""
        kept = []
        for name, tensor in found:
            why = None
            if name not in expected:
                if name.endswith((".position_ids", "logit_scale")) or "text_projection" in name:
                    why = "no computation needs it"
                elif self.allow_unexpected:
                    why = "not expected; --allow_unexpected"
            if why is None:
                kept.append((name, tensor))
            else:
                self.left_out.append(describe(f"{folder.name}/{name}", tensor) | {"why": why})
        return kept

    def pipeline(self, path: Path) -> tuple[Config, dict[str, Any]]:
        """Returns (config, parameters) of a pipeline folder."""
        index = read_json(path / "model_index.json")
        name = class_of(index)
        if name not in PIPELINES:
            raise TargetError(
                f"{path}: the pipeline {name} is not supported{did_you_mean(name, PIPELINES)}"
            )
        roles = PIPELINES[name]
        there = {
            k for k, v in index.items() if not k.startswith("_") and v not in (None, [None, None])
        }
        towers = {t: folders for t, folders in roles.towers.items() if folders[0] in there}
        used = {"scheduler", *roles.folders.values(), *(folder for folder, _ in towers.values())}
        if unknown := sorted(there - used - LEFT_OUT.keys()):
            raise TargetError(f"{path}: {name} with the component {unknown[0]} is not supported")
        if missing := sorted(used - there):
            raise TargetError(f"{path}: model_index.json lacks the component {missing[0]}")
        config: Config = {
            "kind": "latent_diffusion",
            **self._schedule(path, name),
            "conditioner": {"kind": "none"},
        }
        self.left_out += [
            {"source": s, "why": LEFT_OUT[s]} for s in sorted(there & LEFT_OUT.keys())
        ]
        params: dict[str, Any] = {"conditioner": {}}
        for part, folder in roles.folders.items():
            _, config[part], params[part] = self.component(path / folder, only=part)
        sections: Config = {}
        for tower, (folder, tokenizer) in towers.items():
            _, section, arrays = self.component(path / folder, only="conditioner", at=(tower,))
            sections[tower] = section | self._tokenizer(path / tokenizer, "clip", section)
            params["conditioner"][tower] = arrays
        if roles.towers:
            if "clip_g" not in sections:
                raise TargetError(f"{path}: model_index.json lacks the component text_encoder_2")
            with _understood(path / "unet"):
                given = read_json(path / "unet" / "config.json")
                config["conditioner"] = sdxl.section_of(index, given, sections)
        with _understood(path):
            stage = read_json(path / roles.folders["first_stage"] / "config.json")
            config["scale_factor"] = float(stage.get("scaling_factor", 0.18215))
            sides, factor = latent_size(path), 2 ** (len(config["first_stage"]["ch_mult"]) - 1)
        kind, channels = config["conditioner"]["kind"], config["first_stage"]["embed_dim"]
        if kind in TOKENIZERS:
            config["conditioner"] |= self._tokenizer(
                path / "tokenizer", kind, config["conditioner"]
            )
        extra = config["unet"]["in_channels"] - channels
        beside = second.BESIDE.get(name)
        if beside is not None and extra == beside.channels:
            file = second.scheduler_file(path)
            scheduler = read_json(file) if file.is_file() else None
            with _understood(path):
                config["conditioner"] = second.section_of(
                    name, index, config["conditioner"], sides, factor, scheduler
                )
        elif name == "LDMSuperResolutionPipeline":
            config["scale_factor"] = 1.0  # that pipeline does not scale
            joined = {"channels": extra, "of": "picture", "size": list(sides)}
            config["conditioner"] = {"kind": "joined", **joined}
        elif extra and (name, extra) != (_INPAINTING, channels + 1):
            raise TargetError(
                f"{path}: its UNet takes {extra} channels beside the latent's, which {name} does"
                " not give it"
            )
        elif extra:  # without extra channels the mask is a matter of sampling alone
            joined = {"channels": extra, "of": "masked_sd", "size": list(sides)}
            config["conditioner"] = {
                "kind": "hybrid",
                "text": config["conditioner"],
                "joined": joined,
            }
        size = [side * factor for side in sides]
        config["sampling"] |= {"size": size, "guidance": roles.guidance}
        return config, params

    def _tokenizer(self, folder: Path, kind: str, section: Config) -> Config:
        """Returns the fields of a text condition that its tokenizer folder decides."""
        fields = read_tokenizer(folder, kind, section)
        for field, value in fields.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            self.assumed.append(f"{field.replace('_', ' ')} {shown}: of the {folder.name} folder")
        return fields

    def _schedule(self, path: Path, name: str) -> Config:
        scheduler = read_json(path / "scheduler" / "scheduler_config.json")
        kind = class_of(scheduler)
        if name in _OFFSETTING and kind in ("DDIMScheduler", "PNDMScheduler"):
            # The pipeline itself does so with files older than these fields.
            scheduler |= {"steps_offset": 1}
            if kind == "DDIMScheduler":
                scheduler |= {"clip_sample": False}
        with _understood(path / "scheduler"):
            schedule, notes = schedule_from(scheduler)
        self.assumed += notes
        return schedule


def latent_size(path: Path) -> tuple[int, int]:
    """Returns (height, width) of a pipeline's latents: its UNet's ``sample_size``, or 64."""
    size = read_json(path / "unet" / "config.json").get("sample_size") or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


@contextmanager
def _understood(what: Path) -> Iterator[None]:
    """Turns whatever a field of the wrong kind makes Python raise into a TargetError."""
    try:
        yield
    except (TargetError, ConfigError, ConversionError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TargetError(f"{what} is not understood: {reason}") from error
