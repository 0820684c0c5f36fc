"""The model that ships with the package."""

from pathlib import Path

import numpy as np
import pytest

import ldm_jax
from ldm_jax.conditioning.tokenizers import ASSETS
from ldm_jax.sampling.pipeline import Pipeline

pytestmark = pytest.mark.compile

EMOJI = ASSETS / "emoji"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return ldm_jax.load("emoji", devices=1)


def test_the_demo_model_and_its_pictures_stay_small() -> None:
    def size(path: Path) -> int:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    assert size(EMOJI) <= 20 * 2**20
    assert (ASSETS / "emoji_subset.zip").stat().st_size <= 3_500_000
    assert (EMOJI / "README.md").is_file()


def test_the_demo_paints_on_white_and_listens_to_its_prompt(pipe: Pipeline) -> None:
    images = pipe(
        ["red apple, noto style", "flag: Ukraine, twemoji style"], seeds=[0, 0], steps=10
    ).astype(int)
    assert images.shape == (2, 64, 64, 3)
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 200).mean() > 0.7  # the icons stand on white
    assert np.abs(images[0] - images[1]).mean() > 10


def test_words_absent_from_training_have_no_effect(pipe: Pipeline) -> None:
    encode = pipe.model.conditioner.encode
    one, other = encode(["senate"]), encode(["philosophy"])
    assert (one != other).any()
    table = np.asarray(pipe.model.params["conditioner"]["token_emb"]["embedding"])
    words = [ids[(ids != 0) & (ids != 101) & (ids != 102)] for ids in (one[0], other[0])]
    assert (table[words[0][0]] == table[words[1][0]]).all()
