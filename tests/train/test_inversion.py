"""Textual inversion: vectors of a new word are trained, exported, and used in prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import pictures  # noqa: F401
from test_train_lora import MODEL, TINY, write_model

from ldm_jax.configs.common import base
from ldm_jax.convert.conversion import export
from ldm_jax.convert.embedding import read_embedding
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import CheckpointError, ConfigError, DataError, TargetError
from ldm_jax.io.checkpoint import load_model, save_model
from ldm_jax.sampling.pipeline import load
from ldm_jax.train import loop
from ldm_jax.train.config import check_config, complete
from ldm_jax.train.loop import train
from ldm_jax.train.tasks import task_class

BERT = {**MODEL, "conditioner": TINY["conditioner"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with CLIP's text tower, and with the BERT encoder."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, c) for name, c in (("clip", MODEL), ("bert", BERT))}


def make_config(folder, pictures):  # noqa: F811
    """A run of two steps of a word of two vectors."""
    config = base("inversion")
    config.update(steps=2, batch_size=4, ema=0.0, save_every=2, eval_every=2, preview_every=2)
    config.update(eval_batches=1, log_every=1, preview_captions=("a <toy>",))
    config.data.update(path=str(pictures), size=(8, 8), caption="{text} <toy>")
    config.optim.update(lr=0.5)
    config.loss.update(caption_dropout=0.0)
    config.model.path = str(folder)
    config.adapter.update(word="<toy>", vectors=2, initial="apple")
    return config


def task_of(config, **options):
    config = complete(config)
    check_config(config)
    return task_class(config).from_config(config, **options).with_measured({"scale_factor": 0.5})


@pytest.mark.compile
@pytest.mark.parametrize("name", ["clip", "bert"])
def test_a_word_is_trained_exported_and_used(name, folders, pictures, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
    config = make_config(folders[name], pictures)
    task = task_of(config)
    tower = task.model.conditioner
    size = tower.module.vocab_size
    tokens = tower.encode(["a <toy> b"])[0].tolist()
    at = tokens.index(size - 2)
    assert tokens[at : at + 2] == [size - 2, size - 1]
    start = task.init(jax.random.key(0))["vectors"]["text"]
    table = task.base["conditioner"][tower.table]["embedding"]
    assert len(table) == size - 2
    (first, *_) = tower.tokenizer("apple", add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(start, np.stack([table[first]] * 2))

    trained = train(config, tmp_path / "run")
    fields, params = load_model(trained)
    assert (fields["kind"], fields["word"]) == ("inversion", "<toy>")
    assert list(params) == ["vectors"]
    vectors = params["vectors"]["text"]
    assert (np.abs(vectors - start).max(axis=1) > 0).all()  # both tokens have learned
    files = {"a1111": tmp_path / "toy.pt", "embedding": tmp_path / "toy.safetensors"}
    for to, file in files.items():
        export(trained, to, file)
    for file in (trained, *files.values()):
        found = read_embedding(file)
        assert found.tokens == ("<toy>", "<toy>_1")
        np.testing.assert_array_equal(found.vectors[""], vectors)
    options = {"seeds": [3], "steps": 2, "guidance": 2.0}
    made = [
        load(folders[name], devices=1, embedding=[file])(["a <toy>"], **options)
        for file in (trained, files["a1111"])
    ]
    np.testing.assert_array_equal(*made)
    other = load(folders[name], devices=1, embedding=[f"<doll>={trained}"])
    np.testing.assert_array_equal(other(["a <doll>"], **options), made[0])
    plain = load(folders[name], devices=1)(["a <toy>"], **options)
    assert np.abs(plain.astype(int) - made[0]).max() > 3


@pytest.mark.fast
def test_mistakes_are_one_line(folders, pictures, tmp_path):  # noqa: F811
    def changed(**fields):
        config = make_config(folders["clip"], pictures)
        config.adapter.update(fields)
        return config

    cases = {
        "give a single word that is new": changed(word=""),
        "word 'a b': give a single word": changed(word="a b"),
        "'apple</w>' is in the vocabulary": changed(word="apple</w>"),
        "vectors must be from 1 to 75": changed(vectors=0),
        "has no token: give another word": changed(initial=" "),
    }
    for message, case in cases.items():
        with pytest.raises(ConfigError, match=message) as error:
            task_of(case)
        assert "\n" not in str(error.value)
    config = make_config(folders["clip"], pictures)
    config.data.caption = "{text}"
    with pytest.raises(DataError, match="no caption has the word '<toy>'"):
        train(config, tmp_path / "run")
    task = task_of(make_config(folders["clip"], pictures), weights=False)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    assert shapes["vectors"]["text"] == jax.ShapeDtypeStruct((2, 16), jnp.float32)
    with pytest.raises(ConfigError, match="a lora is no textual inversion"):
        task.adopt({"kind": "lora"}, {})
    with pytest.raises(TargetError, match="latent_diffusion is no textual inversion"):
        export(folders["clip"], "a1111", tmp_path / "x.pt")
    two = {"vectors": {n: np.ones((1, 4), np.float32) for n in ("clip_l", "clip_g")}}
    save_model(tmp_path / "two", {"kind": "inversion", "word": "x"}, two)
    with pytest.raises(TargetError, match="vectors of one text encoder"):
        export(tmp_path / "two", "a1111", tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="another base model"):
        load(folders["bert"], devices=1, embedding=[tmp_path / "two"])
