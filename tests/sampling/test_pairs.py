"""Inpainting of a folder of pictures and masks at their own sizes."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.errors import RequestError
from ldm_jax.sampling.pairs import Pair, find_pairs


@pytest.fixture
def folder(tmp_path):
    """A square and an odd-sized picture, the left half of each masked."""
    rng = np.random.default_rng(0)
    for name, (h, w) in {"a": (16, 16), "b": (13, 18)}.items():
        image = rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        mask = np.zeros((h, w), np.uint8)
        mask[:, : w // 2] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
    return tmp_path


def test_a_folder_is_painted_at_its_own_sizes(folder, tmp_path, tiny_dir, script):
    out = tmp_path / "out"
    flags = [f"--model={tiny_dir}", "--prompt=x", "--steps=2", f"--out={out}", "--num=4"]
    ran = script("sample.py", f"--pairs={folder}", *flags)
    assert ran.status == 0, ran.stderr
    made = sorted(out.glob("*.png"))
    assert [path.name for path in made] == ["00000-a.png", "00001-b.png"]
    for path in made:
        image = np.asarray(Image.open(path))
        original = np.asarray(Image.open(folder / f"{path.stem[-1]}.png"))
        assert image.shape == original.shape
        half = image.shape[1] // 2
        np.testing.assert_array_equal(image[:, half:], original[:, half:])
        assert (image[:, :half] != original[:, :half]).mean() > 0.5


@pytest.mark.fast
def test_what_is_no_pair_is_named(folder, script):
    assert find_pairs(folder)[1] == Pair(folder / "b.png", folder / "b_mask.png")
    ran = script("sample.py", f"--pairs={folder}", "--image=a.png")
    assert "--image does not go with --pairs" in ran.stderr
    ran = script("sample.py", f"--pairs={folder}", "--prompt=a", "--prompt=b")
    assert "--pairs takes one prompt" in ran.stderr
    (folder / "b.png").unlink()
    with pytest.raises(RequestError, match=r"no picture b\.\* for b_mask.png"):
        find_pairs(folder)
    (folder / "b_mask.png").unlink()
    (folder / "a_mask.png").unlink()
    with pytest.raises(RequestError, match="there is no mask"):
        find_pairs(folder)
    with pytest.raises(RequestError, match="is no folder"):
        find_pairs(folder / "a.png")
