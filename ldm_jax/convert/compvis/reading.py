"""A checkpoint of the original (latent-diffusion, Stable Diffusion, taming) as a model here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.convert.compvis.infer import Original, Shapes, loss_config
from ldm_jax.convert.compvis.names import (
    CONDITIONER,
    EMA,
    EMBEDDERS,
    FIRST_STAGE,
    check_is_model,
    harmless,
    unwrap,
)
from ldm_jax.convert.compvis.original import read_yaml
from ldm_jax.convert.compvis.others import of_target
from ldm_jax.convert.compvis.whole import IDENTITIES, Whole
from ldm_jax.convert.converted import MISSING, Converted, Taking, describe
from ldm_jax.convert.originals import config_of, infer, whole_from_config
from ldm_jax.convert.reader.lazy import LazyTensor
from ldm_jax.convert.reader.reader import Checkpoint, open_checkpoint
from ldm_jax.convert.sgm.engine import ENGINE, without_missing
from ldm_jax.convert.tables import Duplicate, Entry, Unused, as_ours, check, nest
from ldm_jax.convert.tables import Path as ParamPath
from ldm_jax.errors import ReaderError, TargetError
from ldm_jax.models.perceptual import VGG16_WIDTHS

_ENDINGS = ("*.ckpt", "*.pt", "*.pth", "*.bin", "*.safetensors", "*.index.json")


def is_compvis(path: Path) -> bool:
    """Whether a path is a file, or a folder that holds a checkpoint and no config.json."""
    if path.is_file():
        return True
    return not (path / "config.json").exists() and any(
        any(path.glob(ending)) for ending in _ENDINGS
    )


def from_compvis(
    path: Path,
    *,
    config: str | Path | Original | None = None,
    ema: bool | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    allow_unexpected: bool = False,
) -> Converted:
    """Reads a latent diffusion model, a UNet, a first stage or a VQGAN from its checkpoint.

    Args:
      path: The .ckpt, .pt or .safetensors, or a folder that holds one.
      config: The original's YAML, or its content; None: inferred from names and shapes.
      ema: Whether to take averaged weights; None: where the file has them.
      dtype: The dtype of floating-point parameters; None: as stored.
      variant: Which variant of a folder's files to read.
      allow_unexpected: Leave out arrays that the model does not have instead of refusing them.

    Raises:
      ReaderError, TargetError or ConversionError: See there.
    """
    with open_checkpoint(path, variant=variant) as checkpoint:
        tensors, place = checkpoint.tensors, checkpoint.place
        if checkpoint.averages and ema is not False:
            tensors, place = checkpoint.averages, "the averaged weights"
        names = unwrap(tensors, path.name)
        tensors = names.tensors
        if config is None:
            check_is_model(tensors, path.name)
        match config:
            case None:
                original = infer(tensors)
            case Original():
                original = config
            case _:
                original = read_yaml(config)
        averaged = any(_is_average(name) for name in tensors)
        if ema and not averaged and place != "the averaged weights":
            raise TargetError(f"{path.name} holds no averages of its weights; leave --ema out")
        original, lacks = _without_missing(original, tensors)
        whole = whole_of(original, tensors, averaged)
        expected = {entry.source for entry in whole.table}
        whys = harmless(tensors.keys() - expected, allow_unexpected=allow_unexpected)
        left_out = [describe(name, tensors[name]) | {"why": why} for name, why in whys.items()]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in whys}
        check(whole.table, tensors, shapes=whole.shapes, where=path.name)
        taking, flat, entries = Taking(dtype), {}, []
        last: tuple[str, np.ndarray] = ("", np.empty(0))  # several entries may share one array
        for entry in whole.table:
            if (tensor := tensors.get(entry.source)) is None:
                continue
            about = describe(names.stored.get(entry.source, entry.source), tensor)
            target, why = _destination(entry, averaged and ema is not False)
            if target is None or not isinstance(entry, Entry):
                left_out.append(about | {"why": why})
                continue
            if last[0] != entry.source:
                last = entry.source, taking.read(entry.source, tensor)
            flat[target] = as_ours(entry, last[1])
            digest = taking.digests[entry.source]
            entries.append(about | {"path": "/".join(target), "sha256": digest})
        taking.check(path.name)
        scale = float(np.asarray(tensors["scale_factor"])) if "scale_factor" in tensors else None
        model_config, params = config_of(original, whole.modules, scale), nest(flat)
        if FIRST_STAGE in lacks:
            model_config["first_stage"] = {"kind": MISSING}
        if "ztsnr" in names.tensors:
            model_config["schedule"]["zero_terminal_snr"] = True
        if {FIRST_STAGE, CONDITIONER} <= lacks.keys():
            model_config = {"kind": "unet", "unet": model_config["unet"]}
            params = {"unet": params["unet"]}
        about = {
            "original": {"target": original.target, "params": original.params},
            "ema": place == "the averaged weights" or (averaged and ema is not False),
            "removed": list(names.notes),
            "beside the weights": _beside(checkpoint),
            "inert classes": checkpoint.standins,
        }
        notes = tuple(f"removed {note}" for note in names.notes)
        if place not in ("", "state_dict", "model"):
            notes = (f"the weights under {place!r}", *notes)
        return Converted(
            model_config,
            params,
            entries,
            left_out,
            (*original.assumed, *notes),
            tuple(lacks.values()),
            about,
        )


def _is_average(name: str) -> bool:
    return name.startswith(EMA) and name not in (f"{EMA}decay", f"{EMA}num_updates")


def _without_missing(
    original: Original, tensors: Mapping[str, Any]
) -> tuple[Original, dict[str, str]]:
    """Returns the description without the parts that a file lacks, and {prefix: line} of those."""
    if original.target == ENGINE:
        return without_missing(original, tensors)
    params, lacks = dict(original.params), {}
    if not isinstance(params.get("unet_config"), Mapping):  # `whole_of` names what is wrong
        return original, lacks
    unet = params["unet_config"].get("params") or {}
    latents = unet.get("out_channels", 3) not in (1, 3)
    there = {
        p: any(n.startswith(p) for n in tensors) for p in (FIRST_STAGE, CONDITIONER, EMBEDDERS)
    }
    section = params.get("first_stage_config")
    stage = section.get("target") if isinstance(section, Mapping) else None
    if not there[FIRST_STAGE] and (stage not in IDENTITIES or (latents and original.assumed)):
        params["first_stage_config"] = {"target": IDENTITIES[-1]}
        lacks[FIRST_STAGE] = "no VAE (first_stage_model.*): give one with --vae PATH"
    section = params.get("cond_stage_config")
    target = section.get("target") if isinstance(section, Mapping) else None
    crosses = unet.get("context_dim") is not None
    stored = target is not None and target not in IDENTITIES
    if not there[CONDITIONER] and not there[EMBEDDERS]:
        if stored and not str(target).endswith("SpatialRescaler"):
            params["cond_stage_config"] = {"target": IDENTITIES[0]}
        # A YAML may describe a model that takes embeddings.
        guessed = latents and target == IDENTITIES[0] and original.assumed
        if crosses and (stored or lacks or guessed):
            lacks[CONDITIONER] = (
                "no text encoder (cond_stage_model.*): the model takes embeddings; give one with"
                " --text_encoder PATH"
            )
    return original._replace(params=params), lacks


def whole_of(original: Original, tensors: Mapping[str, Any], ema: bool = False) -> Whole:
    """Returns the parts and the table of a state dict.

    The names decide with which losses a first stage was saved, often none, whatever the YAML says.

    Raises:
      TargetError: The description cannot be built.
    """
    shapes = Shapes({name: tuple(t.shape) for name, t in tensors.items()})
    params, options = dict(original.params), {}
    try:
        if "unet_config" in params or "network_config" in params:
            options = {"ema": ema}
            loss, vgg = loss_config(shapes, f"{FIRST_STAGE}loss.")
            stage = params["first_stage_config"]
            inner = {**(stage.get("params") or {}), "lossconfig": loss}
            params["first_stage_config"] = {**stage, "params": inner}
        elif of_target(original.target) is not None:
            vgg = ()
        else:
            params["lossconfig"], vgg = loss_config(shapes)
        return whole_from_config(original.target, params, vgg=vgg or VGG16_WIDTHS, **options)
    except (TargetError, ReaderError):
        raise
    except Exception as error:  # whatever a missing section or an odd size makes Flax raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise TargetError(
            f"{original.target} cannot be built: {type(error).__name__}: {reason[:200]}"
        ) from None


def _destination(entry: Entry | Unused | Duplicate, ema: bool) -> tuple[ParamPath | None, str]:
    """Returns (where an entry goes, "") or (None, why it is left out)."""
    match entry:
        case Duplicate(of=of):
            return None, f"the same as {of}"
        case Unused(fixed=True):
            return None, "follows from the configuration, with which it agrees"
        case Unused():
            return None, "no computation needs it"
        case Entry(path=("losses", *_)):
            return None, "of the loss that the first stage was trained with"
        case Entry(path=("scale_factor",)):
            return None, "stands in config.json"
        case Entry(path=("ema", *rest)) if ema:
            return tuple(rest), ""
        case Entry(path=("ema", *_)):
            return None, "an average of the weights, which were taken themselves"
        case Entry(path=("unet", *_)) if ema:
            return None, "its average over training (EMA) was taken"
    return entry.path, ""


def _beside(checkpoint: Checkpoint) -> dict[str, Any]:
    """The numbers and texts saved beside the state dict; of all else, that it was left out."""
    tree = checkpoint.tree if isinstance(checkpoint.tree, dict) else {}

    def short(value: Any) -> bool:
        if isinstance(value, int):
            return abs(value) < 1 << 64
        return isinstance(value, float | str | None)

    return {
        str(k): v if short(v) else "left out: of the original's training"
        for k, v in tree.items()
        if not isinstance(v, LazyTensor) and k not in ("state_dict", checkpoint.place)
    }
