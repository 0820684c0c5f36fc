"""Noise that a request brings, in place of the seed's."""

import numpy as np
import pytest

from ldm_jax.diffusion.samplers import initial_noise
from ldm_jax.errors import RequestError
from ldm_jax.sampling.inputs import read_noise, seed_words
from ldm_jax.sampling.program import keys_of

SHAPE = (8, 8, 4)  # of the latents of 16x16 pixels


def noise_of(*seeds: int) -> np.ndarray:
    return np.asarray(initial_noise(keys_of(seed_words(seeds)), SHAPE))


def test_given_noise_replaces_that_of_the_seed(pipe, tmp_path):
    settings = {"steps": 2, "eta": 0.0, "guidance": 1.0, "size": (16, 16)}
    expected = pipe("a", seeds=[3, 4], **settings)
    one, other = noise_of(3, 4)
    np.save(tmp_path / "x_T.npy", other.transpose(2, 0, 1)[None])  # as PyTorch has it
    made = pipe("a", seeds=[8, 9], noise=[one, tmp_path / "x_T.npy"], **settings)
    np.testing.assert_array_equal(made, expected)
    same = pipe("a", seeds=[8, 9], noise=other, **settings)
    np.testing.assert_array_equal(same, expected[[1, 1]])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((8, 8, 3)), r"noise of shape \(8, 8, 3\): the latents of this picture are"),
        (np.zeros((2, 8, 8, 4)), "of shape"),
        (np.full(SHAPE, np.inf), "finite"),
        ("missing.npy", "cannot be read"),
        ("text.npy", "no .npy file of numbers"),
    ],
)
def test_noise_that_does_not_fit(value, message, tmp_path):
    (tmp_path / "text.npy").write_text("text")
    value = tmp_path / value if isinstance(value, str) else value
    with pytest.raises(RequestError, match=message):
        read_noise(value, SHAPE)


@pytest.mark.fast
def test_noise_needs_one_for_each_picture(pipe):
    with pytest.raises(RequestError, match="2 noises for 3 pictures"):
        pipe("a", seeds=[1, 2, 3], noise=[*noise_of(1, 2)])
