"""Diffusion training for every conditioning: network inputs, trained parts, saved config."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import KL, SMALL, random_params
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.conditioning import CONDITIONERS
from ldm_jax.conditioning.config import frozen_conditioner
from ldm_jax.conditioning.hybrid import Hybrid
from ldm_jax.configs.common import base
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import ConfigError, DataError
from ldm_jax.io.checkpoint import load_model, save_model
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build_first_stage
from ldm_jax.train import loop
from ldm_jax.train.check import check
from ldm_jax.train.encode import check_cache, encode
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.loop import train
from ldm_jax.train.tasks import diffusion as tasks
from ldm_jax.train.tasks.diffusion import DiffusionTask

pytestmark = pytest.mark.compile

NAMES = ("circle", "square", "star")
BERT = {**SMALL["conditioner"], "vocab_size": 1100}
# kind -> conditioner, data.condition, channels joined to the latents, length of the context
KINDS = {
    "none": ({"kind": "none"}, {}, 0, None),
    "text": (BERT, {}, 0, 12),
    "class": ({"kind": "class", "embed_dim": 16}, {"column": "shape"}, 0, 1),
    "class_vector": ({"kind": "class_vector"}, {"column": "shape"}, 0, None),
    "masked": ({"kind": "joined", "of": "masked", "channels": 5, "size": (8, 8)}, {}, 5, None),
    "filled": (
        {"kind": "joined", "of": "masked_filled", "channels": 5, "size": (8, 8)},
        {},
        5,
        None,
    ),
    "hybrid": (
        {
            "kind": "hybrid",
            "text": BERT,
            "joined": {"of": "masked_sd", "channels": 5, "size": (8, 8)},
        },
        {},
        5,
        12,
    ),
    "picture": (
        {"kind": "joined", "channels": 3, "size": (8, 8)},
        {"kinds": ("bicubic", "bsr_light")},
        3,
        None,
    ),
    "map": (
        {"kind": "rescale", "in_channels": 5, "out_channels": 2, "size": (16, 16)},
        {"column": "map"},
        2,
        None,
    ),
    "layout": (
        {**BERT, "kind": "tokens", "max_seq_len": 8, "vocab_size": 64},
        {"column": "boxes"},
        0,
        8,
    ),
    "vectors": ({"kind": "embeddings", "dim": 16, "count": 2}, {"column": "vectors"}, 0, 2),
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve images, each with a caption, class, label map, boxes and two or three vectors."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (folder / "maps").mkdir()
    rows = []
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(
            folder / f"{i:02d}.png"
        )
        Image.fromarray(rng.integers(0, 5, (16, 16)).astype(np.uint8)).save(
            folder / "maps" / f"{i:02d}.png"
        )
        boxes = [{"label": NAMES[i % 3], "box": [0.25, 0.5, 0.25, 0.25]}]
        columns = {
            "shape": NAMES[i % 3],
            "map": f"maps/{i:02d}.png",
            "boxes": boxes,
            "number": i % 3,
        }
        columns["vectors"] = np.full((2 + i % 2, 16), float(i)).tolist()
        rows.append({"file_name": f"{i:02d}.png", "text": f"{i % 10}", **columns})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """The model directory of a first stage that halves pictures."""
    path = tmp_path_factory.mktemp("first_stage") / "model"
    shapes = jax.eval_shape(
        lambda: init_autoencoder(build_first_stage({"first_stage": KL}), jax.random.key(0))
    )
    save_model(
        path, {"kind": "first_stage", "first_stage": KL}, {"first_stage": random_params(shapes, 1)}
    )
    return path


@pytest.fixture
def make(data, first_stage):
    """``make("class")`` -> the config of a short run of that kind."""

    def config_of(kind: str) -> ConfigDict:
        conditioner, condition, joined, context = KINDS[kind]
        config = base("diffusion")
        config.update(
            steps=2,
            batch_size=8,
            ema=0.9,
            save_every=1,
            eval_every=1000,
            eval_batches=1,
            preview_every=2,
        )
        config.scale_factor_batches = 1
        config.data.update(path=str(data), size=(16, 16), condition=ConfigDict(condition))
        if kind == "map":
            config.data.files = ("map",)
        config.loss.caption_dropout = 0.3
        config.model.update(
            objective="v",
            schedule=ConfigDict(SMALL["schedule"]),
            conditioner=ConfigDict(conditioner),
        )
        config.model.unet = ConfigDict(SMALL["unet"])
        config.model.unet.in_channels = 4 + joined
        if context is None:
            config.model.unet.update(use_spatial_transformer=False, context_dim=None)
        config.model.first_stage = ConfigDict({"path": str(first_stage)})
        config.model.sampling = ConfigDict({"size": (16, 16), "steps": 2, "guidance": 1.0})
        return config

    return config_of


def test_every_kind_of_conditioner_is_here():
    # Text encoders, as bert is; the others have rows of their own in tests/convert.
    elsewhere = {"clip", "clip_vector", "sdxl", "depth", "upscale"}
    # Of transformers over codes, in test_transformer.py.
    elsewhere |= {"start", "label", "coordinates", "coded_map", "boxes"}
    assert {c["kind"] for c, *_ in KINDS.values()} == {*CONDITIONERS} - elsewhere


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_kind(make, kind, monkeypatch):
    """As shapes, without compiling: the inputs fit and every trained parameter has a gradient."""
    config = make(kind)
    task = DiffusionTask.from_config(config)
    batch = task.host_batch(next(make_loader(config, "train").iterate()))
    params = jax.eval_shape(task.init, jax.random.key(0))
    seen = []
    call = type(task.model.conditioner).__call__

    def spy(self, *args, **options):
        seen.append(call(self, *args, **options))
        return seen[-1]

    monkeypatch.setattr(type(task.model.conditioner), "__call__", spy)
    grads = jax.eval_shape(
        jax.grad(lambda p: task.loss(p, task.frozen, batch, jnp.int32(0), True)[0]), params
    )
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    _, _, joined, context = KINDS[kind]
    assert seen[0].concat is None if not joined else seen[0].concat.shape == (8, 8, 8, joined)
    assert (
        seen[0].crossattn is None
        if context is None
        else seen[0].crossattn.shape == (8, context, 16)
    )


def test_a_run_of_classes_ends_in_a_model_that_knows_their_names(make, tmp_path, no_preview):
    saved, params = load_model(train(make("class"), tmp_path / "run"))
    assert saved["classes"] == sorted(NAMES)
    # The last class is the null class.
    assert saved["conditioner"] == {"kind": "class", "embed_dim": 16, "n_classes": 4}
    assert params["conditioner"]["embedding"]["embedding"].shape == (4, 16)


def test_a_model_learns_another_condition(make, tmp_path, no_preview):
    """Matching weights load, new input channels start at zero, the rest is initialised."""
    text = make("text")
    text.update(steps=1)
    _, before = load_model(train(text, tmp_path / "text"))
    config = make("masked")
    config.model.unet = text.model.unet.copy_and_resolve_references()
    config.model.unet.update(in_channels=4 + KINDS["masked"][2], context_dim=None)
    config.update(init=str(tmp_path / "text/model"), steps=1)
    config.optim.lr = 0.0
    with pytest.raises(
        ConfigError, match=r"init: .*/model has .* more that do not fit: .* with init_strict=False"
    ):
        train(config, tmp_path / "masked")
    config.init_strict = False
    _, after = load_model(train(config, tmp_path / "masked"))
    first, was = (params["unet"].pop("input_blocks_0_0") for params in (after, before))
    np.testing.assert_array_equal(first["kernel"][:, :, :4], was["kernel"])
    assert not first["kernel"][:, :, 4:].any()
    paths = dict(jax.tree.leaves_with_path(before["unet"]))
    fresh = [
        path
        for path, leaf in jax.tree.leaves_with_path(after["unet"])
        if not np.array_equal(leaf, paths[path])
    ]
    assert {jax.tree_util.keystr(path[-2:], simple=True, separator="/") for path in fresh} == {
        "to_k/kernel",
        "to_v/kernel",
    }
    assert all("attn2" in jax.tree_util.keystr(path) for path in fresh)

    config.init = str(config.model.first_stage.path)
    with pytest.raises(ConfigError, match=r"nothing of it fits config\.model"):
        train(config, tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["masked", "hybrid"])
def test_an_inpainting_run_resumes_and_previews_its_samples(make, kind, tmp_path):
    """The first conditioner has no parameters, so that none are saved."""
    config = make(kind)
    config.steps = 1
    train(config, tmp_path / "run")
    config.steps = 2
    saved, _ = load_model(train(config, tmp_path / "run"))
    assert saved["conditioner"]["kind"] == KINDS[kind][0]["kind"]
    assert saved["trained_steps"] == 2
    preview = np.asarray(Image.open(tmp_path / "run/previews/0000002.png"))
    # Rows: masked, sampled, true, reconstructed (eight images each), and one trajectory.
    assert preview.shape == (5 * 18 + 2, 8 * 18 + 2, 3)
    masked, made, true = preview[2:18], preview[20:36], preview[38:54]
    shown = (masked != 127).any(-1)
    assert not shown.all()
    np.testing.assert_array_equal(masked[shown], true[shown])
    np.testing.assert_array_equal(made[shown], true[shown])
    assert (made[~shown] != true[~shown]).mean() > 0.9


def test_text_of_a_hybrid_is_dropped_without_the_masked_picture(make, monkeypatch):
    config = make("hybrid")
    config.loss.caption_dropout = 1.0
    task, received = DiffusionTask.from_config(config), []
    batch, params = (
        task.host_batch(next(make_loader(config, "train").iterate())),
        task.init(jax.random.key(0)),
    )
    call = Hybrid.__call__

    def spy(self, params, encoded, **options):
        received.append(encoded)
        return call(self, params, encoded, **options)

    monkeypatch.setattr(Hybrid, "__call__", spy)
    for training in (True, False):
        task.loss(params, task.frozen, batch, jnp.int32(0), training)
    np.testing.assert_array_equal(
        received[0]["text"], np.broadcast_to(task.frozen["null"], received[0]["text"].shape)
    )
    np.testing.assert_array_equal(received[1]["text"], batch["encoded"])
    for encoded in received:
        np.testing.assert_array_equal(encoded["joined"][..., 0], batch["mask"][:, ::2, ::2, 0])


def test_a_preview_of_captions_and_codes(make, tmp_path, monkeypatch):
    """The content of a preview, traced without compiling."""
    stage = {**KL, "kind": "vq", "n_embed": 12}
    shapes = jax.eval_shape(
        lambda: init_autoencoder(build_first_stage({"first_stage": stage}), jax.random.key(0))
    )
    save_model(
        tmp_path,
        {"kind": "first_stage", "first_stage": stage},
        {"first_stage": random_params(shapes, 1)},
    )
    config = make("text")
    config.model.first_stage.path = str(tmp_path)
    config.preview_captions = ("1", "2", "3")
    task, forms, compiled, shades = (
        DiffusionTask.from_config(config),
        [],
        tasks.sample_preview,
        iter(range(50, 250, 50)),
    )

    def traced(*args):
        *arrays, form = args
        forms.append(form)
        shade = next(shades)
        shapes = jax.eval_shape(lambda *arrays: compiled(*arrays, form), *arrays)
        return jax.tree.map(lambda s: np.full(s.shape, shade, s.dtype), shapes)

    monkeypatch.setattr(tasks, "sample_preview", traced)
    monkeypatch.setattr(tasks, "reconstruct", lambda stage, batch: 255 - batch["image"])
    raw = next(make_loader(config, "validation").batches(1))
    sheet = task.preview(jax.eval_shape(task.init, jax.random.key(0)), task.frozen, raw)
    assert sheet.shape == (5 * 18 + 2, 8 * 18 + 2, 3)
    made, true, kept, quantized, way = (sheet[2 + 18 * i : 18 + 18 * i] for i in range(5))
    assert (made[:, 2:18] == 50).all()
    assert (made[:, 3 * 18 + 2 :] == 255).all()  # three captions
    np.testing.assert_array_equal(true[:, 2:18], raw["image"][0])
    np.testing.assert_array_equal(kept[:, 2:18], 255 - raw["image"][0])
    assert (quantized[:, 2:18] == 100).all()
    assert (way[:, -18:-2] == 50).all()  # eight of its ten steps
    assert [(form.quantize, form.progress) for form in forms] == [
        (False, (0, 1, 3, 4, 5, 6, 8, 9)),
        (True, ()),
    ]


def test_a_frozen_text_encoder_of_a_hybrid_comes_from_another_model(make, tmp_path):
    made = {
        "unet": {},
        "conditioner": jax.jit(DiffusionTask.from_config(make("text")).init)(jax.random.key(7))[
            "conditioner"
        ],
    }
    save_model(tmp_path / "text", {"kind": "latent_diffusion", "conditioner": dict(BERT)}, made)
    config = make("hybrid")
    config.model.conditioner.text = ConfigDict(
        {"kind": "bert", "path": str(tmp_path / "text"), "frozen": True}
    )
    assert check(config, tmp_path / "sheet.png") == []
    task = DiffusionTask.from_config(config)
    assert set(jax.eval_shape(task.init, jax.random.key(0))) == {"unet"}
    assert task.model_config["conditioner"]["text"] == BERT
    jax.tree.map(np.testing.assert_array_equal, task.frozen["conditioner"], made["conditioner"])
    config.model.conditioner.text = ConfigDict({**BERT, "path": "not made yet", "frozen": True})
    planned = DiffusionTask.from_config(config, weights=False)
    shapes = jax.tree.map(lambda leaf: leaf.shape, planned.frozen["conditioner"])
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, made["conditioner"])


def test_a_frozen_conditioner_is_read_and_kept_but_not_trained(make, tmp_path, no_preview):
    config = make("text")
    made = {
        "unet": {},
        "conditioner": jax.jit(DiffusionTask.from_config(config).init)(jax.random.key(7))[
            "conditioner"
        ],
    }
    save_model(tmp_path / "text", {"kind": "latent_diffusion", "conditioner": dict(BERT)}, made)
    config.model.conditioner = ConfigDict(
        {"kind": "bert", "path": str(tmp_path / "text"), "frozen": True}
    )
    task = DiffusionTask.from_config(config)
    assert set(jax.eval_shape(task.init, jax.random.key(0))) == {"unet"}
    assert task.model_config["conditioner"] == BERT  # whole, and without a word of training
    saved, params = load_model(train(config, tmp_path / "run"))
    for a, b in zip(
        jax.tree.leaves(params["conditioner"]), jax.tree.leaves(made["conditioner"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert saved["conditioner"]["kind"] == "bert"


def test_an_invalid_frozen_conditioner_is_an_error(tmp_path):
    save_model(
        tmp_path / "kl",
        {"kind": "first_stage", "conditioner": {"kind": "bert", "dim": 8}},
        {"x": np.ones(1)},
    )
    for wrong, message in [
        ({"frozen": True}, "give the model directory"),
        ({"path": "x"}, r"set model.conditioner.frozen too"),
        ({"path": str(tmp_path / "kl"), "frozen": True}, "no conditioner with parameters"),
    ]:
        with pytest.raises(ConfigError, match=message):
            frozen_conditioner({"kind": "bert", **wrong})
    save_model(
        tmp_path / "b",
        {"conditioner": {"kind": "bert", "dim": 8}},
        {"conditioner": {"x": np.ones(1)}},
    )
    with pytest.raises(ConfigError, match=r"conditioner.dim is not that of .*b, 8: leave it out"):
        frozen_conditioner({"kind": "bert", "dim": 9, "path": str(tmp_path / "b"), "frozen": True})
    assert frozen_conditioner({"kind": "bert", "dim": 8})[1] is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "masked",
            {"model.unet.in_channels": 4},
            "in_channels is 4: the latents have 4 channels and their condition 5, 9",
        ),
        (
            "masked",
            {"model.conditioner.size": (16, 16)},
            r"size is \(16, 16\): latents of pictures of \(16, 16\) are \(8, 8\)",
        ),
        ("map", {"model.conditioner.size": (32, 32)}, "maps are cut as the pictures are"),
        ("map", {"model.conditioner.in_channels": 3}, "which is for pictures"),
        ("map", {"model.conditioner.n_stages": 2}, r"brings maps to \(4, 4\)"),
        ("text", {"data.condition.column": "shape"}, "kind 'bert' takes none"),
        ("masked", {"data.condition.column": "shape"}, "field 'column' does not exist"),
        ("layout", {"data.condition.column": "shape"}, "is no box"),
        (
            "hybrid",
            {"model.conditioner.joined.of": "picture"},
            "joined.of must be 'masked', 'masked_sd' or",
        ),
        (
            "hybrid",
            {"model.conditioner.joined.size": (4, 4)},
            r"model.conditioner.joined.size is \(4, 4\)",
        ),
        (
            "hybrid",
            {"model.conditioner.text.frozen": True},
            "give the model directory that its parameters come from",
        ),
        ("vectors", {"model.conditioner.count": 0}, "dim 16 and count 0 must be at least 1"),
        (
            "class",
            {"data.condition.column": "number"},
            "n_classes is missing: the classes have no names",
        ),
        (
            "class",
            {"model.conditioner.n_classes": 3},
            "there are 3 classes, and loss.caption_dropout needs one more",
        ),
        ("class", {"data.cache": "x", "data.condition.column": "colour"}, "no column 'colour'"),
        (
            "text",
            {"model.schedule.zero_terminal_snr": True, "model.objective": "eps"},
            "set model.objective='v'",
        ),
    ],
)
def test_a_mismatch_is_a_one_line_error(make, kind, changes, message):
    config = make(kind)
    with config.unlocked():
        for name, value in changes.items():
            *path, last = name.split(".")
            section = config
            for part in path:
                section = section[part]
            section[last] = value
    with pytest.raises(ValueError, match=message) as caught:
        DiffusionTask.from_config(config)
    assert "\n" not in str(caught.value)


def test_classes_of_numbers_and_given_names(make):
    config = make("class")
    config.data.condition.column = "number"
    config.model.conditioner.n_classes = 4
    assert "classes" not in DiffusionTask.from_config(config).model_config
    batch = next(make_loader(config, "train").iterate())
    np.testing.assert_array_equal(batch["condition"], batch["index"] % 3)
    config = make("class")
    config.model.classes = ("star", "circle", "square")  # in this order
    task = DiffusionTask.from_config(config)
    assert task.model_config["classes"] == ["star", "circle", "square"]
    raw = next(make_loader(config, "train").iterate())
    np.testing.assert_array_equal(task.host_batch(raw)["encoded"], (raw["index"] + 1) % 3)


def test_classes_are_cached_and_masks_cannot_be(make, tmp_path):
    config = make("class")
    pictures = next(make_loader(config, "train").iterate())
    config.data.cache = str(encode(config, tmp_path / "cache", shard_size=64))
    check_cache(config, DiffusionTask.from_config(config))
    latents = next(make_loader(config, "train").iterate())
    np.testing.assert_array_equal(latents["condition"], pictures["condition"])
    batch = DiffusionTask.from_config(config).host_batch(latents)
    np.testing.assert_array_equal(batch["encoded"], pictures["condition"])
    config.model.classes = ("star", "circle", "square")
    with pytest.raises(
        DataError, match=r"made with model.classes=\['circle', 'square', 'star'\], not \['star'"
    ):
        check_cache(config, DiffusionTask.from_config(config))
    config = make("masked")
    config.data.cache = "somewhere"
    with pytest.raises(ConfigError, match="holds captions, classes and vectors only"):
        DiffusionTask.from_config(config).cache()


def test_vectors_are_cached_and_dropped_for_zeros(make, tmp_path):
    config = make("vectors")
    pictures = next(make_loader(config, "train").iterate())
    assert pictures["condition"].shape == (8, 2, 16)
    np.testing.assert_array_equal(pictures["condition"][:, 0, 0], pictures["index"])
    assert not DiffusionTask.from_config(config).frozen["null"].any()
    config.data.cache = str(encode(config, tmp_path / "cache", shard_size=64))
    check_cache(config, DiffusionTask.from_config(config))
    latents = next(make_loader(config, "train").iterate())
    np.testing.assert_array_equal(latents["condition"], pictures["condition"])
    np.testing.assert_array_equal(
        DiffusionTask.from_config(config).host_batch(latents)["encoded"], pictures["condition"]
    )
    config.model.conditioner.count = 1
    with pytest.raises(DataError, match=r"made with vectors=\[2, 16\], not \[1, 16\]"):
        check_cache(config, DiffusionTask.from_config(config))


def test_a_check_of_the_data_names_pictures_with_too_few_vectors(make, tmp_path):
    config = make("vectors")
    config.model.conditioner.count = 3
    (problem,) = check(config, tmp_path / "sheet.png")
    assert "6 of 12 pictures stop a training" in problem
    assert "has 2 vectors, model.conditioner.count is 3" in problem


def test_offset_noise_moves_whole_channels(make, monkeypatch):
    """Recorded at the network's input."""
    task = DiffusionTask.from_config(make("none"))
    seen = []
    monkeypatch.setattr(
        tasks, "q_sample", lambda s, z, t, noise: (seen.append(np.asarray(noise)), z)[1]
    )
    monkeypatch.setattr(type(task.model), "apply", lambda self, p, x, *_, **__: x)
    n = 600
    batch = {
        "moments": np.zeros((n, 8, 8, 8), np.float32),
        "row": np.arange(n, dtype=np.int32),
        "encoded": None,
    }
    for offset in (0.0, 0.5):
        task.config.loss.offset_noise = offset
        task.loss({"unet": {}, "conditioner": {}}, task.frozen, batch, jnp.int32(0), True)
        # The mean over a channel of 64 pixels has the variance 1 / 64 plus the added one.
        means = seen[-1].mean((1, 2))
        np.testing.assert_allclose(means.var(), 1 / 64 + offset**2, rtol=0.15)
        np.testing.assert_allclose((seen[-1] - means[:, None, None]).var(), 63 / 64, rtol=0.02)
        assert abs(np.corrcoef(means[:, 0], means[:, 1])[0, 1]) < 0.2  # each channel its own
