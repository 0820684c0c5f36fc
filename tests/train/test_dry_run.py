"""`ldm-train --dry_run`: a line for each check, and nothing left behind."""

import re

import pytest
from test_loop import first_stage, make_config, pictures  # noqa: F401

from ldm_jax.errors import PlanError
from ldm_jax.plan import dry_run as checks
from ldm_jax.plan.dry_run import dry_run

NAMES = ["config", "model", "data", "memory", "storage"]


@pytest.fixture
def config(pictures, first_stage):  # noqa: F811
    return make_config("diffusion", pictures, first_stage)


def results(config, workdir) -> dict:
    return {check.name: check for check in dry_run(config, str(workdir))}


def test_a_training_that_can_start_passes_every_check(config, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "_memory", lambda config: "1 GiB")  # see below
    found = results(config, tmp_path / "run")
    assert list(found) == NAMES
    assert all(check.passed for check in found.values()), found
    assert "6 steps of 8 pictures" in found["config"].text
    assert found["config"].text.endswith("a new run")
    assert re.search(r"M parameters to train \(.*unet [\d.]+", found["model"].text)
    assert "20 pictures to train on" in found["data"].text
    assert "image [8, 8, 8, 3]" in found["data"].text
    assert not (tmp_path / "run").exists()


def test_each_check_fails_by_itself(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    config.data.path = str(tmp_path / "nothing")
    config.model.first_stage.path = "nothing"
    monkeypatch.setattr(checks, "_memory", lambda config: "1 GiB")
    found = results(config, tmp_path / "file" / "run")
    assert [name for name, check in found.items() if not check.passed] == [
        *("model", "data", "storage")
    ]
    assert "model 'nothing' is neither a path" in found["model"].text
    assert "nothing does not exist" in found["data"].text
    assert "is not a folder" in found["storage"].text


def test_a_wrong_config_is_named_and_the_storage_is_checked_all_the_same(config, tmp_path):
    config.batch_size = 7
    found = results(config, tmp_path)
    assert {name: check.passed for name, check in found.items()} == {
        "config": False,
        "storage": True,
    }
    assert "batch_size 7 must be a multiple of 8" in found["config"].text


def test_memory_is_compared_with_the_device(config, monkeypatch):
    planned = checks.plan(config, checks.devices_here(), compile=False)
    monkeypatch.setattr(checks, "plan", lambda *_, **__: planned)
    state = planned.needed - planned.bytes["activations"]
    text = checks._memory(config)
    assert re.match(r"[\d.]+ GiB a device: parameters [\d.]+, average", text)
    monkeypatch.setattr(checks, "memory_limit", lambda topology: state - 1)
    with pytest.raises(PlanError, match=r"without activations, of .*mesh\.fsdp take less"):
        checks._memory(config)
    monkeypatch.setattr(checks, "memory_limit", lambda topology: state + 1)
    assert checks._memory(config).endswith("may not fit; ldm-plan asks the compiler")
