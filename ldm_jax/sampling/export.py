"""A model's sampling as a program that runs without this package: ldm-export MODEL --out FOLDER

The folder holds

    program.jax          encoding the condition, all steps and decoding, as `jax.export` serialises it, for cpu, cuda and tpu and any batch
    weights.safetensors  the parameters, which are an argument of the program, so that they are on a device once and not in the program's text
    tokenizer.json       of a model of text: captions -> token ids, read by the `tokenizers` package
    signature.json       names, shapes and dtypes of the arguments and of the result, and the settings that are compiled in

docs/exporting.md has the ten lines that run it. What guides, seeds and asks is an argument; sampler, steps, size and dtype are compiled in.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

import ldm_jax
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.errors import RequestError
from ldm_jax.kernels import PORTABLE
from ldm_jax.sampling.pipeline import Pipeline, load
from ldm_jax.sampling.program import Rows, generate
from ldm_jax.sampling.requests import (
    Given,
    Settings,
    check_conditions,
    guided_steps,
    numbers,
)

PLATFORMS = ("cpu", "cuda", "tpu")
# Not one of them: seeds and guidance are arguments, and a batch whose size is not known is not decoded in parts.
SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(Settings)
    if field.name not in ("guidance", "decode_batch")
)
Arguments = dict[str, tuple[tuple[int, ...], Any]]  # name -> (shape of a row, dtype)


def export(model: str | Path, out: str | Path, *, dtype: str = "float32", **settings: Any) -> Path:
    """Writes the folder ``out``, whole or not at all, and returns it.

    ``model`` and ``dtype`` are those of `ldm_jax.load`, ``settings`` fields of `Settings` without guidance (the model's own where not given or
    None). RequestError where something is already there or the model is asked by pictures, maps or boxes, ImportError without flatbuffers.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is not empty; give a new folder or remove it first")
    try:
        import flatbuffers  # noqa: F401  (jax.export needs it, and says so only after all the work)
    except ModuleNotFoundError:
        raise ImportError('exporting needs flatbuffers: pip install "ldm_jax[export]"') from None
    pipe = load(model, dtype=dtype, devices=1)
    chosen = pipe.settings(**settings)
    weights = named(pipe)
    program, arguments = program_of(pipe, chosen)
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
    (partial / "signature.json").write_text(
        json.dumps(signature(pipe, chosen, arguments, exported), indent=1) + "\n"
    )
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    return out


# -------------------------------------------------------------------------------------------------------------------- the program


def program_of(pipe: Pipeline, chosen: Settings) -> tuple[Callable[..., jax.Array], Arguments]:
    """(weights by name, arguments [b, ...] by name -> pictures uint8 [b, H, W, 3]; the arguments), or a RequestError."""
    model, size, plan = pipe.model, pipe.check_size(chosen.size), pipe.plan(chosen, Given())
    arguments, form = arguments_of(pipe), pipe.form(chosen, size, 1)
    names, tree = list(named(pipe)), jax.tree.structure(parameters(pipe))
    condition = model.conditioner.argument
    schedule = jax.device_get(model.schedule)  # small, and so a constant of the program
    sampler, interval, rescale = (
        SAMPLERS[chosen.sampler],
        guided_steps(chosen),
        numbers(chosen.guidance_rescale, 1, "rescales"),
    )
    bare = dataclasses.replace(
        model, params=None, first_stage=model.first_stage.replace(params=None), schedule=schedule
    )

    def program(weights: Mapping[str, jax.Array], **given: jax.Array) -> jax.Array:
        params = jax.tree.unflatten(tree, [weights[name] for name in names])
        stage = params.pop("first_stage")
        whole = dataclasses.replace(
            bare, params=params, first_stage=bare.first_stage.replace(params=stage)
        )
        rows = Rows(given["seeds"], None)
        if condition is not None:
            n = given["seeds"].shape[0]
            rows = Rows(
                given["seeds"],
                given[condition],
                given[f"null_{condition}"],
                given["guidance"],
                None if interval is None else jnp.broadcast_to(interval, (n, 2)),
                jnp.broadcast_to(rescale, n) if rescale.any() else None,
            )
        return generate(whole.with_kernels(PORTABLE), sampler, plan, rows, form).images

    return program, arguments


def arguments_of(pipe: Pipeline) -> Arguments:
    """What the program takes for each picture, beside the weights. RequestError for a model that is asked by something else."""
    conditioner, arguments = pipe.model.conditioner, {"seeds": ((), np.uint32)}
    check_conditions(pipe.model)
    if conditioner.field is None:
        return arguments
    if (condition := conditioner.argument) is None:
        raise RequestError(
            f"this model is conditioned on {conditioner.field}: only models of text, classes, embeddings or nothing can be exported"
        )
    example = conditioner.encode_null(1)
    for name in (condition, f"null_{condition}"):
        arguments[name] = example.shape[1:], example.dtype
    return arguments | {"guidance": ((), np.float32)}


def rows_of(arguments: Arguments) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments with a batch of any size, b."""
    (b,) = jax_export.symbolic_shape("b")
    return {
        name: jax.ShapeDtypeStruct((b, *shape), dtype) for name, (shape, dtype) in arguments.items()
    }


# ---------------------------------------------------------------------------------------------------------------- what goes with it


def parameters(pipe: Pipeline) -> dict[str, Any]:
    """All parameters: "unet", "conditioner" and "first_stage"."""
    return {**pipe.model.params, "first_stage": pipe.model.first_stage.params}


def named(pipe: Pipeline) -> dict[str, jax.Array]:
    """`parameters` by their paths, in their order."""
    leaves = jax.tree.leaves_with_path(parameters(pipe))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def signature(
    pipe: Pipeline, chosen: Settings, arguments: Arguments, exported: Any
) -> dict[str, Any]:
    """What signature.json says."""
    inputs = {
        name: {"shape": ["b", *shape], "dtype": np.dtype(dtype).name}
        for name, (shape, dtype) in arguments.items()
    }
    if "guidance" in inputs:
        inputs["guidance"]["default"] = chosen.guidance
    (image,) = exported.out_avals
    settings = {name: getattr(chosen, name) for name in SETTINGS}
    told = {
        "model": pipe.name,
        "dtype": pipe.dtype,
        "settings": settings,
        "platforms": list(exported.platforms),
    }
    told |= pipe.model.conditioner.signature(pipe.model.config.get("classes"))
    versions = {"ldm_jax": ldm_jax.__version__, "jax": jax.__version__}
    output = {"images": {"shape": ["b", *image.shape[1:]], "dtype": image.dtype.name}}
    return told | {"inputs": inputs, "outputs": output, "versions": versions}
