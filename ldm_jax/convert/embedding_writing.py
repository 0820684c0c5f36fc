"""Textual inversions that were trained here, as files of other programs."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ldm_jax.convert.embedding import embedding_of
from ldm_jax.errors import TargetError
from ldm_jax.io.atomic import atomic_path


def to_embedding(config: Mapping[str, Any], params: Mapping[str, Any], out: Path) -> None:
    """Writes the .safetensors of diffusers' ``load_textual_inversion``; A1111 reads it, too.

    The array of one text encoder has the name of the word; those of Stable Diffusion XL's are
    "clip_l" and "clip_g".

    Raises:
      TargetError: The model is no textual inversion.
    """
    embedding = embedding_of(config, params)
    arrays = {
        name or embedding.word: np.ascontiguousarray(rows)
        for name, rows in embedding.vectors.items()
    }
    with atomic_path(out) as partial:
        save_file(arrays, partial, metadata={"format": "pt"})


def to_a1111(config: Mapping[str, Any], params: Mapping[str, Any], out: Path) -> None:
    """Writes the .pt of A1111's web UI, which `torch.load` reads with ``weights_only``.

    Raises:
      TargetError: The model is no textual inversion, or is one for several text encoders.
    """
    embedding = embedding_of(config, params)
    if embedding.vectors.keys() != {""}:
        raise TargetError("a .pt holds the vectors of one text encoder: export it --to embedding")
    rows = np.ascontiguousarray(embedding.vectors[""], "<f4")
    steps = int(config.get("trained_steps", 0))
    content = _mapping(
        string_to_token=_mapping(**{"*": _integer(265)}),
        string_to_param=_mapping(**{"*": _tensor(rows)}),
        name=_text(embedding.word),
        step=_integer(steps),
    )
    with atomic_path(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        parts = {"data.pkl": b"\x80\x02" + content + b".", "data/0": rows.tobytes()}
        for name, data in {**parts, "version": b"3\n"}.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)


# Opcodes of protocol 2 of pickle, for the few values of such a file.


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _tuple(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def _mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(_text(name) + value for name, value in values.items()) + b"u"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tensor(rows: np.ndarray) -> bytes:
    """A float32 tensor [n, d] whose numbers are the archive's "data/0"."""
    kind = _global("torch", "FloatStorage")
    storage = _tuple(_text("storage"), kind, _text("0"), _text("cpu"), _integer(rows.size)) + b"Q"
    n, d = rows.shape
    shape, strides = (_tuple(*map(_integer, pair)) for pair in ((n, d), (d, 1)))
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = _tuple(storage, _integer(0), shape, strides, b"\x89", hooks)
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"
