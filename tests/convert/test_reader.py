"""The torch-free reader: every format and dtype of PyTorch, and hostile files do no harm."""

import json
import os
import pickle
import shutil
import sys
import time
import tracemalloc
from pathlib import Path

import hostile
import ml_dtypes
import mutations
import numpy as np
import pytest

from ldm_jax.cli.convert import main as inspect_main
from ldm_jax.convert.reader.reader import Checkpoint, LazyTensor, Standin, open_checkpoint
from ldm_jax.errors import ReaderError

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(os.environ.get("LDM_JAX_GOLDEN", ROOT.parent / "shared" / "golden"))
EXPECTED = json.loads((DATA / "expected.json").read_text())
SAVED = ("zip.ckpt", "zip_protocol4.ckpt", "legacy.ckpt", "newer_dtypes.bin")


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / next(iter(files))


def golden_checkpoints() -> list[str]:
    return sorted(path.name for path in GOLDEN.glob("*.ckpt")) or ["none"]


# ------------------------------------------------------------------------- what PyTorch has written


@pytest.mark.fast
@pytest.mark.parametrize("name", SAVED)
def test_every_layout_and_dtype_of_torch_save(name):
    with open_checkpoint(DATA / name) as checkpoint:
        assert checkpoint.format == ("legacy" if name.startswith("legacy") else "zip")
        newer = ("as.uint16", "as.float8_e4m3fn")
        assert list(checkpoint.tensors) == [
            n for n in EXPECTED if (n in newer) == (name == "newer_dtypes.bin")
        ]
        for key, tensor in checkpoint.tensors.items():
            wanted, values = EXPECTED[key], tensor.numpy()
            assert (list(tensor.shape), str(tensor.dtype)) == (wanted["shape"], wanted["dtype"]), (
                key
            )
            assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype), key
            assert values.flags.c_contiguous
            assert values.flags.writeable
            if values.dtype.kind == "c":
                values = np.stack([values.real, values.imag], -1)
            np.testing.assert_array_equal(
                values.astype(np.float64), np.array(wanted["values"]).reshape(values.shape), key
            )


@pytest.mark.fast
@pytest.mark.parametrize("name", SAVED[:3])
def test_objects_that_are_not_tensors(name):
    with open_checkpoint(DATA / name) as checkpoint:
        tree = checkpoint.tree
        assert (tree["epoch"], tree["global_step"], tree["lr"], tree["seen"]) == (
            3,
            1234,
            0.25,
            {1, 2},
        )
        assert (tree["size"], tree["ids"]) == ((2, 3), {"a": [1]})
        np.testing.assert_array_equal(
            tree["array"].numpy(), np.arange(6, dtype=np.int16).reshape(2, 3).T
        )
        assert tree["state_dict"]["float32"] is checkpoint.tensors["float32"]
        assert isinstance(tree["path"], Standin)
        assert tree["path"].args == ("a", "b")
        assert checkpoint.standins == {
            "torch.device": 1,
            "pathlib.PurePosixPath": 1,
            "__main__.Tagged": 1,
        }


@pytest.mark.fast
def test_metadata():
    with open_checkpoint(DATA / "zip.ckpt") as checkpoint:
        assert checkpoint.metadata == {"version": "3", "byteorder": "little"}
    with open_checkpoint(DATA / "legacy.ckpt") as checkpoint:
        assert checkpoint.metadata["protocol_version"] == 1001


@pytest.mark.fast
def test_the_ending_does_not_matter(tmp_path):
    for i, name in enumerate(SAVED):
        copy = tmp_path / f"model{i}.{('safetensors', 'json', 'bin', 'txt')[i]}"
        shutil.copy(DATA / name, copy)
        with open_checkpoint(copy) as checkpoint:
            assert checkpoint.tensors


@pytest.mark.fast
def test_a_module_saved_whole_is_named():
    with pytest.raises(ReaderError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_checkpoint(DATA / "module.pth")


# --------------------------------------------------------------------------- the golden checkpoints


@pytest.mark.fast
@pytest.mark.parametrize("name", golden_checkpoints())
def test_golden_checkpoints(name):
    if name == "none":
        pytest.skip("no reference data (LDM_JAX_GOLDEN)")
    case = json.loads((GOLDEN / "manifest.json").read_text())["cases"][name.removesuffix(".ckpt")]
    with open_checkpoint(GOLDEN / name) as checkpoint:
        assert checkpoint.tensors.keys() == case["ckpt_keys"].keys()
        for key, (shape, dtype) in case["ckpt_keys"].items():
            tensor = checkpoint.tensors[key]
            # The manifest has the dtypes before the large ones were halved.
            halved = case.get("half_ckpt") and tensor.dtype == np.float16
            assert (list(tensor.shape), "float32" if halved else str(tensor.dtype)) == (
                shape,
                dtype,
            ), key
            assert tensor.numpy().shape == tuple(shape)
        assert checkpoint.standins == {
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": 1
        }
        assert checkpoint.tree["global_step"] == 1234
        (callback,) = checkpoint.tree["callbacks"]
        assert isinstance(callback, Standin)
        assert callback.is_class
        if "weights_safetensors" in case:
            with open_checkpoint(GOLDEN / case["weights_safetensors"]) as weights:
                assert weights.tensors.keys() == checkpoint.tensors.keys()
                for key, tensor in weights.tensors.items():
                    values = checkpoint.tensors[key].numpy()
                    np.testing.assert_array_equal(values, tensor.numpy().astype(values.dtype), key)


# ---------------------------------------------------------------------------------------- hand-made


@pytest.mark.fast
@pytest.mark.parametrize(
    "data",
    [
        hostile.GOOD_ZIP,
        hostile.GOOD_LEGACY,
        hostile.GOOD_SAFETENSORS,
        hostile.archive(hostile.GOOD, deflate=True),
    ],
)
def test_the_hand_made_ones_are_good_before_they_are_spoilt(tmp_path, data):
    with open_checkpoint(written(tmp_path, {"x": data})) as checkpoint:
        assert checkpoint.tensors["weight"].numpy().tolist() == [0.0] * 4


@pytest.mark.fast
def test_safetensors_of_the_library(tmp_path):
    from safetensors.numpy import save_file

    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(1.5, ml_dtypes.bfloat16),
        "c": np.zeros((0, 3), np.int64),
        "d": np.array([True, False]),
        "e": np.array([-1, 2], np.int8),
    }
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:  # the folder
        assert (checkpoint.format, checkpoint.metadata, checkpoint.tree) == (
            "safetensors",
            {"format": "pt"},
            {},
        )
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].numpy(), array)
            assert checkpoint.tensors[name].dtype == array.dtype


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded(tmp_path, kind):
    first, second = (
        (
            hostile.safetensors({"a": hostile.entry()}),
            hostile.safetensors({"b": hostile.entry(), "c": hostile.entry(16, 16, (0,))}),
        )
        if kind == "safetensors"
        else (
            hostile.archive(hostile.mapping(a=hostile.tensor())),
            hostile.archive(hostile.mapping(b=hostile.tensor(), c=hostile.tensor(shape=(0,)))),
        )
    )
    names = {"a": f"1.{kind}", "b": f"2.{kind}", "c": f"2.{kind}"}
    index = json.dumps({"metadata": {"total_size": 32}, "weight_map": names}).encode()
    files = {f"model.{kind}.index.json": index, f"1.{kind}": first, f"2.{kind}": second}
    for path in (written(tmp_path, files), tmp_path):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.format == {"bin": "zip"}.get(kind, kind)
            assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
                "a": (4,),
                "b": (4,),
                "c": (0,),
            }
            assert checkpoint.tensors["b"].numpy().tolist() == [0.0] * 4
            assert checkpoint.metadata == {"total_size": 32}


@pytest.mark.fast
def test_the_other_byte_order(tmp_path):
    values = np.array([1, 2.5, -3, 4e9], ">f4")
    big = {
        "zip": hostile.archive(hostile.GOOD, {"0": values.tobytes()}, a__byteorder=b"big"),
        "legacy": hostile.legacy(
            hostile.mapping(weight=hostile.legacy_tensor()),
            raw=(4).to_bytes(8, "big") + values.tobytes(),
            system=hostile.mapping(little_endian=b"\x89"),
        ),
    }
    for name, data in big.items():
        with open_checkpoint(written(tmp_path, {name: data})) as checkpoint:
            np.testing.assert_array_equal(
                checkpoint.tensors["weight"].numpy(), values.astype("<f4")
            )


@pytest.mark.fast
def test_views_of_the_oldest_legacy_files(tmp_path):
    view = hostile.tup(hostile.text("v"), hostile.number(1), hostile.number(2))
    data = hostile.legacy(
        hostile.mapping(weight=hostile.legacy_tensor(view, shape=(2,))),
        raw=(4).to_bytes(8, "little") + np.arange(4, dtype=np.float32).tobytes(),
    )
    with open_checkpoint(written(tmp_path, {"x": data})) as checkpoint:
        assert checkpoint.tensors["weight"].numpy().tolist() == [1.0, 2.0]


@pytest.mark.fast
def test_a_bool_is_true_or_false(tmp_path):
    value = hostile.mapping(mask=hostile.tensor(hostile.storage("BoolStorage")))
    with open_checkpoint(
        written(tmp_path, {"x": hostile.archive(value, {"0": b"\x00\x01\x02\xff"})})
    ) as checkpoint:
        assert checkpoint.tensors["mask"].numpy().tolist() == [False, True, True, True]


class Settings(dict):
    """A class from a user's training code."""


@pytest.mark.fast
def test_foreign_objects_become_inert(tmp_path):
    tensor = hostile.mapping(weight=hostile.tensor())
    for protocol in range(6):
        settings = Settings(lr=0.1)
        settings.note = "kept"
        hidden = pickle.dumps(settings, protocol)
        # Without PROTO and STOP, to embed it in another pickle.
        hidden = hidden[2 if protocol > 1 else 0 : -1]
        value = hostile.mapping(state_dict=tensor, settings=hidden)
        path = written(tmp_path, {"x": hostile.archive(value)})
        with open_checkpoint(path) as checkpoint:
            (name,) = checkpoint.standins
            assert name.endswith("test_reader.Settings")
            assert checkpoint.standins[name] == 1
            assert type(checkpoint.tree["settings"]) is Standin
            assert checkpoint.tree["settings"].state == {"note": "kept"}


@pytest.mark.fast
def test_reading_takes_no_more_memory_than_the_tensor(tmp_path):
    values = bytes(8 << 20)
    value = hostile.mapping(weight=hostile.tensor(hostile.storage(numel=2 << 20), shape=(2 << 20,)))
    path = written(tmp_path, {"x": hostile.archive(value, {"0": values})})
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            assert tracemalloc.get_traced_memory()[1] < 4 << 20, "opening reads no values"
            array = checkpoint.tensors["weight"].numpy()
            assert tracemalloc.get_traced_memory()[1] < 13 << 20
        assert array.nbytes == len(values)
    finally:
        tracemalloc.stop()


@pytest.mark.fast
def test_closed_and_shortened_files(tmp_path):
    path = written(tmp_path, {"x": hostile.GOOD_SAFETENSORS})
    with open_checkpoint(path) as checkpoint:
        weight = checkpoint.tensors["weight"]
        os.truncate(path, len(hostile.GOOD_SAFETENSORS) - 4)
        with pytest.raises(ReaderError, match="too soon"):
            weight.numpy()
    with pytest.raises(ReaderError, match="closed"):
        weight.numpy()


# ------------------------------------------------------------------------------------------ hostile

CASES = hostile.cases()


def opened_and_read(path: Path) -> Checkpoint:
    with open_checkpoint(path) as checkpoint:
        for tensor in checkpoint.tensors.values():
            values = tensor.numpy()
            assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
    return checkpoint


def one_line(error: ReaderError) -> bool:
    return str(error).isprintable() and len(str(error)) < 600


@pytest.mark.fast
def test_the_corpus_is_large_and_its_names_differ():
    assert len(CASES) > 200
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_files_end_in_one_clear_line(case, tmp_path):
    Path(hostile.CANARY).unlink(missing_ok=True)
    # Processor time: the reader never waits, and a busy machine is no fault of its own.
    path, modules, start = written(tmp_path, case.files), set(sys.modules), time.process_time()
    with pytest.raises(ReaderError, match=case.message) as caught:
        opened_and_read(path)
    assert one_line(caught.value)
    assert caught.value.__cause__ is None
    assert time.process_time() - start < 10
    assert set(sys.modules) <= modules, "a name in a checkpoint was imported"
    assert not Path(hostile.CANARY).exists(), "code in a checkpoint was run"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(case.files), (
        "something was unpacked"
    )


@pytest.mark.fast
def test_paths_that_hold_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "many").mkdir()
    written(tmp_path / "many", {"a.bin": b"", "b.bin": b""})
    (tmp_path / "pipeline").mkdir()
    written(tmp_path / "pipeline", {"model_index.json": b"{}"})
    for name, message in {
        "missing": "no such file",
        "pipe": "not a regular file",
        "empty": "without a checkpoint",
        "many": "open one of them",
        "pipeline": "components",
        "x\0y": "null|no such file",
        "n" * 5000: "too long",
    }.items():
        with pytest.raises(ReaderError, match=message) as caught:
            open_checkpoint(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


def test_a_slice_of_the_mutations(tmp_path):
    path, outcomes = tmp_path / "x", {"read": 0, "refused": 0}
    Path(hostile.CANARY).unlink(missing_ok=True)
    for data in mutations.mutants(400, 7, [(DATA / name).read_bytes() for name in SAVED]):
        path.write_bytes(data)
        refusal = None
        try:
            opened_and_read(path)
        except ReaderError as error:
            refusal = error
        assert refusal is None or one_line(refusal), ascii(refusal)
        outcomes["refused" if refusal else "read"] += 1
    assert min(outcomes.values()) > 10, outcomes
    assert not Path(hostile.CANARY).exists()


@pytest.mark.fast
def test_a_lazy_tensor_has_shape_and_dtype():
    tensor = LazyTensor((2, 3), np.dtype(np.float16), lambda: np.zeros((2, 3), np.float16))
    assert (tensor.nbytes, repr(tensor)) == (12, "LazyTensor([2, 3], float16)")


# ------------------------------------------------------------------------------------------ inspect


@pytest.mark.fast
def test_inspect(tmp_path, capsys):
    state = hostile.mapping(
        **{
            "model.diffusion_model.time_embed.0.weight": hostile.tensor(),
            "model_ema.x": hostile.tensor(),
        }
    )
    tree = hostile.mapping(
        state_dict=state, epoch=hostile.number(3), global_step=hostile.number(12)
    )
    path = written(tmp_path, {"x.ckpt": hostile.archive(tree)})
    assert inspect_main(["inspect", str(path)]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed == {
        "file": "x.ckpt (zip)",
        "family": "latent diffusion (CompVis)",
        "values": "4 in 1 tensors without EMA",
        "dtype": "float32 4",
        "EMA": "1 tensors",
        "step": "epoch 3, global_step 12",
    }
    assert inspect_main(["inspect", str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'missing'}: there is no such file\n"
    assert inspect_main([]) == 2
