"""Bulk sampling: a fixed batch size, and runs that may be killed at any time."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, pipeline_of
from PIL import Image

from ldm_jax.errors import RequestError
from ldm_jax.io.png import read_settings
from ldm_jax.sampling.bulk import labels_of, make_many

pytestmark = pytest.mark.compile

PROMPTS = ["red apple", "blue boat", "green tree"]


class Killed(Exception):
    pass


def killed_after(batches: int):
    def record(done: int, made: int) -> None:
        if done >= batches * 8:
            raise Killed

    return record


def digest(path: Path) -> str:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    """An uninterrupted run, per format."""
    out = tmp_path_factory.mktemp("whole")
    return {
        form: make_many(pipe, out / form, 50, form=form, batch=8, seed=3, prompts=PROMPTS)
        for form in ("npz", "zip")
    }


@pytest.mark.parametrize("form", ["npz", "zip"])
def test_a_killed_run_resumes_and_writes_the_same_bytes(pipe, whole, tmp_path, form):
    request = {"form": form, "batch": 8, "seed": 3, "prompts": PROMPTS}
    for batches in (2, 4):
        with pytest.raises(Killed):
            make_many(pipe, tmp_path / "out", 50, **request, report=killed_after(batches))
        partial = tmp_path / "out" / "pictures.partial"
        assert partial.stat().st_size == batches * 8 * 16 * 16 * 3
        with open(partial, "ab") as file:
            file.write(b"half a batch")
    made = []
    path = make_many(
        pipe, tmp_path / "out", 50, **request, report=lambda done, new: made.append((done, new))
    )
    assert made == [(32, 0), (40, 8), (48, 8), (50, 2)]
    assert digest(path) == digest(whole[form])
    assert not partial.exists()
    assert make_many(pipe, tmp_path / "out", 50, **request) == path


def test_every_format_holds_the_same_pictures(pipe, whole, tmp_path):
    folder = make_many(pipe, tmp_path / "out", 50, form="png", batch=8, seed=3, prompts=PROMPTS)
    with np.load(whole["npz"]) as file:
        images = file["arr_0"]
    with zipfile.ZipFile(whole["zip"]) as archive:
        assert archive.namelist() == [f"{i:06d}.png" for i in range(50)]
        packed = archive.read("000049.png")
    assert (np.asarray(Image.open(folder / "000049.png")) == images[49]).all()
    (tmp_path / "one.png").write_bytes(packed)
    assert (np.asarray(Image.open(tmp_path / "one.png")) == images[49]).all()
    kept = read_settings(folder / "000049.png")
    assert (kept["seed"], kept["prompt"]) == (52, PROMPTS[49 % 3])
    alone = pipe([PROMPTS[1]] * 8, seeds=[52] * 8)[0]
    assert np.abs(alone.astype(int) - images[49]).max() <= 1


def test_batches_compile_once(pipe, tmp_path, compilations):
    make_many(pipe, tmp_path / "out", 11, batch=8, prompts="x")
    before = len(compilations)
    make_many(pipe, tmp_path / "more", 30, batch=8, prompts="y", guidance=2.0)
    assert len(compilations) == before


def test_another_request_needs_another_folder(pipe, whole, tmp_path):
    folder = whole["npz"].parent
    with pytest.raises(RequestError, match=r"holds a run with seed=3, not 4: give another --out"):
        make_many(pipe, folder, 50, batch=8, seed=4, prompts=PROMPTS)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RequestError, match="is not empty and holds no run of ours"):
        make_many(pipe, tmp_path, 50, prompts=PROMPTS)
    for request, message in [
        ({"form": "jpg"}, "format 'jpg' does not exist"),
        ({"num": 0}, "0 pictures from seed 0 on"),
        ({"seed": 2**64 - 1, "num": 2}, r"seeds must be from 0 to 2\*\*64 - 1"),
        ({"classes": [1]}, "this model has no classes"),
        ({"prompts": None}, "conditioned on prompts: give at least one"),
        ({"steps": 0}, "steps must be from 1 to 100, not 0"),
    ]:
        with pytest.raises(RequestError, match=message):
            make_many(pipe, tmp_path / "out", **{"num": 50, "prompts": PROMPTS, **request})
    assert not (tmp_path / "out").exists()
    assert json.loads((folder / "run.json").read_text())["num"] == 50


def test_labels_stand_next_to_pictures_of_classes(tmp_path):
    config = {
        **TINY,
        "conditioner": {"kind": "class", "embed_dim": 16, "n_classes": 4},
        "classes": ["a", "goldfish", "c"],
    }
    pipe = pipeline_of(config)
    path = make_many(pipe, tmp_path / "out", 7, batch=4, classes="all", steps=1)
    with np.load(path) as file:
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert file["arr_0"].shape == (7, 16, 16, 3)
    assert labels_of(pipe, ["goldfish", 3]) == [1, 3]
