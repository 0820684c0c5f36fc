"""Meshes, shardings and runs of several processes."""

import dataclasses
import json
import math
import re
import signal
import socket
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import child
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.distributed.compile import compile_step, make_placed
from ldm_jax.distributed.mesh import ROWS, make_mesh, row_shards
from ldm_jax.distributed.shardings import TENSOR, shardings, spec
from ldm_jax.errors import MeshError
from ldm_jax.kernels import Kernels
from ldm_jax.models.unet import UNet
from ldm_jax.plan.hlo import collectives, parse
from ldm_jax.train import loop
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.loop import train
from tests.train.test_loop import (  # noqa: F401
    assert_identical,
    final,
    first_stage,
    make_config,
    metrics,
    pictures,
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU v5p device that a mesh reads."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.fast
def test_an_axis_of_a_mesh_may_be_a_part_of_a_torus_axis():
    places = [(x, y, z) for z in range(2) for y in range(8) for x in range(8)]
    mesh = make_mesh([Chip(i, place) for i, place in enumerate(places)], fsdp=4)
    assert mesh.devices.shape == (32, 4, 1)
    for neighbours in mesh.devices[:, :, 0]:
        sides = [np.ptp([chip.coords[axis] for chip in neighbours]) + 1 for axis in range(3)]
        assert math.prod(sides) == 4  # a block, or four in a line


@pytest.fixture(scope="module")
def unet_shapes():
    """The UNet of Stable Diffusion v1: 860 million parameters, as shapes."""
    unet = UNet(
        4,
        320,
        4,
        2,
        (4, 2, 1),
        (1, 2, 4, 4),
        num_heads=8,
        use_spatial_transformer=True,
        context_dim=768,
        legacy=False,
    )
    x, t, context = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 77, 768))
    return jax.eval_shape(lambda: unet.init(jax.random.key(0), x, t, context))["params"]


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2), (2, 4)])
def test_memory_per_device_falls_with_the_mesh(unet_shapes, fsdp, tensor):
    mesh = make_mesh(fsdp=fsdp, tensor=tensor)
    total = held = split = 0
    for leaf, where in zip(
        jax.tree.leaves(unet_shapes), jax.tree.leaves(shardings(unet_shapes, mesh)), strict=True
    ):
        total += leaf.size
        held += math.prod(where.shard_shape(leaf.shape))
        split += leaf.size if "tensor" in jax.tree.leaves(tuple(where.spec)) else 0
    assert total > 8.5e8
    assert (
        held < 1.005 * total / 8
        if tensor == 1
        else held < 1.005 * (split / 8 + (total - split) / fsdp)
    )
    assert (split > 0.25 * total) == (tensor > 1)


@pytest.mark.fast
def test_a_split_leaves_whole_registers_where_it_can():
    """A TPU lays the less padded dimension along its 128 lanes; the other is sharded."""
    mesh = make_mesh(data=2, fsdp=4)
    rows, columns = PartitionSpec("fsdp", None), PartitionSpec(None, "fsdp")
    assert spec("unet/in_conv/kernel", (3, 3, 320, 320), mesh) == PartitionSpec(
        None, None, "fsdp", None
    )
    # 960 in lanes.
    assert spec("unet/in_conv/kernel", (3, 3, 960, 320), mesh) == PartitionSpec(
        None, None, None, "fsdp"
    )
    assert (
        spec("x", (320, 2560), mesh)
        == spec("x", (1280, 512), mesh)
        == spec("x", (960, 640), mesh)
        == rows
    )
    assert spec("x", (640, 320), mesh) == columns
    assert spec("x", (1024, 4100), mesh) == rows  # 4100 / 4 fills no sublanes
    assert spec("x", (1000, 4100), mesh) == columns  # neither fills any: the larger
    assert spec("x", (1001, 4100), mesh) == columns
    assert spec("x", (1001, 4101), mesh) == PartitionSpec(None, None)
    assert spec("norm/scale", (320,), mesh) == PartitionSpec()


@pytest.mark.parametrize("fsdp", [2, 8])
def test_looking_up_words_in_a_split_table_reduces_no_activations(fsdp):
    """Each device sends its channels of the rows: less than a sum over all devices."""
    mesh = make_mesh(data=8 // fsdp, fsdp=fsdp)
    words, channels, tokens = 2**16, 64, jax.ShapeDtypeStruct((16, 77), jnp.int32)
    where = spec("conditioner/token_embedding/embedding", (words, channels), mesh)
    assert where == PartitionSpec(None, "fsdp")
    # Codes are compared with every encoding, not only looked up.
    assert spec("quantize/embedding", (words, channels), mesh) == PartitionSpec("fsdp", None)
    rows, table = NamedSharding(mesh, ROWS), jax.ShapeDtypeStruct((words, channels), jnp.float32)

    def kinds(where):
        take = jax.jit(
            lambda t, i: jnp.take(t, i, axis=0),
            in_shardings=(NamedSharding(mesh, where), rows),
            out_shardings=rows,
        )
        found = collectives(parse(take.lower(table, tokens).compile().as_text()), 8)
        return {c.kind for c in found if c.size >= 4 * 16 * 77 * channels // 8}

    assert "all-reduce" not in kinds(where)
    assert "all-reduce" in kinds(PartitionSpec("fsdp", None))


@pytest.mark.parametrize("fsdp", [2, 8])
def test_the_gradient_of_a_split_table_is_summed_by_channels(fsdp):
    """Without the constraint the compiler sums the whole table's gradient on every device."""
    mesh, given = make_mesh(data=8 // fsdp, fsdp=fsdp), np.random.default_rng(0)
    rows, split = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    values = jnp.asarray(given.standard_normal((512, 64)), jnp.float32)
    places = jnp.asarray(given.integers(512, size=(256, 77)))

    def gradient(find):
        def loss(values, places):
            return jnp.sin(Kernels(mesh).keep_rows(find(values, places))).mean()

        program = jax.jit(jax.grad(loss), in_shardings=(split, rows), out_shardings=split)
        return program.lower(values, places).compile()

    def summed(compiled):
        sizes = [
            c.size for c in collectives(parse(compiled.as_text()), 8) if c.kind == "all-reduce"
        ]
        return max(sizes, default=0) / values.nbytes

    alone = gradient(Kernels().look_up)
    ours = gradient(Kernels(mesh).look_up)
    assert summed(alone) == 1
    assert summed(ours) == (1 / fsdp if fsdp < 8 else 0)  # over the data axis
    placed = jax.device_put(values, split), jax.device_put(places, rows)
    np.testing.assert_allclose(ours(*placed), alone(*placed), rtol=1e-5, atol=1e-9)


def test_every_tensor_rule_meets_a_parameter(unet_shapes):
    names = [
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree.leaves_with_path(unet_shapes)
    ]
    mesh = make_mesh(data=4, tensor=2)
    for pattern, dim in TENSOR:
        met = [name for name in names if re.search(rf"(^|/){pattern}$", name)]
        assert met, pattern
        shape = (2560, 2560)[: dim + 1] if "bias" in pattern else (2560, 2560)
        assert spec(met[0], shape, mesh)[dim] == "tensor"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": 3}, "does not make 8 devices"),
        ({"data": 2, "fsdp": 2}, "does not make 8 devices"),
        ({"data": -1, "fsdp": -1}, "-1 for one at most"),
        ({"tensor": 0}, "positive sizes"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(axes, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(**axes)


@pytest.mark.parametrize("most", [1, 3000, 2**29])
def test_samples_in_batches_equal_those_made_at_once(most):
    def make(key):
        one, two = jax.random.split(key)
        return {
            "a": jax.random.normal(one, (64, 24)),
            "b": [jax.random.normal(two, (8,)), jnp.ones((16, 16))],
            "n": 0,
        }

    mesh, key = make_mesh(fsdp=8, data=1), jax.random.key(3)
    whole = jax.jit(make)(key)
    placed = shardings(jax.eval_shape(make, key), mesh)
    parts = make_placed(make, key, placed, most)
    assert jax.tree.structure(parts) == jax.tree.structure(whole)
    # To rounding: for a program that runs once the compiler does not do its best.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), parts, whole)
    assert parts["a"].sharding == placed["a"]
    assert {shard.data.shape for shard in parts["a"].addressable_shards} == {(8, 24)}


@pytest.mark.fast
def test_rows_are_split_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert row_shards(mesh) == 4
    double = compile_step(
        lambda x, axis_name=None: 2 * x, mesh, "jit", shared=(False,), out_shared=False
    )
    out = double(np.arange(8.0))
    assert {shard.data.shape for shard in out.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(out, 2 * np.arange(8.0))


# -------------------------------------------------------------------------------- several processes


@pytest.fixture
def config(pictures, first_stage, tmp_path):  # noqa: F811
    """A diffusion run of eight steps on eight devices, sharded three ways."""
    config = make_config("diffusion", pictures, first_stage)
    config.update(steps=8, save_every=2, eval_every=8, preview_every=8)
    # Adam divides by a gradient's size: near zero, rounding decides the sign of a step.
    config.optim.lr = 1e-4
    config.mesh.update(data=-1, fsdp=2)
    return config


def write(config, folder: Path, **changes) -> Path:
    """Writes the config as a Python file."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    file = folder / f"config{abs(hash(str(changes)))}.py"
    file.write_text(
        "import json\n\nimport ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({json.dumps(config.to_json())!s}))\n"
    )
    return file


def together(file: Path, workdir: Path, devices: int = 4) -> list:
    """Two processes of four devices each, or ``devices``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [
        f"--config={file}",
        f"--workdir={workdir}",
        f"--coordinator=127.0.0.1:{port}",
        "--processes=2",
    ]
    return [child("train.py", *flags, f"--process_index={i}", devices=devices) for i in range(2)]


def ended(*processes, status: int = 0) -> list[str]:
    outputs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(
        outputs
    )
    return outputs


def reached(workdir: Path, step: int, *processes) -> None:
    lines = workdir / "metrics.jsonl"
    while all(p.poll() is None for p in processes) and not (
        lines.exists() and f'"step": {step},' in lines.read_text()
    ):
        time.sleep(0.005)


@pytest.mark.processes
def test_two_processes_are_one_run_that_resumes_on_any_topology(
    config, tmp_path, monkeypatch, no_preview
):
    train(config, tmp_path / "one")
    expected = metrics(tmp_path / "one")

    processes = together(write(config, tmp_path), tmp_path / "two")
    reached(tmp_path / "two", 4, *processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    outputs = [process.communicate()[1] for process in processes]
    kept = [int(p.name) for p in (tmp_path / "two" / "checkpoints").iterdir() if p.name.isdigit()]
    assert 2 <= max(kept) < 8, "\n".join(outputs)

    # On one process of eight devices, and then on one device.
    config.steps = 6
    train(config, tmp_path / "two")
    config.update(steps=8)
    config.mesh.fsdp = 1
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1, **axes))
    train(config, tmp_path / "two")
    found = metrics(tmp_path / "two")
    assert [(m["step"], m["part"]) for m in found if m["step"] not in (6,)] == [
        (m["step"], m["part"]) for m in expected if m["step"] not in (6,)
    ]
    for part in ("train", "validation"):
        ours = {m["step"]: m["loss"] for m in found if m["part"] == part}
        theirs = {m["step"]: m["loss"] for m in expected if m["part"] == part}
        for step, loss in theirs.items():
            np.testing.assert_allclose(ours[step], loss, rtol=1e-6)
    ours_end, theirs_end = final(tmp_path / "two", 8), final(tmp_path / "one", 8)
    for name, expected_array in theirs_end.items():
        assert np.abs(ours_end[name].astype(np.float64) - expected_array).max() < 1e-5, name


@pytest.mark.processes
def test_signals_save_at_one_step_and_sigterm_prints_how_to_resume(config, tmp_path):
    config.update(steps=2000, save_every=1000, eval_every=3, preview_every=1000)
    config.best.keep = 1
    file = write(config, tmp_path)
    processes = together(file, tmp_path / "run")
    reached(tmp_path / "run", 3, *processes)
    processes[1].send_signal(signal.SIGUSR1)  # one process receives it, both save
    saved = tmp_path / "run" / "checkpoints"
    while (
        all(p.poll() is None for p in processes)
        and sum(p.name.isdigit() for p in saved.iterdir()) < 2
    ):
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)  # one process receives it, both stop
    outputs = ended(*processes, status=75)
    saves = [re.findall(r"SIGUSR1: step (\d+) is saved", text) for text in outputs]
    assert (len(saves[0]), saves[1]) == (1, [])  # only the first process logs
    assert (saved / saves[0][0] / "state").is_dir()
    steps = {
        line.split(" at step ")[1].split(",")[0]
        for text in outputs
        for line in text.splitlines()
        if "stopped at" in line
    }
    assert len(steps) == 1
    assert (saved / steps.pop() / "state").is_dir()
    losses = {m["step"]: m["loss"] for m in metrics(tmp_path / "run") if m["part"] == "validation"}
    assert [p.name for p in (tmp_path / "run" / "best").iterdir()] == [
        str(min(losses, key=losses.__getitem__))
    ]


def test_every_picture_of_an_epoch_is_seen_once_by_any_number_of_processes(config):
    """Five batches of eight are two epochs, read by two processes and then by one."""
    seen = []
    for step in range(5):
        count = 2 if step < 2 else 1
        for index in range(count):
            batch = next(make_loader(config, "train", (index, count)).iterate(step))
            seen += batch["index"].tolist()
    assert sorted(seen[:20]) == list(range(20))
    assert sorted(seen[20:]) == list(range(20))
