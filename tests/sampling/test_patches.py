"""Pictures larger than the patches that the UNet runs on."""

import pytest

from ldm_jax.conditioning.layout import Layout
from ldm_jax.conditioning.text import BertText
from ldm_jax.errors import RequestError


def test_larger_pictures_are_made_of_patches(pipe):
    def make(patch, size=(16, 32)):
        return pipe(prompts="a", seeds=3, steps=2, size=size, patch=patch, batch=1)

    whole, cut = make(0), make(16)
    assert whole.shape == cut.shape == (1, 16, 32, 3)
    assert (whole != cut).any()
    assert (make(32) == whole).all()  # a patch that holds the picture
    assert (make(16, (16, 16)) == make(0, (16, 16))).all()


@pytest.mark.fast
@pytest.mark.parametrize("patch", [-8, 12])
def test_sizes_of_patches(pipe, patch):
    with pytest.raises(RequestError, match=f"patch must be 0 or a multiple of 8, not {patch}"):
        pipe(prompts="a", patch=patch, steps=1)


def test_what_patches_cannot_do(pipe):
    with pytest.raises(RequestError, match="leave cache_interval at 1"):
        pipe(prompts="a", size=(16, 32), patch=16, cache_interval=2, steps=2)
    assert BertText.by_patch
    assert not Layout.by_patch
