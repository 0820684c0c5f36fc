"""Exports a model's sampling as a program that runs without this package.

    ldm-export MODEL --out FOLDER

The folder holds

    program.jax          encoding of the condition, all steps and decoding, as `jax.export`
                         serialises it, for cpu, cuda and tpu and any batch
    weights.safetensors  the parameters, an argument of the program: they are on a device once,
                         and not in the program's text
    tokenizer.json       for a model of text: captions to token ids, read by `tokenizers`
    signature.json       names, shapes and dtypes of arguments and result, and the settings that
                         are compiled in

docs/exporting.md has the ten lines that run it. Conditions, seeds and guidance are arguments;
sampler, steps, size and dtype are compiled in.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.errors import RequestError
from ldm_jax.io.paths import local_only
from ldm_jax.kernels import PORTABLE
from ldm_jax.sampling.inputs import Inputs, check_model, numbers
from ldm_jax.sampling.pipeline import Pipeline, load
from ldm_jax.sampling.program import generate
from ldm_jax.sampling.request import SETTINGS, Request

PLATFORMS = ("cpu", "cuda", "tpu")
# Guidance is an argument, and a batch of unknown size is not decoded in parts.
COMPILED = tuple(name for name in SETTINGS if name not in ("guidance", "decode_batch"))
Arguments = dict[str, tuple[tuple[int, ...], Any]]  # name -> (shape of a row, dtype)


def export(model: str | Path, out: str | Path, *, dtype: str = "float32", **settings: Any) -> Path:
    """Writes the folder ``out``, whole or not at all, and returns it.

    Args:
      model: As of `ldm_jax.load`.
      out: A new or empty folder.
      dtype: As of `ldm_jax.load`.
      settings: Sampling settings but for guidance; None is the model's own.

    Raises:
      RequestError: The folder is not empty, or the model's condition cannot be exported.
    """
    out = local_only(out, "an exported program").absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is not empty; give a new folder or remove it first")
    try:
        import flatbuffers  # noqa: F401  (jax.export needs it, and reports it after all the work)
    except ModuleNotFoundError:
        raise RequestError('exporting needs flatbuffers: pip install "ldm_jax[export]"') from None
    pipe = load(model, dtype=dtype, devices=1)
    own = pipe.settings(**settings)
    weights = named(pipe)
    program, arguments = program_of(pipe, own)
    exported = jax_export.export(jax.jit(program), platforms=PLATFORMS)(
        {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in weights.items()},
        **rows_of(arguments),
    )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    from safetensors.numpy import save_file

    save_file({name: np.asarray(a) for name, a in weights.items()}, partial / "weights.safetensors")
    (partial / "program.jax").write_bytes(exported.serialize())
    if (tokenizer := pipe.model.conditioner.tokenizer_json()) is not None:
        (partial / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    text = json.dumps(signature(pipe, own, arguments, exported), indent=1) + "\n"
    (partial / "signature.json").write_text(text)
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    return out


def program_of(pipe: Pipeline, own: Request) -> tuple[Callable[..., jax.Array], Arguments]:
    """Returns the program and its arguments beside the weights, or raises RequestError.

    The program takes weights by name and arguments [b, ...] by name, and returns pictures uint8
    [b, H, W, 3].
    """
    assert own.size is not None
    assert own.sampler is not None
    if pipe.refiner is not None:
        raise RequestError("an exported program has no refiner: load the model without one")
    model, size, steps = pipe.model, pipe.check_size(own.size), pipe.steps(own)
    arguments, config = arguments_of(pipe), pipe.config(own, size, 1)
    names, tree = list(named(pipe)), jax.tree.structure(parameters(pipe))
    condition = model.conditioner.argument if model.conditioner.field is not None else None
    schedule = jax.device_get(model.schedule)  # small, and so a constant of the program
    sampler, interval = SAMPLERS[own.sampler], own.guidance_interval
    rescale = numbers(own.guidance_rescale, 1, "rescales")
    bare = dataclasses.replace(
        model, params=None, first_stage=model.first_stage.replace(params=None), schedule=schedule
    )

    def program(weights: Mapping[str, jax.Array], **given: jax.Array) -> jax.Array:
        params = jax.tree.unflatten(tree, [weights[name] for name in names])
        stage = bare.first_stage.replace(params=params.pop("first_stage"))
        whole = dataclasses.replace(bare, params=params, first_stage=stage).with_kernels(PORTABLE)
        inputs, n = Inputs(given["seeds"], None), given["seeds"].shape[0]
        if condition is not None:
            inputs = Inputs(
                given["seeds"],
                given[condition],
                given[f"null_{condition}"],
                given["guidance"],
                None if interval is None else jnp.broadcast_to(jnp.float32(interval), (n, 2)),
                jnp.broadcast_to(rescale, n) if rescale.any() else None,
            )
        return generate(whole, sampler, steps, inputs, config).images

    return program, arguments


def arguments_of(pipe: Pipeline) -> Arguments:
    """Returns the program's arguments for each picture, or raises RequestError."""
    conditioner, arguments = pipe.model.conditioner, {"seeds": ((), np.uint32)}
    check_model(pipe.model)
    if conditioner.field is None:
        return arguments
    condition, example = conditioner.argument, conditioner.encode_null(1)
    if condition is None or not isinstance(example, np.ndarray):
        raise RequestError(
            f"this model is conditioned on {conditioner.field}: only models of text, classes, "
            "embeddings or nothing can be exported"
        )
    for name in (condition, f"null_{condition}"):
        arguments[name] = example.shape[1:], example.dtype
    return arguments | {"guidance": ((), np.float32)}


def rows_of(arguments: Arguments) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arguments' shapes with a batch of any size, b."""
    (b,) = jax_export.symbolic_shape("b")
    return {
        name: jax.ShapeDtypeStruct((b, *shape), dtype) for name, (shape, dtype) in arguments.items()
    }


def parameters(pipe: Pipeline) -> dict[str, Any]:
    """Returns all parameters: "unet", "conditioner" and "first_stage"."""
    return {**pipe.model.params, "first_stage": pipe.model.first_stage.params}


def named(pipe: Pipeline) -> dict[str, jax.Array]:
    """Returns `parameters` by their paths, in their order."""
    leaves = jax.tree.leaves_with_path(parameters(pipe))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def signature(pipe: Pipeline, own: Request, arguments: Arguments, exported: Any) -> dict[str, Any]:
    """Returns the content of signature.json."""
    inputs: dict[str, Any] = {
        name: {"shape": ["b", *shape], "dtype": np.dtype(dtype).name}
        for name, (shape, dtype) in arguments.items()
    }
    if "guidance" in inputs:
        inputs["guidance"]["default"] = own.guidance
    (image,) = exported.out_avals
    return {
        "model": pipe.name,
        "dtype": pipe.dtype,
        "settings": {name: getattr(own, name) for name in COMPILED},
        "platforms": list(exported.platforms),
        **pipe.model.conditioner.signature(pipe.model.config.get("classes")),
        "inputs": inputs,
        "outputs": {"images": {"shape": ["b", *image.shape[1:]], "dtype": image.dtype.name}},
        "versions": {"ldm_jax": version("ldm_jax"), "jax": jax.__version__},
    }
