"""python -m ldm_jax.data check, and the configs that come with the package."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.configs import emoji_class, emoji_inpaint, emoji_layout, emoji_semantic, emoji_sr
from ldm_jax.configs.common import base
from ldm_jax.train.check import check
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.tasks.diffusion import DiffusionTask


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of 16 x 16 pixels in two classes, with captions."""
    rows = []
    for i in range(12):
        Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(tmp_path / f"{i:02d}.png")
        rows.append(
            {
                "file_name": f"{i:02d}.png",
                "text": f"number {i}",
                "kind": "rare" if i == 7 else "usual",
            }
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def config_of(folder: Path, conditioner: dict, **condition) -> ConfigDict:
    config = base("diffusion")
    config.batch_size = 4
    config.data.update(path=str(folder), size=(16, 16), condition=ConfigDict(condition))
    config.model.conditioner = ConfigDict(conditioner)
    return config


BERT = {"kind": "bert", "dim": 8, "depth": 1, "max_seq_len": 6}


def test_good_data_have_nothing_wrong(folder, tmp_path):
    out = tmp_path / "sheet.png"
    assert check(config_of(folder, BERT), out) == []
    sheet = np.asarray(Image.open(out))
    grey = {20 * i for i in range(12)}
    found = set(np.unique(sheet[(sheet == sheet[..., :1]).all(-1)]))
    assert grey <= found  # every picture is on it


def test_every_fault_is_a_line(folder, tmp_path):
    (folder / "03.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((9, 16, 3), np.uint8)).save(folder / "04.png")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[0]["text"], rows[1]["text"], rows[2]["text"] = " ", "one two three four five", "☃ x"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = check(config_of(folder, BERT), tmp_path / "sheet.png")
    assert len(problems) == 5
    for line, expected in zip(
        problems,
        [
            "train: 1 of 12 captions are empty (00.png)",
            "train: 1 of 12 captions are cut after 4 tokens, "
            "model.conditioner.max_seq_len - 2 ('one two three four five')",
            "train: 1 of 12 captions have tokens that the model does not know ('☃ x')",
            "train: 1 of 12 pictures cannot be read and are skipped "
            "(03.png: not a picture that Pillow can read)",
            "train: 1 of 12 pictures are smaller than 16x16 and are enlarged (04.png 9x16)",
        ],
        strict=True,
    ):
        assert line == expected
    small = config_of(folder, BERT | {"vocab_size": 1100, "max_seq_len": 9})
    small.batch_size = 20
    assert [line.split(": ")[1][:34] for line in check(small, tmp_path / "s.png", sample=2)] == [
        "a batch of 20 has pictures twice",
        "1 of 12 captions are empty (00.png",
        "11 of 12 captions have tokens that",
    ]


@pytest.mark.fast
def test_classes_and_conditions_are_looked_at(folder, tmp_path):
    problems = check(
        config_of(folder, {"kind": "class", "embed_dim": 8}, column="kind"), tmp_path / "a.png"
    )
    assert problems == ["train: 1 of 2 classes have fewer than 10 pictures (rare)"]
    maps = {"kind": "rescale", "in_channels": 4, "size": (16, 16)}
    for i in range(12):
        Image.fromarray(np.full((16, 16), 2 + i % 3, np.uint8)).save(folder / f"map{i:02d}.png")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"map": f"map{i:02d}.png", "boxes": []} for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_of(folder, maps, column="map")
    config.data.files = ("map",)
    (line,) = check(config, tmp_path / "b.png")
    assert "4 of 12 pictures stop a training" in line
    assert "has the label 4: model.conditioner.in_channels is 4" in line
    layout = {"kind": "tokens", "dim": 8, "depth": 1, "max_seq_len": 6, "vocab_size": 100}
    problems = check(config_of(folder, layout, column="boxes"), tmp_path / "c.png")
    assert problems == ["train: 12 of 12 pictures have no box (00.png, 01.png, 02.png ...)"]


@pytest.mark.fast
def test_check_is_a_command(script, folder, tmp_path):
    config = tmp_path / "tiny.py"
    made = config_of(folder, BERT).to_json()
    config.write_text(
        "import json, ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({made!r}))\n"
    )
    ran = script("ldm_jax/data/__main__.py", "check", config, f"--out={tmp_path / 'sheet.png'}")
    assert ran.status == 0
    assert ran.lines[0] == f"train: 12 pictures in {folder}"
    assert ran.lines[-1] == "no problem was found"
    (folder / "05.png").write_bytes(b"")
    ran = script("ldm_jax/data/__main__.py", "check", config, f"--out={tmp_path / 'sheet.png'}")
    assert ran.status == 1
    assert (
        ran.lines[-1]
        == "problem: train: 1 of 12 pictures cannot be read and are skipped (05.png: empty file)"
    )


@pytest.mark.parametrize(
    "module", [emoji_class, emoji_inpaint, emoji_sr, emoji_semantic, emoji_layout]
)
def test_configs_fit_their_data(module):
    """As shapes: the data match the inputs of the model."""
    config = module.get_config("smoke")
    if "count" in config.data:
        config.data.count = 40
    task = DiffusionTask.from_config(config)
    batch = task.host_batch(next(make_loader(config, "train").iterate()))
    params = jax.eval_shape(task.init, jax.random.key(0))
    loss, _ = jax.eval_shape(
        lambda *args: task.loss(*args, True), params, task.frozen, batch, jnp.int32(0)
    )
    assert loss.shape == ()
