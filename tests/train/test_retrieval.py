"""Databases of embeddings, training on neighbours found on the way, and sampling with them."""

import jax
import numpy as np
import pytest
from conftest import SMALL, random_params
from PIL import Image
from test_loop import first_stage, make_config, pictures  # noqa: F401

from ldm_jax.conditioning.neighbors import open_database
from ldm_jax.conditioning.tokenizers import clip_tokenizer
from ldm_jax.convert.clip.reading import config_of
from ldm_jax.data.embeddings import read_embeddings
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import CheckpointError, ConfigError, DataError, RequestError
from ldm_jax.io.checkpoint import load_model, save_model
from ldm_jax.io.png import read_settings
from ldm_jax.models.clip import CLIP, CLIPText, CLIPVision, normalized
from ldm_jax.sampling import inputs as request_inputs
from ldm_jax.sampling.pipeline import load
from ldm_jax.train import embed as embedding
from ldm_jax.train import loop
from ldm_jax.train.embed import embed
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.loop import train

pytestmark = pytest.mark.compile
DIM = 16


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    for module in (loop, embedding):
        monkeypatch.setattr(module, "make_mesh", lambda *_, **axes: make_mesh(1))
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(embedding, "BATCH", 8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model directory with towers of one layer and random weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "projection_dim": DIM}
    model = CLIP(CLIPText(**sizes), CLIPVision(**sizes, image_size=16, patch_size=8))
    path = tmp_path_factory.mktemp("clip") / "model"
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    save_model(path, config_of(model), random_params(shapes, 0))
    return path


def rdm(pictures, first_stage, **condition):  # noqa: F811
    """The config of a short run on two neighbours of each picture."""
    config = make_config("diffusion", pictures, first_stage)
    config.update(steps=2, save_every=2, eval_every=2, preview_every=2, preview_captions=())
    config.model.conditioner = {"kind": "embeddings", "dim": DIM, "count": 2}
    config.model.unet.update(SMALL["unet"])
    config.data.update(condition=condition, flip=False)
    return config


@pytest.fixture(scope="module")
def database(pictures, first_stage, clip, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("database") / "d"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "BATCH", 8)
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        patch.setattr(embedding, "make_mesh", lambda *_: make_mesh(1))
        return embed(rdm(pictures, first_stage), load_model(clip), folder, shard_size=8)


def test_a_database_holds_the_vectors_of_the_pictures_and_resumes(
    pictures,  # noqa: F811
    first_stage,  # noqa: F811
    clip,
    database,
):
    found, (fields, params) = read_embeddings(database), load_model(clip)
    loader = make_loader(rdm(pictures, first_stage, column="x"), "train")
    assert found.names.tolist() == [loader.source.name(i) for i in range(20)]
    assert found.coords is not None
    assert found.coords.tolist() == [[0, 0, 16, 16]] * 20
    loader.condition = None
    images = np.concatenate([batch["image"] for batch in loader.batches()])[:20]
    model = embedding.clip_from_config(fields)
    expected = jax.jit(model.encode_image)(params, images.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(found.vectors, expected, atol=1e-4)

    shards = sorted(database.glob("*.npz"))
    assert [shard.name for shard in shards][-1] == "embeddings-00002-of-00003.npz"
    times = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    config = rdm(pictures, first_stage)
    embed(config, (fields, params), database, shard_size=8)
    again = [shard.stat().st_mtime_ns for shard in shards]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, False, True]
    np.testing.assert_array_equal(read_embeddings(database).vectors, found.vectors)

    other = {**params, "vision": jax.tree.map(lambda a: 2 * a, params["vision"])}
    with pytest.raises(DataError, match="was begun with another clip"):
        embed(config, (fields, other), database, shard_size=8)
    for options, message in (
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' does not exist"),
        ({"part": "validation"}, "needs data.holdout above 0"),
        ({"shard_size": 12}, "shard_size must be a multiple of 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            embed(config, (fields, params), database, **options)


@pytest.fixture(scope="module")
def trained(pictures, first_stage, clip, database, tmp_path_factory):  # noqa: F811
    config = rdm(pictures, first_stage, database=str(database), clip=str(clip))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
        patch.setattr(loop.Report, "preview", lambda *_: None)
        patch.setattr(loop.task_class(config), "preview", lambda *_: None)
        return train(config, tmp_path_factory.mktemp("run") / "rdm")


def test_training_reads_the_neighbours_of_each_picture_without_itself(
    pictures,  # noqa: F811
    first_stage,  # noqa: F811
    clip,
    database,
    trained,
):
    config = rdm(pictures, first_stage, database=str(database), clip=str(clip))
    batch = next(iter(make_loader(config, "train").batches(1)))
    found = read_embeddings(database).vectors
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    similar = unit @ unit.T - 9 * np.eye(20)
    nearest = np.argsort(-similar, axis=1)[batch["index"], :2]
    assert batch["condition"].shape == (8, 2, DIM)
    np.testing.assert_allclose(batch["condition"], unit[nearest], atol=1e-5)
    assert load_model(trained)[0]["conditioner"]["count"] == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"database": "nowhere", "clip": "x"}, DataError, "nowhere is no database of embeddings"),
        ({"database": "d"}, ConfigError, "a database needs either column or clip"),
        ({"database": "d", "clip": "x", "size": 3}, ConfigError, "field 'size' does not exist"),
    ],
)
def test_conditions_that_do_not_fit_stop_before_the_run_begins(
    pictures,  # noqa: F811
    first_stage,  # noqa: F811
    tmp_path,
    settings,
    error,
    message,
):
    with pytest.raises(error, match=message):
        train(rdm(pictures, first_stage, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sampling_adds_the_neighbours_of_a_prompt(trained, clip, database, monkeypatch):
    pipe, contexts = load(trained, clip=clip, devices=1), []
    make = request_inputs.Inputs
    monkeypatch.setattr(
        request_inputs,
        "Inputs",
        lambda seeds, encoded: contexts.append(encoded) or make(seeds, encoded),
    )
    prompts, given = ["red apple", "rocket"], {"neighbors": 3, "database": str(database)}
    images = pipe(prompts, steps=2, **given)
    assert images.shape == (2, 8, 8, 3)

    fields, params = load_model(clip)
    model = embedding.clip_from_config(fields)
    rows = clip_tokenizer()(prompts, padding="max_length", max_length=77)["input_ids"]
    text = np.asarray(normalized(model.encode_text(params, np.asarray(rows, np.int32))))
    neighbors = open_database(database).index.search(text, 3).vectors
    context = np.concatenate([text[:, None], neighbors], axis=1)
    np.testing.assert_allclose(contexts[0], context, atol=1e-5)

    # The same context as ready-made embeddings, and as a vector with its neighbours.
    np.testing.assert_array_equal(pipe(embeddings=list(np.asarray(contexts[0])), steps=2), images)
    pipe(embeddings=list(3 * text), steps=2, **given)
    np.testing.assert_allclose(contexts[-1], context, atol=1e-5)
    plain = load(trained, devices=1)
    for pipeline, request, message in (
        (plain, {"prompts": "x"}, r"not prompts: give the CLIP model .* --clip"),
        (pipe, {"prompts": "x", "embeddings": text[0]}, "prompts or embeddings, not both"),
        (pipe, {"prompts": "x", "neighbors": 2}, "neighbors and database belong together"),
        (pipe, {"prompts": "x", "neighbors": -1}, "neighbors must be at least 0"),
        (pipe, {"prompts": "x", **given, "neighbors": 99}, "99 neighbours of a database of 20"),
        (pipe, {"embeddings": text, **given}, "those of one vector: the embeddings have 2"),
        (pipe, {"prompts": "x", **given, "database": "no"}, "no is no database of embeddings"),
    ):
        with pytest.raises(RequestError, match=message):
            pipeline(**request)


def test_other_models_take_no_neighbours(pipe, tiny_dir, clip):
    with pytest.raises(RequestError, match="conditioned on prompts, which takes no neighbors"):
        pipe("x", neighbors=2)
    with pytest.raises(CheckpointError, match="kind 'bert' takes no vectors of CLIP"):
        load(tiny_dir, clip=clip)


def test_a_picture_is_made_again_with_its_neighbours(script, trained, clip, database, tmp_path):
    out = tmp_path / "out"
    argv = [f"--model={trained}", f"--clip={clip}", "--neighbors=2", f"--database={database}"]
    ran = script("sample.py", *argv, f"--out={out}", "--prompt=rocket", "--num=1", "--steps=2")
    assert ran.status == 0, ran.stderr
    (first,) = out.iterdir()
    settings = read_settings(first)
    assert settings["prompt"] == "rocket"
    assert settings["neighbors"] == 2
    assert settings["clip"] == str(clip)
    assert script("sample.py", f"--replay={first}", f"--out={tmp_path / 'b'}").status == 0
    (again,) = (tmp_path / "b").iterdir()
    assert read_settings(again) == settings
    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(first)))
    (database / "new.json").write_text("{}")
    ran = script("sample.py", f"--replay={first}", f"--out={tmp_path / 'c'}")
    (database / "new.json").unlink()
    assert "has changed since" in ran.stderr
