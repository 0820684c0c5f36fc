"""Parts of a batch on threads: how many, in order, and the same pictures from a pipeline."""

import os
import threading

import jax
import numpy as np
import pytest

from ldm_jax import threads
from ldm_jax.pipeline import Pipeline
from ldm_jax.threads import cores, cut, on_threads, parts_for


@pytest.mark.parametrize(("available", "rows", "parts"), [(1, 8, 1), (2, 8, 2), (2, 3, 1), (4, 6, 3), (64, 5, 5)])
def test_as_many_parts_as_cores_where_they_divide_the_rows(monkeypatch, available, rows, parts):
    monkeypatch.setattr(threads, "cores", lambda: available)
    assert parts_for(rows) == parts


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == 7


def test_parts_are_called_at_once_and_joined_in_order():
    here = threading.Barrier(3, timeout=30)  # passed only by three at a time

    def call(piece):
        here.wait()
        return {"sum": piece["a"] + piece["b"][:, 0], "none": None}

    rows = {"a": np.arange(6), "b": 10 * np.arange(12).reshape(6, 2)}
    made = on_threads(call, cut(rows, 3))
    assert made["none"] is None
    np.testing.assert_array_equal(made["sum"], rows["a"] + rows["b"][:, 0])


def test_an_error_in_a_part_is_raised():
    def call(piece):
        if piece[0] == 2:
            raise ValueError("the second half")
        return piece

    with pytest.raises(ValueError, match="the second half"):
        on_threads(call, cut(np.arange(4), 2))


def test_a_batch_in_parts_has_the_same_pictures_and_compiles_once(exact_pipe, compilations, monkeypatch):
    request = {
        "prompts": ["red apple", "blue car", "a cat", "x"],
        "seeds": [1, 2, 3, 4],
        "guidance": [1.0, 2.0, 3.0, 4.0],
    }
    monkeypatch.setattr(threads, "cores", lambda: 1)
    whole = exact_pipe(**request)
    for available in (2, 4):
        monkeypatch.setattr(threads, "cores", lambda available=available: available)
        assert exact_pipe.parts(4) == available
        np.testing.assert_allclose(exact_pipe(**request), whole, rtol=1e-4, atol=1e-4)
        before = len(compilations)
        again = exact_pipe(**request)
        assert len(compilations) == before
        np.testing.assert_array_equal(again, exact_pipe(**request))


def test_several_devices_and_pmap_are_left_to_xla(pipe, monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 4)
    assert pipe.parts(8) == 4
    assert jax.device_count() == 8
    assert Pipeline(pipe.model).parts(8) == 1
    assert Pipeline(pipe.model, parallel="pmap", devices=1).parts(8) == 1
