"""The transformer over codes: its task, the directory that it exports, and how that samples."""

import json

import jax
import numpy as np
import pytest
from conftest import run_here
from ml_collections import ConfigDict
from PIL import Image
from test_loop import metrics, pictures  # noqa: F401

import ldm_jax
from ldm_jax.configs.common import base
from ldm_jax.convert.conversion import convert, export, read_model
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import CheckpointError, ConfigError, RequestError, TargetError
from ldm_jax.io.checkpoint import load_model
from ldm_jax.models.gpt import (
    GPT,
    Choice,
    Known,
    draw_tokens,
    generate,
    keep_top_p,
    sliding_cells,
)
from ldm_jax.sampling.request import Request
from ldm_jax.train import loop
from ldm_jax.train.loop import train
from ldm_jax.train.tasks.base import plain
from ldm_jax.train.tasks.transformer import TransformerTask

STAGE = {
    "kind": "vq",
    "untrained": True,
    "n_embed": 16,
    "embed_dim": 3,
    "z_channels": 3,
    "ch": 32,
    "ch_mult": (1, 1),
    "num_res_blocks": 1,
    "attn_resolutions": (),
    "attn_type": "none",
    "resolution": 8,
    "in_channels": 3,
    "out_ch": 3,
}
GPT_FIELDS = {"vocab_size": 20, "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}


def tiny(path="pkg:assets/emoji_subset.zip", **conditioner):
    config = base("transformer")
    config.update(steps=2, batch_size=4, save_every=2, eval_every=2, eval_batches=1, ema=0.0)
    config.data.update(path=str(path), size=(8, 8))
    config.optim.update(weight_decay=0.01, b2=0.95)
    config.model.transformer = ConfigDict(GPT_FIELDS)
    config.model.first_stage = ConfigDict(STAGE)
    config.model.conditioner = ConfigDict(conditioner)
    return config


# ---------------------------------------------------------------------------------- choosing tokens


@pytest.mark.fast
def test_windows_keep_the_code_in_their_middle_except_near_edges():
    cells = sliding_cells((6, 9), (4, 4))
    assert len(cells.place) == 54
    assert cells.place[0].tolist() == [0, 0]
    assert (cells.inside >= 0).all()
    assert (cells.inside < 4).all()
    assert (cells.corner >= 0).all()
    assert (cells.corner + 4 <= (6, 9)).all()
    middle = cells.place.tolist().index([2, 5])
    assert cells.inside[middle].tolist() == [2, 2]
    # After 13 given codes: the rest of the second row, then whole rows; the original restarts each.
    assert len(sliding_cells((6, 9), (4, 4), 13).place) == 54 - 13
    assert len(sliding_cells((6, 9), (4, 4), 13, restart=True).place) == 5 * (9 - 4)


@pytest.mark.fast
def test_tokens_are_drawn_by_their_probability_and_never_without_one():
    logits = np.array([*np.log([0.5, 0.25, 0.25]), -np.inf])
    u = np.array([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-24], np.float32)
    drawn = draw_tokens(np.broadcast_to(logits, (6, 4)).astype(np.float32), u)
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2]
    kept = np.isfinite(keep_top_p(np.log(np.array([[0.1, 0.6, 0.25, 0.05]], np.float32)), 0.7))
    assert kept.tolist() == [[False, True, True, False]]


@pytest.mark.compile
@pytest.mark.parametrize("n_unmasked", [0, 5])
def test_the_cache_gives_what_the_plain_form_gives(n_unmasked):
    gpt = GPT(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=16, n_unmasked=n_unmasked)
    params = gpt.init(jax.random.key(0), np.zeros((1, 1), int))["params"]
    params["pos_emb"] = jax.random.normal(jax.random.key(1), (12, 16))
    tokens, u = np.array([[1, 2], [3, 4]]), jax.random.uniform(jax.random.key(2), (2, 8))
    choice, known = Choice(0.8, 5, 0.9), Known(np.full((2, 8), 7), np.arange(8)[None] == 3)
    known = Known(*map(jax.numpy.asarray, (known.tokens, np.repeat(known.keep, 2, 0))))
    made = generate(
        gpt, params, jax.numpy.asarray(tokens), 8, uniforms=u, choice=choice, known=known
    )
    plain_tokens = jax.numpy.asarray(tokens)
    for i in range(8):
        logits = gpt.apply({"params": params}, plain_tokens)[:, -1]
        token = jax.numpy.full(2, 7) if i == 3 else choice(logits, u[:, i])
        plain_tokens = jax.numpy.concatenate([plain_tokens, token[:, None]], axis=1)
    assert np.array_equal(made.tokens, plain_tokens)
    assert made.finite.all()


# ------------------------------------------------------------------------------------- the task


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioner": {"kind": "none"}}, "'none' gives no tokens for a transformer"),
        ({"transformer.block_size": 15}, "block_size 15 is too small: 1 tokens of the"),
        ({"transformer.vocab_size": 10}, "vocab_size 10 is less than the 16 codes"),
        ({"permuter": "Zcurve"}, "permuter 'Zcurve' does not exist; did you mean 'ZCurve'"),
        ({"conditioner": {"kind": "label", "n_classes": 21}}, "less than 21, the number of tokens"),
        ({"first_stage.untrained": False}, "model.first_stage.path is missing"),
        ({"first_stage.kind": "identity"}, "first_stage"),
        ({"pkeep": 0.0}, "needs as many tokens as the picture"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    config = tiny(kind="start")
    for name, value in change.items():
        if name == "pkeep":
            config.loss.pkeep = value
        elif name == "conditioner":
            config.model.conditioner = ConfigDict(value)
            config.data.condition = ConfigDict({"column": "x"} if value["kind"] == "label" else {})
            config.model.classes = ("a",) if value["kind"] == "label" else ()
        else:
            section, _, field = name.rpartition(".")
            (config.model[section] if section else config.model)[field] = value
    with pytest.raises(ConfigError, match=message):
        TransformerTask.from_config(config)


@pytest.mark.compile
def test_classes_train_preview_sample_replay_and_convert(one_device, tmp_path, capfd, monkeypatch):
    config = tiny(kind="label")
    config.loss.pkeep = 0.5
    config.data.condition = ConfigDict({"column": "group"})
    config.data.flip = True
    model = train(config, tmp_path / "run")
    assert [m["part"] for m in metrics(tmp_path / "run")] == ["train", "validation"]
    assert (tmp_path / "run/previews/0000002.png").exists()
    saved, params = load_model(model)
    assert saved["kind"] == "transformer"
    assert saved["conditioner"]["n_classes"] == len(saved["classes"])
    assert set(params) == {"transformer", "first_stage"}

    pipe = ldm_jax.load(model, devices=1)
    made = pipe(classes=[0, 1], seeds=[5, 6], top_k=8)
    alone = pipe(classes=1, seeds=6, top_k=8, batch=2)
    np.testing.assert_array_equal(made[1], alone[0])
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:2] = 255
    painted = pipe(classes=0, image=image, mask=mask)
    np.testing.assert_array_equal(painted[0, 2:], image[2:])
    assert pipe(classes=0, size=(8, 16)).shape == (1, 8, 16, 3)
    for request, message in (
        ({"guidance": 2.0}, "guidance is no setting of this kind of model"),
        ({"sampler": "ddim"}, "sampler is no setting of this kind"),
        ({"size": (6, 8)}, "pictures of 8x8 or larger"),
        ({"strength": 0.5}, "strength needs an image"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ):
        with pytest.raises(RequestError, match=message):
            pipe(classes=0, **request)

    flags = [f"--model={model}", "--class=1", "--num=2", "--top_k=8", "--top_p=0.9"]
    ran = run_here(
        "sample.py", *flags, f"--out={tmp_path / 'out'}", capfd=capfd, monkeypatch=monkeypatch
    )
    assert ran.status == 0, ran.stderr
    first = next((tmp_path / "out").glob("00001-*.png"))
    ran = run_here(
        "sample.py",
        f"--replay={first}",
        f"--out={tmp_path / 'again'}",
        capfd=capfd,
        monkeypatch=monkeypatch,
    )
    assert ran.status == 0, ran.stderr
    again = next((tmp_path / "again").glob("*.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))

    export(model, "compvis", tmp_path / "net.safetensors")
    back = read_model(tmp_path / "net.safetensors", config=tmp_path / "net.yaml")
    assert back.config["transformer"] == saved["transformer"]
    leaves = jax.tree.leaves_with_path(back.params)
    assert leaves
    for path, leaf in leaves:
        there = params
        for key in path:
            there = there[key.key]
        np.testing.assert_array_equal(leaf, there)
    with pytest.raises(TargetError, match="which its names do not say"):
        read_model(tmp_path / "net.safetensors")


@pytest.mark.compile
def test_half_of_a_picture_is_kept_in_the_order_of_the_codes(one_device, tmp_path):
    config = tiny(kind="start", token=18)
    config.model.permuter = "ZCurve"
    config.steps = 1
    pipe = ldm_jax.load(train(config, tmp_path / "run"), devices=1)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    model = pipe.model
    kept = model.codes_of(image[None] / np.float32(127.5) - 1)
    made = pipe(image=image, strength=0.25, seeds=[1, 2])
    assert made.shape == (2, 8, 8, 3)
    from ldm_jax.sampling.codes import CodesConfig, CodeSteps, generate_codes
    from ldm_jax.sampling.inputs import Inputs

    inputs = Inputs(np.array([1], np.uint32), model.conditioner.encode_null(1), image=image[None])
    codes = generate_codes(model, CodeSteps(1.0, first=12), inputs, CodesConfig((8, 8), (4, 4)))
    sequence = model.sequence(codes[0].tokens)
    np.testing.assert_array_equal(sequence[:, :12], model.sequence(kept)[:, :12])
    with pytest.raises(RequestError, match="order ZCurve, which has no larger windows"):
        pipe(size=(8, 16))


@pytest.mark.compile
def test_maps_of_labels_and_coordinates_are_tokens_of_their_place(one_device, tmp_path):
    coded = {k: v for k, v in STAGE.items() if k != "kind"} | {"in_channels": 4, "out_ch": 4}
    config = tiny(kind="coded_map", of="labels", size=(8, 8), **coded)
    config.steps = 1
    config.data.update(source="scenes", count=8, objects=1, column="group", background=255)
    config.data.condition = ConfigDict({"column": "map"})
    config.data.classes = ("food-drink", "objects")
    model = train(config, tmp_path / "run")
    labels = np.zeros((8, 8), np.uint8)
    labels[4:] = 2
    pipe = ldm_jax.load(model, devices=1)
    assert pipe(semantic_map=labels, seeds=[0, 1]).shape == (2, 8, 8, 3)
    assert pipe(semantic_map=labels, size=(12, 16)).shape == (1, 12, 16, 3)
    with pytest.raises(RequestError, match="semantic_map has the label 4"):
        pipe(semantic_map=labels * 2)

    out = tmp_path / "net.safetensors"
    export(model, "compvis", out)
    converted = convert(out, tmp_path / "back")
    assert converted.config["conditioner"]["kind"] == "coded_map"
    assert any("n_head" in line for line in converted.assumed)
    assert json.loads((tmp_path / "back/config.json").read_text())["kind"] == "transformer"


@pytest.mark.compile
def test_boxes_are_tokens_in_front_of_a_scene(one_device, tmp_path):
    config = tiny(kind="boxes", vocab_size=64, max_length=8)
    config.steps = 1
    config.model.transformer.update(vocab_size=64, block_size=32)
    config.data.update(source="scenes", count=8, objects=1, column="group", background=255)
    config.data.condition = ConfigDict({"column": "boxes"})
    config.data.classes = ("food-drink", "objects")
    pipe = ldm_jax.load(train(config, tmp_path / "run"), devices=1)
    left, right = ([("objects", (x, 0.25, 0.5, 0.5))] for x in (0.0, 0.5))
    tokens = [pipe.job(Request(layout=boxes)).inputs.encoded for boxes in (left, right)]
    assert tokens[0].shape == (1, 8)
    assert (tokens[0] != tokens[1]).any()
    assert pipe(layout=left, seeds=[0, 1]).shape == (2, 8, 8, 3)
    with pytest.raises(RequestError, match="'tree'"):
        pipe(layout=[("tree", (0, 0, 1, 1))])


@pytest.mark.compile
def test_the_cache_of_codes_trains_as_the_pictures_do(one_device, tmp_path):
    from ldm_jax.train.encode import encode

    config = tiny(kind="label")
    config.data.condition = ConfigDict({"column": "group"})
    config.steps = 1
    with_pictures = TransformerTask.from_config(config)
    config.data.cache = str(encode(config, tmp_path / "cache"))
    from ldm_jax.train.loaders import first_batches, make_loader

    batch = with_pictures.host_batch(first_batches(make_loader(config, "train"), 1)[0])
    config.data.cache = ""
    plain_batch = with_pictures.host_batch(first_batches(make_loader(config, "train"), 1)[0])
    assert batch["moments"].shape == (4, 4, 4, 1)
    params, frozen = with_pictures.init(jax.random.key(0)), with_pictures.frozen
    both = [
        jax.jit(with_pictures.evaluate)(params, frozen, b)["loss"] for b in (batch, plain_batch)
    ]
    np.testing.assert_allclose(*both, rtol=1e-6)


@pytest.mark.fast
def test_a_first_stage_alone_still_makes_no_pictures(tmp_path):
    from ldm_jax.io.checkpoint import save_model

    save_model(tmp_path / "stage", {"kind": "first_stage", "first_stage": {}}, {"a": np.zeros(1)})
    with pytest.raises(RequestError, match="makes no pictures by itself"):
        ldm_jax.load(tmp_path / "stage")
    broken = {"kind": "transformer", "transformer": dict(plain(ConfigDict(GPT_FIELDS)))}
    save_model(tmp_path / "broken", broken, {"a": np.zeros(1)})
    with pytest.raises(CheckpointError, match="first_stage"):
        ldm_jax.load(tmp_path / "broken")
