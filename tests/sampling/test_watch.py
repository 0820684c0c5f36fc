"""Pipeline.watch: a run in parts gives the pictures of a run at once."""

import jax
import numpy as np
import pytest

from ldm_jax.errors import RequestError
from ldm_jax.sampling.pipeline import load
from ldm_jax.sampling.request import Request

pytestmark = pytest.mark.compile

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (16, 16, 3)).astype(np.uint8)
MASK = np.zeros((16, 16), np.uint8)
MASK[4:12, 4:12] = 255
RUNS = {
    "ddim with noise": ({"eta": 1.0, "steps": 5}, 5),
    "several outputs": ({"sampler": "plms", "steps": 5}, 6),
    "rows before the start": ({"image": IMAGE, "strength": 0.5, "steps": 6}, 3),
    "a known region": (
        {"image": IMAGE, "mask": MASK, "sampler": "euler_ancestral", "steps": 4},
        4,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_parts_give_the_pictures_of_the_whole(pipe, name):
    options, calls = RUNS[name]
    request = Request("red apple", seeds=[3, 4, 5], batch=2, **options)
    whole = np.concatenate([batch.images for batch in pipe.batches(request)])
    seen = list(pipe.watch(request, 2))
    parts = -(-calls // 2)
    assert len(seen) == 2 * parts
    done = [min(2 * (k + 1) / calls, 1.0) for k in range(parts)]
    np.testing.assert_allclose([batch.done for batch in seen], done * 2)
    finished = np.concatenate([batch.images for batch in seen if batch.done == 1])
    np.testing.assert_allclose(finished.astype(int), whole.astype(int), atol=1)
    # A prediction on the way is a picture, and not yet the last one.
    early = seen[0].images
    assert early.shape == (2, 16, 16, 3)
    assert parts == 1 or np.abs(early.astype(int) - whole[:2]).max() > 2


@pytest.mark.parametrize("devices", [1, 2])
def test_the_parts_are_one_program(tiny_dir, compilations, devices):
    pipe = load(tiny_dir, devices=devices)
    parts = pipe.watch(Request("red apple", seeds=[0, 1], steps=4), 2)
    next(parts)
    before = len(compilations)
    list(parts)
    list(pipe.watch(Request("blue boat", seeds=[1, 2], steps=4), 1))
    assert len(compilations) == before


def test_parts_run_on_several_devices(tiny_dir, pipe):
    request = Request("red apple", seeds=range(2), steps=3, sampler="dpmpp_2m")
    expected = next(iter(pipe.batches(request))).images
    *_, last = load(tiny_dir, devices=2).watch(request, 2)
    np.testing.assert_allclose(last.images.astype(int), expected.astype(int), atol=1)
    assert jax.device_count() > 1


@pytest.mark.parametrize(
    "options", [{"sampler": "dpm_adaptive"}, {"image": IMAGE, "variation": 0.5}]
)
def test_what_has_no_parts_is_sampled_at_once(pipe, options):
    (batch,) = pipe.watch(Request("red apple", steps=3, **options), 1)
    assert batch.done == 1


def test_a_mistake_is_refused_at_once(pipe):
    with pytest.raises(RequestError, match="every must be at least 1"):
        pipe.watch(Request("red apple"), 0)
    with pytest.raises(RequestError, match="did you mean 'ddim'"):
        pipe.watch(Request("red apple", sampler="ddin"), 1)
