"""The task classifier, and the guidance of a pipeline by what it has trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, pipeline_of
from ml_collections import ConfigDict
from PIL import Image

import ldm_jax
from ldm_jax.configs.common import base
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import ConfigError, RequestError
from ldm_jax.io.checkpoint import save_model
from ldm_jax.models.classifier import Classifier, classifier_of, cross_entropy
from ldm_jax.sampling.pipeline import load
from ldm_jax.sampling.request import Request
from ldm_jax.train import loop
from ldm_jax.train.loop import train

pytestmark = pytest.mark.compile

PLAIN = {
    **TINY,
    "schedule": {**TINY["schedule"], "timesteps": 10},
    "first_stage": {**TINY["first_stage"], "ch_mult": [1]},
    "conditioner": {"kind": "none"},
    "unet": {**TINY["unet"], "use_spatial_transformer": False, "context_dim": None},
    "sampling": {"size": [8, 8], "steps": 4, "guidance": 1.0},
}


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """The directory of an unconditional model."""
    path = tmp_path_factory.mktemp("models") / "plain"
    model = pipeline_of(PLAIN).model
    params = {**model.params, "first_stage": model.first_stage.params}
    save_model(path, PLAIN, jax.device_get({k: v for k, v in params.items() if v}))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of bright and dark pictures with their class."""
    path = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(16):
        bright = i % 2 == 0
        pixels = np.full((8, 8, 3), 255 if bright else 0, np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "kind": "bright" if bright else "dark"})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def trained(diffusion, pictures, tmp_path_factory):
    """(model directory, run folder) of a short training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
        run = tmp_path_factory.mktemp("runs") / "classifier"
        return train(config_of(diffusion, pictures), run), run


def config_of(diffusion, pictures):
    config = base("classifier")
    config.update(steps=60, batch_size=8, eval_every=60, eval_batches=1, log_every=20, ema=0.0)
    config.data.update(path=str(pictures), size=(8, 8))
    config.data.condition = ConfigDict({"column": "kind"})
    config.optim.lr = 3e-3
    config.model.path = str(diffusion)
    config.model.classifier.update(pool="adaptive", channel_mult=[1, 2])
    return config


def test_it_learns_previews_and_exports(trained):
    model, run = trained
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy"] > 0.8
    config = json.loads((model / "config.json").read_text())
    assert config["kind"] == "classifier"
    assert config["classes"] == ["bright", "dark"]
    assert np.asarray(Image.open(next((run / "previews").glob("*.png")))).ndim == 3


def test_a_pipeline_is_guided_to_the_class(trained, diffusion):
    model, _ = trained
    pipe = ldm_jax.load(diffusion, classifier=model, devices=1)
    classes = ["bright", "dark"] * 4
    seeds = [i // 2 for i in range(8)]

    def sampled(scale):
        job = pipe.job(Request(classes=classes, seeds=seeds, classifier_scale=scale, batch=8))
        assert job.inputs.labels.tolist() == [0, 1] * 4
        made = pipe.compute(job.own.sampler, job.config, job.steps, job.rows(range(8)))
        logits = pipe.model.classifier.logits(made.latents, jnp.zeros(8, jnp.int32))
        return np.asarray(made.images), float(cross_entropy(logits, job.inputs.labels).mean())

    none, before = sampled(0.0)
    plain = ldm_jax.load(diffusion, devices=1)(seeds=seeds, batch=8)
    assert np.abs(none.astype(int) - plain).max() <= 1
    made, after = sampled(50.0)
    assert (made != none).any()
    assert after < 0.9 * before


def test_what_does_not_fit_is_an_error(trained, diffusion, tmp_path):
    model, _ = trained
    plain, guided = (ldm_jax.load(diffusion, classifier=c, devices=1) for c in (None, model))
    with pytest.raises(RequestError, match="classifier_scale needs a classifier"):
        plain(classifier_scale=2.0)
    with pytest.raises(RequestError, match="guides to a class: give classes"):
        guided()
    with pytest.raises(RequestError, match="class 'brigth' does not exist"):
        guided(classes="brigth")
    with pytest.raises(RequestError, match="is a latent_diffusion, not a classifier"):
        ldm_jax.load(diffusion, classifier=diffusion)
    other = {**PLAIN, "schedule": {**PLAIN["schedule"], "timesteps": 11}}
    params = {"unet": plain.model.params["unet"], "first_stage": plain.model.first_stage.params}
    save_model(tmp_path / "other", other, jax.device_get(params))
    with pytest.raises(RequestError, match="another noise schedule"):
        ldm_jax.load(tmp_path / "other", classifier=model)


def test_a_config_without_a_model_is_an_error(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path is missing"):
        train(config_of("", pictures), tmp_path / "run")


def test_the_gradient_is_that_of_the_log_probability():
    module = classifier_of(pipeline_of(PLAIN).model.unet, 3, 4, "adaptive")
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    t, labels = jnp.array([1, 5]), jnp.array([0, 2])
    variables = module.init(jax.random.key(0), x, t)
    params = jax.tree.map(lambda a: a + 0.1, variables["params"])
    classifier = Classifier(params, pipeline_of(PLAIN).model.schedule, module)
    gradient = classifier.gradient(x, t, labels)

    def total(x):
        scores = jax.nn.log_softmax(module.apply({"params": params}, x, t))
        return float(scores[0, 0] + scores[1, 2])

    step = np.zeros_like(x)
    step[1, 2, 1, 3] = 1e-2
    assert np.isclose(
        (total(x + step) - total(x - step)) / 2e-2, gradient[1, 2, 1, 3], rtol=0.05, atol=1e-4
    )
    eps = np.ones_like(x)
    assert np.allclose(classifier.corrected(eps, x, t, labels, 0.0), eps)


def test_a_classifier_takes_no_refiner():
    with pytest.raises(RequestError, match="do not go together"):
        load("emoji", classifier="some", refiner="other")
