"""Net2NetTransformer of taming-transformers: a transformer over the codes of a first stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm_jax.convert.compvis.infer import Original, Shapes
from ldm_jax.convert.compvis.infer import first_stage as infer_first_stage
from ldm_jax.convert.compvis.names import CONDITIONER, FIRST_STAGE
from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.original import fields_of, first_stage_of, first_stage_section
from ldm_jax.convert.compvis.targets import module_from_config, pick_params
from ldm_jax.convert.compvis.whole import UNCONDITIONAL, Whole, first_stage
from ldm_jax.convert.tables import constant, under
from ldm_jax.errors import TargetError, did_you_mean
from ldm_jax.models.gpt import GPT
from ldm_jax.models.perceptual import VGG16_WIDTHS
from ldm_jax.models.permuter import PERMUTERS
from ldm_jax.models.vqgan import VQModel

TARGET = "taming.models.cond_transformer.Net2NetTransformer"
_GPT, _PERMUTER = "taming.modules.transformer.mingpt.GPT", "taming.modules.transformer.permuter"
_LABELATOR, _SOS = "taming.modules.util.Labelator", "taming.modules.util.SOSProvider"
_COORD = "taming.modules.misc.coord.CoordStage"
_DUMMY = {"target": "taming.modules.losses.DummyLoss"}
TRANSFORMER = "transformer."
# Parameters of conditions without a network, and the only value of those that have one.
_PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    _LABELATOR: ("n_classes", {"quantize_interface": True}),
    _SOS: ("sos_token", {"quantize_interface": True}),
    _COORD: ("n_embed down_factor", {}),
}


def _check(params: Mapping[str, Any]) -> None:
    """Raises TargetError for parameters that a Net2NetTransformer does not have."""
    pick_params(
        "Net2NetTransformer",
        params,
        same="downsample_cond_size pkeep sos_token unconditional",
        ignored=(
            "transformer_config first_stage_config cond_stage_config permuter_config ckpt_path "
            "ignore_keys first_stage_key cond_stage_key monitor"
        ),
    )
    if not 0 <= params.get("pkeep", 1.0) <= 1:
        raise TargetError(f"Net2NetTransformer: pkeep={params['pkeep']!r} is not from 0 to 1")


def condition_target(params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns (target, params) of the condition; without one it is the start token's."""
    config = params.get("cond_stage_config", UNCONDITIONAL)
    if config in (None, UNCONDITIONAL) or params.get("unconditional"):
        return _SOS, {"sos_token": params.get("sos_token", 0)}
    if isinstance(config, str):
        raise TargetError(
            f"Net2NetTransformer: cond_stage_config={config!r} is not supported: a picture is not "
            "the condition of itself"
        )
    return config["target"], dict(config.get("params") or {})


def permuter_of(params: Mapping[str, Any]) -> tuple[str, tuple[int, int] | None]:
    """Returns the name of the permuter, and the codes (h, w) that it is for."""
    config = params.get("permuter_config")
    if config is None:
        return "Identity", None
    prefix, _, name = config["target"].rpartition(".")
    if prefix != _PERMUTER or name not in PERMUTERS:
        raise TargetError(f"the permuter {config['target']}{did_you_mean(name, PERMUTERS)}")
    own = pick_params(name, config.get("params") or {}, same="H W")
    return name, None if name == "Identity" else (own["H"], own["W"])


def whole(params: Mapping[str, Any], *, vgg: Sequence[int] = VGG16_WIDTHS, **options: Any) -> Whole:
    """Returns the checkpoint: "transformer", "first_stage" and, of a VQ model, "conditioner"."""
    _check(params)
    config = params["transformer_config"]
    if config["target"] != _GPT:
        raise TargetError(f"the transformer {config['target']} is not supported, only {_GPT}")
    gpt = module_from_config(_GPT, config.get("params"))
    config = params["first_stage_config"]
    stage = first_stage(
        config["target"], config.get("params") or {}, prefix=FIRST_STAGE, losses=False, vgg=vgg
    )
    modules = {"transformer": gpt, **stage.modules}
    table = [*under(("transformer",), table_of(gpt, TRANSFORMER)), *stage.table]
    shapes = {"transformer": param_shapes(gpt), **stage.shapes}
    target, inner = condition_target(params)
    if target in _PLAIN:
        same, fixed = _PLAIN[target]
        pick_params(target, inner, same=same, fixed=fixed)
    else:
        module = module_from_config(target, inner)
        if not isinstance(module, VQModel):
            raise TargetError(f"{target} gives no tokens: not supported as a condition")
        modules["conditioner"] = module
        table += under(("conditioner",), table_of(module, CONDITIONER))
        shapes["conditioner"] = param_shapes(module)
    name, size = permuter_of(params)
    if size is not None:
        forward, back = PERMUTERS[name](*size)
        table += [
            constant("permuter.forward_shuffle_idx", forward),
            constant("permuter.backward_shuffle_idx", back),
        ]
    return Whole(modules, table, shapes)


# ---------------------------------------------------------------------------- the original -> ours


def config_of(original: Original, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of the model that ``original`` describes."""
    params, gpt, stage = original.params, modules["transformer"], modules["first_stage"]
    name, codes = permuter_of(params)
    f = stage.downsampling
    h, w = codes or (stage.resolution // f,) * 2
    size = [h * f, w * f]
    target, inner = condition_target(params)
    match target:
        case _ if target == _SOS:
            section = {"kind": "start", "token": inner.get("sos_token", 0)}
        case _ if target == _LABELATOR:
            section = {"kind": "label", "n_classes": inner["n_classes"]}
        case _ if target == _COORD:
            section = {"kind": "coordinates", "size": size, **inner}
        case _:
            module = modules["conditioner"]
            of = "depth" if module.in_channels == 1 else "labels"
            section = {"kind": "coded_map", "of": of, "size": size}
            if (side := params.get("downsample_cond_size", -1)) > 0:
                section["downsample"] = side
            section |= {k: v for k, v in first_stage_section(module).items() if k != "kind"}
    kept = {k: params[k] for k in ("first_stage_key", "cond_stage_key") if k in params}
    return {
        "kind": "transformer",
        "transformer": _fields(gpt),
        "first_stage": first_stage_section(stage),
        "conditioner": section,
        "permuter": name,
        "pkeep": params.get("pkeep", 1.0),
        "sampling": {"size": size},
        "original": {
            "target": original.target,
            "first_stage": params["first_stage_config"]["target"],
            "conditioner": target,
            **kept,
        },
    }


def _fields(gpt: GPT) -> dict[str, Any]:
    known = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    return {**{name: getattr(gpt, name) for name in known}, **fields_of(gpt)}


# ---------------------------------------------------------------------------- ours -> the original


def original_of(config: Mapping[str, Any]) -> Original:
    """Returns the original's description of a transformer."""
    from ldm_jax.models.code_transformer import build

    model, kept = build(config, None), config.get("original", {})
    section, target = dict(config["conditioner"]), kept.get("conditioner")
    usual = "taming.models.vqgan.VQModel"
    stage, inside = first_stage_of(model.first_stage.module, kept.get("first_stage") or usual)
    params: dict[str, Any] = {
        "transformer_config": {"target": _GPT, "params": _fields(model.gpt)},
        "first_stage_config": {"target": stage, "params": inside | {"lossconfig": _DUMMY}},
        "pkeep": model.pkeep,
        **{name: kept[name] for name in ("first_stage_key", "cond_stage_key") if name in kept},
    }
    match section["kind"]:
        case "start":
            token = section.get("token", 0)
            params |= {
                "cond_stage_config": UNCONDITIONAL,
                "unconditional": True,
                "sos_token": token,
            }
        case "label":
            inner = {"n_classes": section["n_classes"]}
            params |= {"cond_stage_config": {"target": _LABELATOR, "params": inner}}
            params.setdefault("cond_stage_key", "class_label")
        case "coordinates":
            inner = {name: section[name] for name in ("n_embed", "down_factor")}
            params |= {"cond_stage_config": {"target": _COORD, "params": inner}}
            params.setdefault("cond_stage_key", "coord")
        case "coded_map":
            module: Any = model.conditioner.module  # type: ignore[attr-defined]
            labels = section.get("of", "labels") == "labels"
            usual = f"taming.models.vqgan.{'VQSegmentationModel' if module.n_labels else 'VQModel'}"
            target, inner = first_stage_of(module, target or usual)
            inner |= {"lossconfig": _DUMMY}
            params |= {"cond_stage_config": {"target": target, "params": inner}}
            params.setdefault("cond_stage_key", "segmentation" if labels else "depth")
            if (side := section.get("downsample", -1)) > 0:
                params["downsample_cond_size"] = side
        case kind:
            raise TargetError(f"the original cannot hold a transformer with the condition {kind!r}")
    if model.permuter != "Identity":
        h, w = (n // model.first_stage.downsampling for n in config["sampling"]["size"])
        inner = {"H": h, "W": w}
        params["permuter_config"] = {"target": f"{_PERMUTER}.{model.permuter}", "params": inner}
    return Original(TARGET, params)


# --------------------------------------------------------------------------- from names and shapes


def infer(names: Shapes, tensors: Mapping[str, Any]) -> Original:
    """Returns the configuration of a state dict with a VQ model of conditions."""
    own = names.under(TRANSFORMER)
    vocabulary, width = own["tok_emb.weight"]
    heads = max(1, width // 64)
    gpt = {
        "vocab_size": vocabulary,
        "block_size": own["pos_emb"][1],
        "n_layer": own.count(r"blocks\.(\d+)\."),
        "n_head": heads,
        "n_embd": width,
    }
    if (mask := tensors.get(f"{TRANSFORMER}blocks.0.attn.mask")) is not None:
        unmasked = int(np.asarray(mask).reshape(gpt["block_size"], -1)[0].astype(float).sum())
        gpt["n_unmasked"] = unmasked if unmasked > 1 else 0
    assumed = [f"n_head {heads}: the heads of the transformer"]
    stages = {}
    if not names.any(CONDITIONER):
        raise TargetError(
            "a transformer without cond_stage_model.* has classes, coordinates or no condition, "
            "which its names do not say: give the original's YAML with --config"
        )
    for part, prefix in (("first_stage", FIRST_STAGE), ("cond_stage", CONDITIONER)):
        inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        stage = infer_first_stage(names.under(prefix), inner)
        target = stage.target
        if target == "ldm.models.autoencoder.VQModelInterface":
            target = "taming.models.vqgan.VQModel"
        stages[f"{part}_config"] = {"target": target, "params": stage.params}
        assumed += [f"{part}: {line}" for line in stage.assumed]
    if names.any("permuter."):
        raise TargetError("which permuter it has its names do not say: give the YAML with --config")
    params = {"transformer_config": {"target": _GPT, "params": gpt}, **stages}
    channels = stages["cond_stage_config"]["params"]["ddconfig"]["in_channels"]
    params["cond_stage_key"] = "depth" if channels == 1 else "segmentation"
    side = stages["first_stage_config"]["params"]["ddconfig"]["resolution"]
    assumed += [f"size {side}: the side of the pictures in pixels", "pkeep 1.0"]
    return Original(TARGET, params, tuple(assumed))


def describe(original: Original) -> dict[str, str]:
    """Returns {label: text} of a description, for ``ldm-convert inspect``."""
    gpt = original.params["transformer_config"]["params"]
    target, inner = condition_target(original.params)
    shown = {k: v for k, v in inner.items() if k in ("n_embed", "n_labels", "n_classes")}
    texts = [f"{name} {value}" for name, value in gpt.items()]
    return {
        "transformer": ", ".join(texts),
        "condition": ", ".join([target.split(".")[-1], *(f"{k} {v}" for k, v in shown.items())]),
    }
