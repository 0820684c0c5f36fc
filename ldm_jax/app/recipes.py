"""What the page shows as a command line and as Python, and settings as the texts of flags."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.sampling.request import OPTIONS, Request

# Settings of a model -> keyword of `ldm_jax.load`; "model" is its first argument.
LOAD = {"model_config": "config", "vae": "vae", "text_encoder": "text_encoder", "dtype": "dtype"}


def text_of(value: Any, kind: str) -> str:
    """Returns a value as the text of its flag, the inverse of `KINDS[kind].parse`."""
    if kind == "size":
        return "x".join(map(str, value))
    if isinstance(value, list | tuple):
        return ",".join(text_of(one, "") for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def command_line(model: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """Returns the call of `ldm-sample` that makes the same pictures."""
    words = ["ldm-sample"]
    known = {name: value for name, value in model.items() if value is not None}
    for name, value in {**known, **flags}.items():
        if (name, value) == ("model", "emoji"):  # the default
            continue
        for one in value if isinstance(value, list) else [value]:
            words.append(f"--{name}={shlex.quote(str(one))}")
    return " \\\n  ".join(words)


def python(model: Mapping[str, Any], requests: Sequence[Request]) -> str:
    """Returns a program that makes the same pictures."""
    load = [repr(model["model"])]
    load += [
        f"{keyword}={model[name]!r}"
        for name, keyword in LOAD.items()
        if model.get(name) is not None
    ]
    lines = ["import ldm_jax", "", "ldm_jax.use_cores()  # on a CPU"]
    lines += [f"pipe = ldm_jax.load({', '.join(load)})"]
    for request in requests:
        given = {n: v for n, v in request.given().items() if n != "progress_every" or v}
        for name in ("prompts", "classes", "negative", "guidance"):
            # One value for all pictures, where all have the same.
            if isinstance(value := given.get(name), list) and len({*value}) == 1:
                given[name] = value[0]
        words = [f"    {name}={value!r}," for name, value in given.items()]
        lines += ["images = pipe(", *words, ")  # uint8 [n, height, width, 3]"]
    return "\n".join(lines)


def advanced(refused: Sequence[str] = ()) -> list[str]:
    """Returns the options of a request that the page offers as a text, by their names.

    Args:
      refused: Options that the kind of model does not have.
    """
    own = ("steps", "guidance", "sampler", "strength", "variation", "outpaint", "progress_every")
    return [
        name
        for name, field in OPTIONS.items()
        if field.metadata["kind"] not in ("", "file", "texts", "classes")
        and name not in (*own, *refused)
    ]
