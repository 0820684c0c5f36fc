"""Converts released layouts at full size and measures time and memory.

    python -m benchmarks.convert_full_size [--models txt2img-1p4B sd-v1 sdxl] [--folder DIR]

For each model: writes random weights in the released file's layout (6.2 GB, 4.3 GB and, in
float16, 6.9 GB; one array in memory at a time, without PyTorch), converts it in a process of its
own, loads the result in another by `ldm_jax.load` in the file's type, and in a third runs one text
encoding, one UNet step and one decode of 512x512 pixels (256x256 of txt2img-1p4B) on the CPU.
Everything it wrote is deleted. Peak memory is the process's largest resident set; the time of a
network is one run after its compilation. docs/converting.md has the results.

It needs disk for the checkpoint and the result, and memory of 1.5 times the checkpoint's size.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ldm_jax
from ldm_jax.configs.sdxl import get_config
from ldm_jax.convert.originals import original_of, whole_from_config
from ldm_jax.convert.tables import Duplicate, Unused, source_shapes
from ldm_jax.io.checkpoint import load_model
from ldm_jax.models.build import build
from ldm_jax.sampling.pipeline import as_dtype

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ROOT / "tests" / "golden" / "architectures.json.gz"
CONFIGS = {
    "txt2img-1p4B": "latent-diffusion/configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "sd-v1": "stable-diffusion/configs/stable-diffusion/v1-inference.yaml",
}
MODELS = (*CONFIGS, "sdxl")
KL_F8 = {
    "kind": "kl",
    "embed_dim": 4,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "force_upcast": True,
}
SIDES = {"txt2img-1p4B": 32, "sd-v1": 64, "sdxl": 64}  # of the latents that the networks run on
GB = 1e9
STORAGES = {"float32": "FloatStorage", "int64": "LongStorage"}


def architecture(name: str) -> dict[str, Any]:
    """{"target", "params"} of a published configuration."""
    return json.loads(gzip.decompress(ARCHITECTURES.read_bytes()))[CONFIGS[name]]


def sdxl() -> dict[str, Any]:
    """{"target", "params"} of Stable Diffusion XL's base model."""
    model = get_config().to_dict()["model"]
    model["kind"] = "latent_diffusion"
    model["first_stage"] = dict(KL_F8)
    for setting in ("frozen", "path"):  # of training
        model["conditioner"].pop(setting)
    original = original_of(model)
    return {"target": original.target, "params": original.params}


# --- the file ---


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _sizes(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _tensor(key: str, shape: tuple[int, ...], dtype: str) -> bytes:
    """The pickle opcodes of a contiguous tensor on the storage ``key``."""
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    count = int(np.prod(shape))
    storage = (
        b"("
        + _text("storage")
        + f"ctorch\n{STORAGES[dtype]}\n".encode()
        + _text(key)
        + _text("cpu")
    )
    storage += _number(count) + b"tQ"
    rest = _number(0) + _sizes(shape) + _sizes(strides) + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def write_checkpoint(path: Path, target: str, params: Mapping[str, Any], seed: int = 0) -> int:
    """Writes random weights as torch.save writes a LatentDiffusion's training checkpoint.

    Weights are normal with a variance that preserves the signal's scale, gains about 1. Buffers of
    the schedule have their true values, and duplicated arrays share their storage.

    Returns:
      The size of the file in bytes.
    """
    whole = whole_from_config(target, params)
    shapes, rng = source_shapes(whole.table, whole.shapes), np.random.default_rng(seed)
    keys: dict[str, str] = {}
    entries = b""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
        for entry in sorted(whole.table, key=lambda entry: isinstance(entry, Duplicate)):
            name, dtype = entry.source, "float32"
            if isinstance(entry, Duplicate):
                keys[name] = keys[entry.of]
            else:
                keys[name] = str(len(keys))
                if isinstance(entry, Unused):
                    array = np.asarray(entry.value())
                    dtype = str(array.dtype)
                else:
                    array = _weights(rng, name, shapes[name])
                with file.open(f"archive/data/{keys[name]}", "w", force_zip64=True) as out:
                    out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            entries += _text(name) + _tensor(keys[name], shapes[name], dtype)
        state = b"}(" + entries + b"u"
        saved = b"\x80\x02}(" + _text("epoch") + _number(0) + _text("global_step") + _number(1)
        saved += _text("state_dict") + state + b"u."
        file.writestr("archive/data.pkl", saved)
        file.writestr("archive/version", "3\n")
    return path.stat().st_size


class _Repeated:
    """Normal numbers of which 2^24 are drawn once: drawing billions takes minutes."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        self._drawn = self._rng.standard_normal(2**24, np.float32)

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """As that of NumPy's generators."""
        count = int(np.prod(shape))
        first = int(self._rng.integers(max(self._drawn.size - count, 1)))
        return np.resize(self._drawn[first : first + count], shape).astype(dtype)


def _weights(rng: np.random.Generator | _Repeated, name: str, shape: tuple[int, ...]) -> np.ndarray:
    array = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        array *= np.float32(np.prod(shape[1:]) ** -0.5)
        return array
    return array * np.float32(0.02) + np.float32(name.endswith(".weight"))


def write_safetensors(path: Path, target: str, params: Mapping[str, Any], seed: int = 0) -> int:
    """Writes random float16 weights as a .safetensors in the layout of the original.

    Returns:
      The size of the file in bytes.
    """
    whole = whole_from_config(target, params)
    shapes, rng = source_shapes(whole.table, whole.shapes), _Repeated(seed)
    arrays = {
        entry.source: entry.value() if isinstance(entry, Unused) else None for entry in whole.table
    }
    header: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        dtype = "F16" if array is None else "I64"
        size = int(np.prod(shapes[name])) * (2 if array is None else 8)
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, array in arrays.items():
            values = _weights(rng, name, shapes[name]) if array is None else np.asarray(array)
            out.write(values.astype(np.float16 if array is None else np.int64).tobytes())
    return path.stat().st_size


# --- processes ---


def measured(*command: str) -> tuple[float, float, str]:
    """Runs ``python ARGS``; returns (seconds, peak resident bytes, standard output)."""
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"convert_full_size: {' '.join(command)} ended with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - began, usage.ru_maxrss * unit, output


def run_networks(model: Path, side: int) -> dict[str, float]:
    """Returns the seconds of one decode, one text encoding and one UNet step of a model.

    AssertionError where a result is not finite.
    """
    config, params = load_model(model)
    built = build(config, None, None)
    stage, conditioner = built.first_stage.module, built.conditioner
    assert stage is not None
    z = np.random.default_rng(0).standard_normal((1, side, side, stage.embed_dim), np.float32)
    seconds: dict[str, float] = {}

    def run(name: str, function: Callable[..., Any], part: str, *args: Any) -> Any:
        # Each part's parameters go once it has run.
        own = jax.device_put(as_dtype(params.pop(part), "float32"))
        compiled = jax.jit(function).lower(own, *args).compile()
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(own, *args))
        seconds[name] = time.perf_counter() - began
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result)), name
        return result

    pixels = run(
        "decode",
        lambda p, z: stage.apply({"params": p}, z, method="decode"),
        "first_stage",
        z,
    )
    assert pixels.shape == (1, side * stage.downsampling, side * stage.downsampling, 3)
    cond = run("text encoding", conditioner, "conditioner", conditioner.encode(["a red apple"]))
    t = np.full(1, 981, np.int32)
    eps = run(
        "UNet step",
        lambda p, z, t, c: built.apply({"unet": p}, z, t, c),
        "unet",
        z,
        t,
        cond,
    )
    assert eps.shape == z.shape
    return seconds


def load_whole(model: Path, dtype: str) -> None:
    """Loads a model directory as a program would."""
    pipe = ldm_jax.load(model, dtype=dtype)
    assert pipe.model.params["unet"]


def measure(name: str, folder: Path) -> dict[str, Any]:
    """All figures of one model; its files are gone afterwards."""
    half = name == "sdxl"
    given, write = (sdxl(), write_safetensors) if half else (architecture(name), write_checkpoint)
    file = "model.safetensors" if half else "model.ckpt"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, out = Path(scratch, file), Path(scratch, "model")
        began = time.perf_counter()
        size = write(source, given["target"], given["params"])
        row: dict[str, Any] = {"file_gb": size / GB, "write_s": time.perf_counter() - began}
        seconds, peak, _ = measured("-m", "ldm_jax.convert", str(source), "--out", str(out))
        row |= {
            "convert_s": seconds,
            "convert_peak_gb": peak / GB,
            "beyond_file_gb": (peak - size) / GB,
        }
        source.unlink()
        this = ("-m", "benchmarks.convert_full_size")
        dtype = "float16" if half else "float32"
        seconds, peak, _ = measured(*this, "--load", str(out), "--dtype", dtype)
        row |= {"load_s": seconds, "load_beyond_file_gb": (peak - size) / GB}
        _, peak, output = measured(*this, "--run", str(out), "--side", str(SIDES[name]))
        return row | {"run_peak_gb": peak / GB, "seconds": json.loads(output.splitlines()[-1])}


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the figures as a table."""
    columns = ("file", "convert", "peak", "beyond the file", "load", "load beyond")
    columns += ("decode", "text encoding", "UNet step")
    print(f"{'':14}" + "".join(f"{column:>17}" for column in columns))
    for name, row in rows.items():
        cells = [
            f"{row['file_gb']:.2f} GB",
            f"{row['convert_s']:.0f} s",
            f"{row['convert_peak_gb']:.2f} GB",
        ]
        cells += [
            f"{row['beyond_file_gb']:+.2f} GB",
            f"{row['load_s']:.0f} s",
            f"{row['load_beyond_file_gb']:+.2f} GB",
            *(f"{row['seconds'][c]:.1f} s" for c in columns[6:]),
        ]
        print(f"{name:14}" + "".join(f"{cell:>17}" for cell in cells))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the JSON file when asked to."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.convert_full_size", description="Conversion at full size."
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--folder", type=Path, help="where the files go while it runs (default: the system's)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # the second process
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        print(json.dumps(run_networks(args.run, args.side)))
        return
    if args.load:
        load_whole(args.load, args.dtype)
        return
    rows = {name: measure(name, args.folder or Path(tempfile.gettempdir())) for name in args.models}
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({"cores": os.cpu_count(), **rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
