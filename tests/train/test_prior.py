"""Prior preservation: half of each batch are pictures of the class."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from test_loop import pictures  # noqa: F401
from test_train_lora import make_config, model_dir, task_of  # noqa: F401

from ldm_jax.errors import ConfigError
from ldm_jax.train.loaders import make_loader


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Five black pictures, captioned by their number."""
    folder = tmp_path_factory.mktemp("others")
    rows = [{"file_name": f"{i}.png", "kind": f"thing {i}"} for i in range(5)]
    for row in rows:
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def config(model_dir, pictures, others):  # noqa: F811
    config = make_config(model_dir, pictures)
    config.data.prior.update(path=str(others), caption="a {kind}", weight=0.25)
    return config


@pytest.mark.fast
def test_half_of_each_batch_is_of_the_class(config):
    loader = make_loader(config, "train")
    assert loader.count == 20
    for start in (0, 3):
        batches = loader.iterate(start)
        batch = next(batches)
        batches.close()
        assert batch["image"].shape == (4, 8, 8, 3)
        assert (batch["image"][2:] == 0).all()
        assert batch["image"][:2].any()
        assert all(text.startswith("a thing ") for text in batch["caption"][2:])
        assert all(text.isdigit() for text in batch["caption"][:2])
        np.testing.assert_array_equal(batch["weight"], [2, 2, 0.5, 0.5])
    (held_out,) = make_loader(config, "validation").batches(1)
    assert "weight" not in held_out
    assert held_out["image"].any(axis=(1, 2, 3)).all()


@pytest.mark.fast
def test_two_processes_share_both_halves(config):
    for index in range(2):
        batches = make_loader(config, "train", (index, 2)).iterate()
        batch = next(batches)
        batches.close()
        np.testing.assert_array_equal(batch["weight"], [2, 0.5])


@pytest.mark.compile
def test_the_loss_is_that_of_the_subject_and_of_the_class(config):
    task = task_of(config)
    batches = make_loader(task.config, "train").iterate()
    raw = next(batches)
    batches.close()
    batch = task.host_batch(raw)
    factors = task.init(jax.random.key(0))

    @jax.jit
    def loss(batch):
        return task.loss(factors, task.frozen, batch, 0, True)[0]

    def alone(kept):
        return loss({**batch, "weight": np.float32(4 / 2) * np.isin(np.arange(4), kept)})

    expected = alone([0, 1]) + 0.25 * alone([2, 3])
    np.testing.assert_allclose(loss(batch), expected, rtol=1e-5)
    assert abs(alone([0, 1]) - alone([2, 3])) > 1e-3


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "data.prior needs an even batch_size"),
        ({"data.cache": "cache"}, "leave data.cache empty"),
        ({"data.prior.weight": 0.0}, "data.prior.weight must be above 0"),
    ],
)
def test_mistakes_are_one_line(config, change, message):
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=message):
        task_of(config, weights=False)


@pytest.mark.fast
def test_a_cache_is_not_made_of_two_sets(config):
    with pytest.raises(ConfigError, match=r"data\.prior is read from pictures"):
        task_of(config, weights=False).cache()
