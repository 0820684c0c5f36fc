"""Every config builds the trainer's networks as shapes, without computing anything."""

import importlib
from pathlib import Path

import jax
import pytest

from ldm_jax.conditioning import config as conditions
from ldm_jax.train.config import check_config, complete
from ldm_jax.train.tasks import TASKS

SHARED = ("__init__", "common", "presets", "emoji_presets", "released", "transformers")
NAMES = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.py"))

# Millions of parameters of the released networks (UNet and conditioner; encoder and decoder), by
# the shapes of their checkpoints.
RELEASED = {
    "celebahq": 274.1,
    "ffhq": 274.1,
    "lsun_bedrooms": 274.1,
    "lsun_churches": 294.9,
    "cin256": 401.3,
    "kl_f4": 55.3,
    "kl_f8": 83.7,
    "kl_f16": 69.6,
    "kl_f32": 103.9,
    "sd_v1": 859.5,
    "sdxl": 2567.5,
    "rdm": 1335.5,
}


CASES = [(name, variant) for name in NAMES if name not in SHARED for variant in ("", "smoke")]
CASES += [("rdm", "neighbors"), ("emoji_class", "group"), ("emoji_class", "style")]
CASES += [("vqgan_transformer", name) for name in ("class", "emoji", "emoji_class")]
CASES += [("vqgan_transformer_maps", "depth"), ("emoji_vq", "coarse")]
CASES += [
    (name, variant)
    for name in ("photos_kl_gan", "photos_vq_gan")
    for variant in ("small", "small_parity")
]
LARGE = (("rdm", "neighbors"), ("vqgan_transformer", "class"), ("vqgan_transformer_maps", "depth"))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_config_is_whole(name, variant, monkeypatch):
    config = complete(importlib.import_module(f"configs.{name}").get_config(variant))
    check_config(config)
    if config.task == "diffusion" and "kind" not in config.model.first_stage:
        config.model.first_stage.path = (
            "pkg:assets/emoji"  # the demo's, which need not have been trained here
        )
    if str(config.data.path).endswith("emoji64.zip"):
        config.data.path = "pkg:assets/emoji_subset.zip"
    if config.data.path == "pictures":  # which are not here to name their classes
        monkeypatch.setattr(conditions, "class_names", lambda config, cls: ())
    task = TASKS[config.task].from_config(config, weights=False)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    millions = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    smallest = {"lora": 0.1, "inversion": 0.0}
    assert millions > smallest.get(config.task, 0.3)
    if variant and (name, variant) not in LARGE:
        assert millions < 10
    elif name in RELEASED:
        assert millions == pytest.approx(RELEASED[name], rel=0.002)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHARED])
def test_a_variant_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match=r"no variant 'smok'; choose .*smoke"):
        importlib.import_module(f"configs.{name}").get_config("smok")
