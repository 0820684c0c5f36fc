"""Training from cached latents equals training from pictures."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_loop import first_stage, make_config, metrics, pictures  # noqa: F401

from ldm_jax.data import LatentSource
from ldm_jax.data import latents as cache_format
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import ConfigError, DataError
from ldm_jax.io.checkpoint import load_model, save_model
from ldm_jax.train import encode as encoding
from ldm_jax.train import loop
from ldm_jax.train.encode import check_cache, encode
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.loop import train
from ldm_jax.train.tasks.diffusion import DiffusionTask

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
    monkeypatch.setattr(encoding, "BATCH", 8)


def run_of(pictures, first_stage):  # noqa: F811
    config = make_config("diffusion", pictures, first_stage)
    config.preview_every = 1000
    config.data.update(split_column="text", holdout=0.3)
    return config


@pytest.fixture
def config(pictures, first_stage):  # noqa: F811
    return run_of(pictures, first_stage)


@pytest.fixture(scope="module")
def encoded(pictures, first_stage, tmp_path_factory):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH", 8)
        return encode(
            run_of(pictures, first_stage),
            tmp_path_factory.mktemp("encoded") / "cache",
            shard_size=8,
        )


@pytest.fixture
def cache(encoded, tmp_path):
    """A copy that tests may damage."""
    return shutil.copytree(encoded, tmp_path / "cache")


def with_cache(config, folder):
    config = config.copy_and_resolve_references()
    config.data.cache = str(folder)
    return config


def test_training_from_the_cache_is_training_from_pictures(config, cache, tmp_path, no_preview):
    config.loss.posterior = "mode"
    train(config, tmp_path / "pictures")
    train(with_cache(config, cache), tmp_path / "latents")
    expected, found = metrics(tmp_path / "pictures"), metrics(tmp_path / "latents")
    assert [m["step"] for m in expected] == [m["step"] for m in found]
    assert {m["part"] for m in found} == {"train", "validation"}
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=2e-3)  # the cache is float16


def test_batches_are_those_of_the_pictures(config, cache):
    pictures_, latents = (
        make_loader(config, "train"),
        make_loader(with_cache(config, cache), "train"),
    )
    for step in (0, 1, 7):
        a, b = next(pictures_.iterate(step)), next(latents.iterate(step))
        np.testing.assert_array_equal(a["index"], b["index"])
        assert a["caption"] == b["caption"]
    # The mirrored ones too: the same picture has two sides in the cache.
    sides = LatentSource(cache, "train")[0]["moments"]
    assert sides.shape[0] == 2
    assert np.abs(sides[0] - sides[1]).max() > 1e-3


def test_the_last_batch_and_pictures_that_cannot_be_read_are_marked(
    config,
    pictures,  # noqa: F811
    cache,
    tmp_path,
):
    latents = make_loader(with_cache(config, cache), "validation")
    count = latents.count
    valid = np.concatenate([batch["valid"] for batch in latents.batches()])
    assert count % 8
    assert valid.tolist() == [i < count for i in range(len(valid))]

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in pictures.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config.data.path = str(broken)
    name = make_loader(config, "train").source.name(2)
    (broken / name).write_bytes(b"no picture")
    source = LatentSource(encode(config, tmp_path / "other", shard_size=8), "train")
    assert [i for i in range(len(source)) if not source[i]["valid"]] == [2]
    assert source[2]["caption"] == source[3]["caption"]


def test_an_interrupted_encode_resumes(config, cache, tmp_path, monkeypatch):
    shards = sorted(path.name for path in cache.glob("*.array_record"))
    assert [name[:5] for name in shards].count("train") >= 2
    stopped, written, write = tmp_path / "stopped", [], cache_format.write_shard

    def stops(file, records, info):
        if written:
            next(iter(records))
            file.with_name(f"{file.name}.part").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(file.name)
        write(file, records, info)

    monkeypatch.setattr(encoding, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        encode(config, stopped, shard_size=8)
    with pytest.raises(DataError, match=r"not whole: .* run the encode command again"):
        make_loader(with_cache(config, stopped), "train")

    seen = []
    monkeypatch.setattr(
        encoding, "write_shard", lambda f, r, i: (seen.append(f.name), write(f, r, i))
    )
    encode(config, stopped, shard_size=8)
    assert sorted([*written, *seen]) == shards
    for part in ("train", "validation"):
        ours, theirs = LatentSource(stopped, part), LatentSource(cache, part)
        for i in range(len(theirs)):
            np.testing.assert_array_equal(ours[i]["moments"], theirs[i]["moments"])


def test_a_truncated_shard_is_named_and_made_again(config, cache):
    shard = sorted(cache.glob("train-*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=rf"1 of \d shards .*first: {shard.name}.*run the encode command again"
    ):
        make_loader(with_cache(config, cache), "train")
    encode(config, cache, shard_size=8)
    make_loader(with_cache(config, cache), "train")


def test_a_cache_of_something_else_is_refused(config, cache, tmp_path):
    with_other = with_cache(config, cache)
    with_other.data.crop = "none"
    with pytest.raises(DataError, match=r"made with data.crop='center', not 'none'"):
        train(with_other, tmp_path / "run")

    saved, params = load_model(config.model.first_stage.path)
    save_model(tmp_path / "other", saved, jax.tree.map(lambda a: a + 1, params))
    with_other = with_cache(config, cache)
    with_other.model.first_stage.path = str(tmp_path / "other")
    with pytest.raises(DataError, match="made with another first stage"):
        train(with_other, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="not empty and holds no latent cache"):
        encode(config, tmp_path / "mine", shard_size=8)
    with pytest.raises(DataError, match="is no latent cache"):
        make_loader(with_cache(config, tmp_path / "mine"), "train")


def test_uncacheable_data_is_an_error_before_encoding(config, pictures, first_stage, tmp_path):  # noqa: F811
    config.data.crop = "random"
    with pytest.raises(ConfigError, match="'center' or 'none'"):
        encode(config, tmp_path / "cache")
    config.data.crop = "center"
    with pytest.raises(ConfigError, match="multiple of 8, not 12"):
        encode(config, tmp_path / "cache", shard_size=12)
    with pytest.raises(ConfigError, match="a first stage trains on pictures"):
        train(
            with_cache(make_config("autoencoder", pictures, first_stage), tmp_path),
            tmp_path / "run",
        )
    assert not (tmp_path / "cache").exists()


def test_bfloat16_keeps_its_bits(config, tmp_path):
    cache = encode(config, tmp_path / "cache", dtype="bfloat16", shard_size=8)
    moments = LatentSource(cache, "train")[0]["moments"]
    assert moments.dtype == jax.numpy.bfloat16
    exact = encode(config, tmp_path / "exact", shard_size=8)
    np.testing.assert_allclose(
        moments.astype(np.float32),
        LatentSource(exact, "train")[0]["moments"].astype(np.float32),
        rtol=2**-7,
        atol=1e-5,
    )
    assert (
        json.loads((cache / "cache.json").read_text())["fields"]["moments"]["dtype"] == "bfloat16"
    )


def test_captions_drawn_from_the_cache_are_those_of_the_pictures(config, cache):
    """The stream is the same from any step of a resumed run."""
    config.data.update(
        caption_templates=("{text}, one", "{text}, two[, {file_name}]"),
        caption_weights=(1.0, 3.0),
        part_dropout=0.5,
    )
    from_pictures = make_loader(config, "train")
    from_cache = make_loader(with_cache(config, cache), "train")
    seen = []
    for step in (0, 1, 7):
        a, b = next(from_pictures.iterate(step)), next(from_cache.iterate(step))
        assert a["caption"] == b["caption"]
        assert "encoded" not in b
        seen += a["caption"]
    assert {caption.split(", ", 1)[1][:3] for caption in seen} == {"one", "two"}
    assert {caption.count(",") for caption in seen} == {1, 2}
    task = DiffusionTask.from_config(with_cache(config, cache))
    check_cache(task.config, task)
    expected = task.model.conditioner.encode(b["caption"])
    np.testing.assert_array_equal(task.host_batch(b)["encoded"], expected)
    held_out = next(make_loader(with_cache(config, cache), "validation").batches(1))
    assert {caption.split(", ", 1)[1] for caption in held_out["caption"]} == {"one"}


def test_a_cache_of_before_is_read_and_completed(config, cache):
    """A cache of format 1, without text columns."""
    made = encoding.CacheInfo
    info = json.loads((cache / "cache.json").read_text())
    old = {k: v for k, v in info.items() if k != "columns"} | {"format": 1}
    folder = cache.with_name("old")
    folder.mkdir()
    (folder / "cache.json").write_text(json.dumps(old))
    encode(config, folder, shard_size=8)
    assert LatentSource(folder, "train").info == made(**old)
    ours, theirs = (make_loader(with_cache(config, path), "train") for path in (folder, cache))
    a, b = next(ours.iterate(3)), next(theirs.iterate(3))
    assert a.keys() == b.keys()
    np.testing.assert_array_equal(a["moments"], b["moments"])
    assert a["caption"] == b["caption"]
    config.data.caption_templates = ("{text}", "{text}, two")
    with pytest.raises(DataError, match="no columns to draw captions from"):
        make_loader(with_cache(config, folder), "train")


@pytest.mark.parametrize("command", [train, encode])
def test_captions_that_are_all_empty_stop_a_training_of_text(config, tmp_path, command):
    config.data.update(caption="", split_column="file_name")
    message = r"every caption is empty: set data.text .* over the columns .*text.*kind='none'"
    with pytest.raises(DataError, match=message):
        command(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
