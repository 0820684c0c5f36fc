"""Training on aspect-ratio buckets: one program a bucket, exact resumption, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.configs.common import base
from ldm_jax.errors import ConfigError, DataError, LdmJaxError
from ldm_jax.train.encode import encode
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.loop import train
from ldm_jax.train.report import Report
from ldm_jax.train.tasks import task_class
from tests.train.test_loop import (  # noqa: F401
    assert_identical,
    final,
    first_stage,
    make_config,
    metrics,
    one_device,
)

pytestmark = pytest.mark.compile
SIZES = ((8, 8), (8, 16))


def write_pictures(folder: Path) -> Path:
    """Writes 12 squares and 8 wide pictures of noise, captioned by a digit."""
    rng, rows = np.random.default_rng(0), []
    for i in range(20):
        shape = (16, 16, 3) if i < 12 else (8, 24, 3)
        image = rng.integers(0, 80, shape) + rng.integers(0, 176, 3)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i:02d}.png")
        rows.append({"file_name": f"{i:02d}.png", "text": f"{i % 10}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Pictures of two shapes."""
    return write_pictures(tmp_path_factory.mktemp("shapes"))


def bucketed(kind: str, shapes: Path, first_stage: Path, **fields) -> ConfigDict:  # noqa: F811
    """A run over two buckets."""
    config = make_config(kind, shapes, first_stage)
    config.update(steps=10, save_every=5, eval_every=10, eval_batches=3, preview_every=10)
    config.data.buckets.update(fields or {"sizes": SIZES})
    return config


@pytest.mark.parametrize("kind", ["diffusion"])
def test_a_bucket_compiles_once_and_a_run_resumes_exactly(
    kind,
    shapes,
    first_stage,  # noqa: F811
    tmp_path,
    monkeypatch,
    compilations,
):
    config = bucketed(kind, shapes, first_stage)
    config.preview_captions = ()
    counted: list[int] = []
    record = Report.step

    def step(self, number, values):
        counted.append(len(compilations))
        record(self, number, values)

    monkeypatch.setattr(Report, "step", step)
    train(config, tmp_path / "whole")
    stream = make_loader(config, "train").iterate()
    shape_of = [next(stream)["image"].shape[1:3] for _ in range(10)]
    assert set(shape_of) == set(SIZES)
    # Step n is recorded after step n + 1 was dispatched; the last one before the evaluation.
    both = max(shape_of.index(size) for size in SIZES)
    assert counted[both] == counted[-1] > counted[0] if both else counted[0] == counted[-1]

    monkeypatch.setattr(Report, "step", record)
    config.steps = 5
    train(config, tmp_path / "parts")
    config.steps = 10
    train(config, tmp_path / "parts")
    assert_identical(final(tmp_path / "parts", 10), final(tmp_path / "whole", 10))
    losses = {m["step"]: m["loss"] for m in metrics(tmp_path / "whole") if m["part"] == "train"}
    again = {m["step"]: m["loss"] for m in metrics(tmp_path / "parts") if m["part"] == "train"}
    assert again == losses
    assert np.isfinite([*losses.values()]).all()
    picture = Image.open(tmp_path / "whole" / "previews" / "0000010.png")
    assert picture.size[0] > 8 * 8


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "contrastive"}, "the task 'contrastive' trains on pictures of one size"),
        ({"data.buckets.sizes": (8, 8)}, "give pairs"),
    ],
)
def test_what_takes_no_buckets_is_refused(change, message, shapes, first_stage, tmp_path):  # noqa: F811
    config = bucketed("diffusion", shapes, first_stage)
    if "task" in change:
        config = base(change.pop("task"))
        config.data.update(path=str(shapes))
        config.data.buckets.sizes = SIZES
    config.update_from_flattened_dict(change)
    with pytest.raises(LdmJaxError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.fast
def test_sizes_that_the_networks_cannot_take_are_named(shapes, first_stage):  # noqa: F811
    config = bucketed("diffusion", shapes, first_stage, sizes=((8, 8), (7, 9)))
    config.model.unet.channel_mult = (1, 2)
    with pytest.raises(ConfigError, match=r"\(7, 9\) do not divide .* multiples of 2 pixels"):
        task_class(config).from_config(config)
    config = bucketed("autoencoder", shapes, first_stage, sizes=((8, 8), (7, 9)))
    config.model.first_stage.ch_mult = (1, 1)
    with pytest.raises(ConfigError, match=r"\(7, 9\) do not divide .* multiples of 2 pixels"):
        task_class(config).from_config(config)
    config = bucketed("autoencoder", shapes, first_stage)
    config.batch_resize = (8, 24)
    with pytest.raises(ConfigError, match=r"batch_resize and data\.buckets"):
        task_class(config).from_config(config)


def test_a_latent_cache_keeps_the_buckets(shapes, first_stage, tmp_path, no_preview):  # noqa: F811
    config = bucketed("diffusion", shapes, first_stage)
    config.update(steps=4, save_every=4, eval_every=4)
    cached = config.copy_and_resolve_references()
    cached.data.cache = str(encode(config, tmp_path / "cache"))
    streams = [make_loader(one, "train").iterate() for one in (config, cached)]
    for _ in range(12):
        pixels, latents = map(next, streams)
        assert pixels["caption"] == latents["caption"]
        assert latents["moments"].shape[1:3] == pixels["image"].shape[1:3]  # factor 1
    train(cached, tmp_path / "run")
    assert np.isfinite([m["loss"] for m in metrics(tmp_path / "run")]).all()
    cached.data.buckets.sizes = ()
    with pytest.raises(DataError, match=r"made with data\.buckets=.*, not None"):
        train(cached, tmp_path / "other")
