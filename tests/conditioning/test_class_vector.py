"""Classes that the UNet adds to the embedding of the timestep."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY, pipeline_of

from ldm_jax.conditioning import make_conditioner
from ldm_jax.conditioning.class_label import RowClass
from ldm_jax.conditioning.class_vector import ClassVector
from ldm_jax.conditioning.config import complete_model
from ldm_jax.convert.compvis.infer import Original
from ldm_jax.convert.compvis.original import config_of, original_of
from ldm_jax.convert.compvis.whole import whole_from_config
from ldm_jax.errors import ConfigError, RequestError

FIELDS = {"kind": "class_vector", "n_classes": 4}
UNET = {**TINY["unet"], "num_classes": 4, "use_spatial_transformer": False, "context_dim": None}
CONFIG = {**TINY, "conditioner": FIELDS, "unet": UNET, "classes": ["a", "b", "c"]}


@pytest.fixture(scope="module")
def pipe():
    return pipeline_of(CONFIG)


def test_classes_are_told_apart_and_guided_away_from_the_null_class(pipe):
    made = pipe(classes=["a", "b"], seeds=0, steps=2, size=(16, 16), batch=2)
    assert made.shape == (2, 16, 16, 3)
    assert (made[0] != made[1]).any()
    unguided = pipe(classes=["a", "b"], seeds=0, steps=2, size=(16, 16), batch=2, guidance=1.0)
    assert (made != unguided).any()


@pytest.mark.fast
def test_without_a_null_class_there_is_no_guidance():
    conditioner = make_conditioner({**FIELDS, "null_class": False}, np.float32)
    assert not conditioner.guided
    assert "null_class" not in conditioner.signature(None)
    assert make_conditioner(FIELDS, np.float32).guided


def test_a_model_without_a_null_class_refuses_guidance(pipe):
    plain = dataclasses.replace(pipe.model.conditioner, null_class=False)
    model = dataclasses.replace(pipe.model, conditioner=plain)
    other = type(pipe)(model, devices=1)
    assert other.defaults.guidance == 1.0
    with pytest.raises(RequestError, match="no null condition"):
        other(classes=0, guidance=3.0, steps=1)


@pytest.mark.fast
@pytest.mark.parametrize(("dropout", "count"), [(0.0, 2), (0.1, 3)])
def test_the_sizes_follow_from_the_data(dropout, count):
    model = {"conditioner": {"kind": "class_vector"}, "unet": {}}
    done = complete_model(model, RowClass("kind", ("a", "b")), dropout)
    assert done["conditioner"] == {"kind": "class_vector", "null_class": dropout > 0} | {
        "n_classes": count
    }
    assert done["unet"] == {"num_classes": count}
    assert done["classes"] == ["a", "b"]


@pytest.mark.fast
def test_contradictions_are_errors():
    row = RowClass("kind", ("a", "b"))
    for fields, unet, message in (
        ({"n_classes": 2}, {}, "n_classes is 2: the data need 3"),
        ({"null_class": False}, {}, "null_class is off"),
        ({}, {"num_classes": 5}, "model.unet.num_classes is 5: the condition needs 3"),
    ):
        model = {"conditioner": {"kind": "class_vector", **fields}, "unet": unet}
        with pytest.raises(ConfigError, match=message):
            complete_model(model, row, 0.1)


def test_the_original_layout_holds_it_both_ways():
    config = {**CONFIG, "conditioner": {**FIELDS, "null_class": False}}
    config["sampling"] = {**TINY["sampling"], "guidance": 1.0}
    original = original_of(config)
    assert original.params["conditioning_key"] == "adm"
    whole = whole_from_config(original.target, original.params)
    names = {entry.source for entry in whole.table}
    assert "model.diffusion_model.label_emb.weight" in names
    again = config_of(Original(original.target, original.params), whole.modules, None)
    assert again["conditioner"] == config["conditioner"]
    assert again["unet"]["num_classes"] == 4


def test_its_condition_is_the_number_itself():
    conditioner = ClassVector(n_classes=4)
    cond = conditioner({}, conditioner.encode([2, 0]))
    assert np.asarray(cond.vector).tolist() == [2, 0]
    assert jax.tree.leaves(conditioner.null_row()) == [3]
