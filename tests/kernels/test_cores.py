"""CPU cores as devices: their number, rows per core, equal pictures from a pipeline."""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.kernels import cores
from ldm_jax.sampling.pipeline import Pipeline
from tests.conftest import ExactPipeline


@pytest.fixture
def four(monkeypatch):
    """Simulates `use_cores` with four devices."""
    monkeypatch.setattr(cores, "_used", True)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:4])
    return cores.mesh_of(cores.devices())


@pytest.mark.fast
@pytest.mark.parametrize(
    ("rows", "most", "count"),
    [(1, 8, 1), (2, 8, 2), (8, 2, 2), (5, 4, 3), (16, 8, 8), (9, 8, 5), (3, 1, 1)],
)
def test_as_many_cores_as_are_done_soonest(rows, most, count):
    assert cores.fewest(rows, most) == count


@pytest.mark.fast
def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores.available() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.available() == 7


@pytest.mark.fast
def test_using_cores_after_jax_is_initialised_logs_a_warning():
    assert jax.device_count() == 8
    with pytest.raises(RuntimeError, match="before any other use of JAX"):
        cores.use_cores()
    assert cores.devices() == []


@pytest.mark.fast
def test_arrays_are_shared_without_a_copy(four):
    array = jax.device_put(jnp.arange(4096.0), jax.devices()[0])
    made = cores.replicate({"a": array}, four)["a"]
    assert len(made.addressable_shards) == 4
    for shard in made.addressable_shards:
        assert shard.data.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(made, np.arange(4096.0))


@pytest.mark.fast
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_rows_are_divided_and_come_back_in_order(four, rows):
    def call(scale, part):
        a, b = part["a"], part["b"]
        assert a.shape[0] == b.shape[0] == -(-rows // 4)
        return {
            "sum": scale * (a.sum(1) + b),
            "core": jnp.full(a.shape[0], jax.lax.axis_index(cores.AXIS)),
        }

    whole = NamedSharding(four, PartitionSpec())
    step = jax.jit(
        lambda scale, tree: cores.divide_rows(call, four, scale, tree),
        in_shardings=whole,
        out_shardings=whole,
    )
    tree = {"a": np.arange(3.0 * rows).reshape(rows, 3), "b": np.arange(rows) * 100.0}
    made = step(2.0, tree)
    np.testing.assert_array_equal(made["sum"], 2 * (tree["a"].sum(1) + tree["b"]))
    np.testing.assert_array_equal(made["core"], np.arange(rows) // -(-rows // 4))


PROMPTS = ["red apple", "blue car", "a cat", "x"]
REQUESTS = {
    "one guided picture": {"prompts": PROMPTS[0], "seeds": [1]},
    "three, not divisible": {"prompts": PROMPTS[:3], "seeds": [1, 2, 3]},
    "each core its own": {
        "prompts": PROMPTS,
        "seeds": [1, 2, 3, 4],
        "guidance": [1.5, 2.0, 3.0, 4.0],
    },
    "unguided": {"prompts": PROMPTS[:3], "seeds": [1, 2, 3], "guidance": 1.0},
    "in an interval": {"prompts": PROMPTS[0], "seeds": [1], "guidance_interval": (0, 500)},
    "features kept": {"prompts": PROMPTS[0], "seeds": [1], "cache_interval": 2},
    "with progress": {
        "prompts": PROMPTS,
        "seeds": [1, 2, 3, 4],
        "progress_every": 2,
        "decode_batch": 1,
    },
}


@pytest.mark.compile
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_pipeline_has_the_same_pictures_on_cores_and_compiles_once(
    exact_pipe, four, compilations, request_
):
    (whole,) = exact_pipe.stream(**request_)
    pipe = ExactPipeline(exact_pipe.model)
    assert len(pipe.cores) == 4
    assert pipe.mesh.size == 1
    (made,) = pipe.stream(**request_)
    np.testing.assert_allclose(made.images, whole.images, rtol=1e-4, atol=1e-4)
    if whole.progress is not None:
        assert made.progress is not None
        np.testing.assert_allclose(made.progress, whole.progress, rtol=1e-4, atol=1e-4)
    before = len(compilations)
    (again,) = pipe.stream(**request_)
    assert len(compilations) == before
    np.testing.assert_array_equal(again.images, made.images)


@pytest.mark.compile
def test_pictures_of_a_batch_equal_those_of_single_requests(exact_pipe, four):
    pipe = Pipeline(exact_pipe.model)

    def make(seed):
        return pipe(PROMPTS[0], seeds=[seed])

    one_by_one = [make(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        np.testing.assert_array_equal(list(pool.map(make, range(6))), one_by_one)


def test_who_names_devices_or_pmap_gets_them(pipe, four):
    assert Pipeline(pipe.model, devices=2).mesh.size == 2
    assert Pipeline(pipe.model, devices=2).cores == []
    assert Pipeline(pipe.model, parallel="pmap").mesh.size == 8
