"""The queue: pictures do not depend on batch-mates, and no request harms another."""

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

import ldm_jax
from ldm_jax.errors import RequestError
from ldm_jax.sampling.request import Request

pytestmark = pytest.mark.compile

BATCH = 4


def request(prompt: str, *seeds: int, **given) -> Request:
    return Request(prompts=prompt, seeds=list(seeds), steps=2, **given)


@pytest.fixture
def calls(pipe, monkeypatch):
    """The seeds of every batch that is computed."""
    seen, compute = [], pipe.compute

    def counted(sampler, config, steps, inputs):
        seen.append(np.asarray(inputs.seeds).tolist())
        return compute(sampler, config, steps, inputs)

    monkeypatch.setattr(pipe, "compute", counted)
    return seen


def test_requests_share_batches_and_get_the_pictures_they_get_alone(pipe, calls):
    asked = [
        request("red apple", 1),
        request("blue boat", 2, 3, guidance=1.5),
        request("green tree", 4, 5, 6, negative="blurred"),
    ]
    alone = [
        pipe(
            prompts=r.prompts,
            seeds=r.seeds,
            steps=2,
            guidance=r.guidance,
            negative=r.negative,
            batch=BATCH,
        )
        for r in asked
    ]
    calls.clear()
    with ldm_jax.serve(pipe, batch=BATCH, wait=5.0) as server:
        futures = [server.submit(r) for r in asked]
        made = [future.result(60) for future in futures[:2]]
        server.close()  # does not wait for a full batch any more
        made.append(futures[2].result(60))
    assert calls == [[1, 2, 3, 4], [5, 6, 6, 6]]
    for ours, theirs in zip(made, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_other_steps_are_another_batch(pipe, calls):
    with ldm_jax.serve(pipe, batch=BATCH, wait=0.5) as server:
        first = server.submit(request("red apple", 1))
        other = server.submit(Request(prompts="red apple", seeds=[1], steps=3))
        third = server.submit(request("blue boat", 2))
        for future in (first, other, third):
            assert future.result(60).shape == (1, 16, 16, 3)
    assert sorted(map(tuple, calls)) == [(1, 1, 1, 1), (1, 2, 2, 2)]


def test_a_bad_request_is_refused_at_once_and_a_failing_one_fails_alone(pipe):
    with ldm_jax.serve(pipe, batch=BATCH, wait=0.5) as server:
        with pytest.raises(RequestError, match="sampler 'none'"):
            server.submit(request("red apple", 1, sampler="none"))
        with pytest.raises(RequestError, match="progress_every"):
            server.submit(request("red apple", 1, progress_every=1))
        wrong = server.submit(request("red apple", 1, guidance=3e38))
        right = server.submit(request("red apple", 1))
        np.testing.assert_array_equal(
            right.result(60), pipe(prompts="red apple", seeds=[1], steps=2, batch=BATCH)
        )
        with pytest.raises(RequestError, match="NaN or infinite"):
            wrong.result(60)
        assert server.submit(request("red apple", 1)).result(60).shape == (1, 16, 16, 3)


def test_cancelling_limit_and_closing(pipe, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    compute = pipe.compute

    def slow(*args):
        entered.set()
        assert leave.wait(60)
        return compute(*args)

    monkeypatch.setattr(pipe, "compute", slow)
    server = ldm_jax.serve(pipe, batch=1, wait=0.0, limit=2)
    first = server.submit(request("red apple", 1))
    assert entered.wait(60)
    second, third = (server.submit(request("red apple", i)) for i in (2, 3))
    with pytest.raises(RequestError, match="2 pictures wait already"):
        server.submit(request("red apple", 4))
    assert not first.cancel()
    assert second.cancel()
    leave.set()
    assert third.result(60).shape == first.result(60).shape
    with pytest.raises(CancelledError):
        second.result(1)
    server.close()
    with pytest.raises(RequestError, match="closed"):
        server.submit(request("red apple", 5))


def test_a_bug_reaches_every_caller(pipe, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(pipe, "compute", broken)
    with ldm_jax.serve(pipe, batch=2, wait=0.5) as server:
        futures = [server.submit(request("red apple", i)) for i in range(3)]
        for future in futures:
            with pytest.raises(ZeroDivisionError):
                future.result(60)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"wait": -1.0}, {"limit": 0}])
def test_arguments_out_of_range(pipe, wrong):
    started = time.monotonic()
    with pytest.raises(RequestError, match="must be"):
        ldm_jax.serve(pipe, **wrong)
    assert time.monotonic() - started < 5
