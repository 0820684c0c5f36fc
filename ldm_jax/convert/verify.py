"""The forward error of a converted model against recorded outputs of the original.

A case is NAME.safetensors with arrays ``in/...`` and ``out/...`` in PyTorch layouts and its entry
(atol, rtol) in the manifest.json beside it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from ldm_jax.conditioning.base import Cond
from ldm_jax.errors import TargetError
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.build import build, build_first_stage
from ldm_jax.models.ldm import FirstStage, LatentDiffusion, apply
from ldm_jax.models.vqgan import VQModel

Arrays = Mapping[str, np.ndarray]


def nhwc(x: Any) -> np.ndarray:
    """Channels last."""
    return np.moveaxis(np.asarray(x), -3, -1)


def nchw(x: Any) -> np.ndarray:
    """Channels first."""
    return np.moveaxis(np.asarray(x), -1, -3)


def verify(
    config: Mapping[str, Any], params: Mapping[str, Any], case: str | Path, ema: bool = False
) -> dict[str, tuple[float, float]]:
    """Returns {output: (largest absolute error, error in units of the recorded tolerance)}.

    Args:
      config: The model config.
      params: The parameters.
      case: The recorded case, NAME.safetensors.
      ema: The weights are averages, whose results are recorded as "ema.NAME".

    Raises:
      TargetError: The case cannot be read or records nothing that this model computes.
    """
    case = Path(case)
    try:
        spec = json.loads((case.parent / "manifest.json").read_text())["cases"][case.stem]
        arrays = load_file(case)
    except (OSError, ValueError, KeyError) as error:
        raise TargetError(
            f"{case} is no recorded case with an entry in a manifest.json beside it: {error}"
        ) from None
    given, expected = (
        {name.removeprefix(kind): a for name, a in arrays.items() if name.startswith(kind)}
        for kind in ("in/", "out/")
    )
    with jax.default_matmul_precision("highest"):  # the recorded results are float32 throughout
        results = outputs_of(config, params, given)
    if ema:
        results = {
            f"ema.{name}" if f"ema.{name}" in expected else name: a for name, a in results.items()
        }
    errors = {}
    for name in sorted(results.keys() & expected.keys()):
        ours, theirs = np.asarray(results[name], np.float64), expected[name].astype(np.float64)
        if ours.shape != theirs.shape:
            raise TargetError(
                f"{case.stem}: {name} has the shape {ours.shape}, recorded is {theirs.shape}"
            )
        error, atol = np.abs(ours - theirs), spec["atol"][name]
        allowed = 0.0 if atol == "exact" else float(atol) + float(spec["rtol"]) * np.abs(theirs)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(error == 0, 0.0, error / allowed)
        errors[name] = float(error.max(initial=0.0)), float(ratio.max(initial=0.0))
    if not errors:
        raise TargetError(f"{case.stem} records nothing that this model computes")
    return errors


def outputs_of(
    config: Mapping[str, Any], params: Mapping[str, Any], given: Arrays
) -> dict[str, np.ndarray]:
    """Returns the outputs for recorded inputs, in the names and layouts of the recording."""
    params = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        params,
    )
    if config["kind"] == "first_stage":
        return _first_stage(
            FirstStage(params["first_stage"], 1.0, build_first_stage(config)), given
        )
    return _latent_diffusion(build(config, params, params.get("first_stage")), given)


def _first_stage(stage: FirstStage, given: Arrays) -> dict[str, np.ndarray]:
    module = stage.module
    if isinstance(module, VQModel) and "x" in given:
        run = _method(stage)
        code = run("quantized", run("prequant", nhwc(given["x"])))
        return {
            "quant": nchw(code.z),
            "emb_loss": code.loss,
            "indices": code.indices.reshape(-1),
            "reconstruction": nchw(run("decode", code.z, quantize=False)),
        }
    if isinstance(module, AutoencoderKL) and {"x", "z"} <= given.keys():
        p = _method(stage)("encode", nhwc(given["x"]))
        return {
            "mean": nchw(p.mean),
            "logvar": nchw(p.logvar),
            "decode_z": nchw(stage.decode(jnp.asarray(nhwc(given["z"])))),
        }
    return {}


def _method(stage: FirstStage) -> Callable[..., Any]:
    """Calls methods of a first stage by name, compiled."""

    def run(name: str, *args: Any, **options: Any) -> Any:
        return jax.jit(lambda params, *a: apply(stage.module, params, *a, method=name, **options))(
            stage.params, *args
        )

    return run


def _latent_diffusion(model: LatentDiffusion, given: Arrays) -> dict[str, np.ndarray]:
    results: dict[str, Any] = {}
    cond = condition_of(model, given)
    nulls = {
        name.removeprefix("uncond_"): a for name, a in given.items() if name.startswith("uncond_")
    }
    for name, condition in {"c": cond, "uc": condition_of(model, nulls)}.items():
        if jax.tree.leaves(condition):
            results[name] = _recorded(condition)
    if {"x", "t"} <= given.keys():
        x = nhwc(given["x"])
        results["apply_model"] = nchw(
            jax.jit(model.apply)(model.params, x, jnp.asarray(given["t"]), cond)
        )
        results["decoded_x"] = nchw(jax.jit(model.first_stage.decode)(x))
    if "image" in given and model.first_stage.module is not None:
        code = _method(model.first_stage)("encode", nhwc(given["image"]))
        if isinstance(model.first_stage.module, AutoencoderKL):  # recorded are the moments
            code = jnp.concatenate([code.mean, code.logvar], axis=-1)
        results["first_stage_encode"] = nchw(code)
    return results


def condition_of(model: LatentDiffusion, given: Arrays) -> Cond:
    """Returns the condition of recorded inputs: a masked picture, or the one remaining input."""
    kind = model.config["conditioner"]["kind"]
    if "masked_image" in given:
        if kind not in ("none", "joined"):
            raise TargetError(
                f"a case with a picture beside a condition of kind {kind} cannot be verified"
            )
        stage = FirstStage(model.first_stage.params, 1.0, model.first_stage.module)
        f, code = stage.downsampling, jax.jit(stage.encode)(nhwc(given["masked_image"]))
        return Cond(concat=jnp.concatenate([code, nhwc(given["mask"])[:, ::f, ::f]], axis=-1))
    parts = ("x", "t", "x_T", "image")
    others = [
        a for name, a in given.items() if name not in parts and not name.startswith("uncond_")
    ]
    if len(others) != 1:
        return Cond()
    if kind == "hybrid":
        raise TargetError("a case with one input for a hybrid condition cannot be verified")
    plain = jnp.float32 if kind == "embeddings" else jnp.int32
    encoded = jnp.asarray(nhwc(others[0])) if others[0].ndim == 4 else jnp.asarray(others[0], plain)
    if kind in ("none", "joined"):
        return Cond(concat=encoded)
    return jax.jit(model.conditioner)(model.params["conditioner"], encoded)


def _recorded(cond: Cond) -> np.ndarray:
    return np.asarray(cond.crossattn) if cond.crossattn is not None else nchw(cond.concat)
