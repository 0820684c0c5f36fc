"""Whole training runs: their output files, and exact resumption."""

import contextlib
import json
import logging
import os
import random
import re
import signal
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from conftest import SMALL, SMALL_KL, child, random_params
from ml_collections import ConfigDict
from PIL import Image

import ldm_jax
from ldm_jax.configs.common import base
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.errors import CheckpointError, ConfigError, ResourceError, TrainingDiverged
from ldm_jax.io.checkpoint import BestCheckpoints, TrainingCheckpoints, load_model, save_model
from ldm_jax.kernels import cores
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build, build_first_stage, init_params
from ldm_jax.models.ldm import FirstStage
from ldm_jax.train import loop
from ldm_jax.train.loop import run_evaluation, train
from ldm_jax.train.report import Report
from ldm_jax.train.state import create_state
from ldm_jax.train.tasks import autoencoder
from ldm_jax.train.tasks.autoencoder import AutoencoderTask
from ldm_jax.train.tasks.diffusion import DiffusionTask

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    """One device, to compile less; test_parts shows that results do not depend on it."""
    monkeypatch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Twenty pictures of noise over a colour, captioned by a digit."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for i in range(20):
        image = rng.integers(0, 80, (16, 16, 3)) + rng.integers(0, 176, 3)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i:02d}.png")
        rows.append({"file_name": f"{i:02d}.png", "text": f"{i % 10}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory) -> Path:
    """The model directory of a first stage."""
    path = tmp_path_factory.mktemp("first_stage") / "model"
    module, key = build_first_stage({"first_stage": SMALL_KL}), jax.random.key(0)
    params = random_params(jax.eval_shape(lambda: init_autoencoder(module, key)), 1)
    save_model(path, {"kind": "first_stage", "first_stage": SMALL_KL}, {"first_stage": params})
    return path


@pytest.fixture(params=["adversarial", "diffusion"])
def config(request, pictures, first_stage) -> ConfigDict:
    """A run of six steps with a checkpoint every three."""
    return make_config(request.param, pictures, first_stage)


def make_config(kind: str, pictures: Path, first_stage: Path) -> ConfigDict:
    """``kind``: a task, or "adversarial": discriminator, averaged codebook and NaN guard."""
    task = "autoencoder" if kind == "adversarial" else kind
    config = base(task)
    config.update(
        steps=6,
        batch_size=8,
        ema=0.9,
        log_every=1,
        save_every=3,
        eval_every=3,
        eval_batches=1,
        preview_every=3,
    )
    config.data.update(path=str(pictures), size=(8, 8), flip=True)
    config.optim.update(lr=1e-3, warmup=2, clip=1.0)
    if kind == "adversarial":
        config.model.first_stage = ConfigDict(
            {**SMALL_KL, "kind": "vq", "quantizer": "ema", "n_embed": 12}
        )
        config.loss.restart_codes = True
        config.adversary.update(weight=0.5, start=1, layers=1, channels=4, ramp=2, cap=10.0)
        config.guard.update(rollbacks=2, lower=0.5)
    elif task == "autoencoder":
        config.model.first_stage = ConfigDict(SMALL_KL)
    else:
        config.scale_factor_batches = 2
        for section in ("objective", "schedule", "conditioner", "unet"):
            config.model[section] = (
                ConfigDict(SMALL[section]) if isinstance(SMALL[section], dict) else SMALL[section]
            )
        config.model.first_stage = ConfigDict({"path": str(first_stage)})
        config.model.sampling = ConfigDict({"size": (8, 8), "steps": 2, "guidance": 2.0})
        config.preview_captions = ("1",)
    return config


def final(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of the state at ``step``: parameters, average, optimiser, step."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(folder, restore_args=as_numpy)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def assert_identical(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert {key.split("'")[1] for key in expected} >= {"step", "params", "ema", "opt_state"}
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not np.array_equal(found[name], expected[name])]
    assert not differing


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_stopped_and_resumed_is_the_run_that_never_stopped(
    config, tmp_path, monkeypatch, caplog
):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    config.best.update(keep=1, mode="max")  # of a loss that falls, so that the best is not the last

    # SIGUSR1 during the validation of step 3: the extra checkpoint of step 4 changes nothing.
    def asking(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return run_evaluation(*args)

    monkeypatch.setattr(loop, "run_evaluation", asking)
    caplog.set_level(logging.INFO, "ldm_jax")
    train(config, straight)
    monkeypatch.setattr(loop, "run_evaluation", run_evaluation)
    assert [
        record.getMessage() for record in caplog.records if "SIGUSR1" in record.getMessage()
    ] == ["SIGUSR1: step 4 is saved"]
    assert sorted(int(path.name) for path in (straight / "checkpoints").iterdir()) == [3, 4, 6]

    # Skip the preview: compiling it again tests nothing new.
    for task in (AutoencoderTask, DiffusionTask):
        monkeypatch.setattr(task, "preview", lambda *_: np.zeros((8, 8, 3), np.uint8))
    shorter = config.copy_and_resolve_references()
    shorter.steps = 3
    train(shorter, stopped)
    assert sorted(int(path.name) for path in (stopped / "checkpoints").iterdir()) == [0, 3]
    with (stopped / "metrics.jsonl").open(
        "a"
    ) as file:  # as a killed run leaves it: a step too many, and half a line
        file.write('{"step": 4, "part": "train", "loss": 0}\n{"step": 5, "pa')
    model = train(config, stopped)

    assert_identical(final(stopped, 6), final(straight, 6))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [m.get(key) for m in metrics(stopped)] == [m.get(key) for m in metrics(straight)]
    # The model of the shorter run has given way to that of the whole.
    (found, params), (expected, expected_params) = load_model(model), load_model(straight / "model")
    assert found == expected
    assert found["trained_steps"] == 6
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        np.testing.assert_array_equal(a, b)

    # And all that a run shows is there.
    assert [m["step"] for m in metrics(straight) if m["part"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [m["step"] for m in metrics(straight) if m["part"] == "validation"] == [3, 6]
    assert {"loss", "grad_norm", "learning_rate", "images_per_second"} <= metrics(straight)[
        0
    ].keys()
    assert sorted(path.name for path in (straight / "previews").iterdir()) == [
        "0000003.png",
        "0000006.png",
    ]
    assert list(straight.glob("events.out.tfevents*"))

    # Both runs keep the checkpoint of the best validation next to the newest, and write its model.
    losses = {m["step"]: m["loss"] for m in metrics(straight) if m["part"] == "validation"}
    top = max(losses, key=losses.__getitem__)
    for run in (straight, stopped):
        assert [path.name for path in (run / "best").iterdir()] == [str(top)]
        kept, kept_params = load_model(run / "model_best")
        assert kept == {**found, "trained_steps": top}
        kernel = next(
            v for k, v in final(straight, top).items() if k.startswith("['ema']") and "kernel" in k
        )
        assert any(np.array_equal(kernel, a) for a in jax.tree.leaves(kept_params))

    # A finished run that is started again does nothing more.
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    assert train(config, stopped) == model
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before

    if config.task == "diffusion":
        pipe = ldm_jax.load(model, devices=1)
        assert pipe("1", steps=2).shape == (1, 8, 8, 3)
        preview = np.asarray(Image.open(straight / "previews/0000006.png"))
        # A sample, eight pictures and their reconstructions, the sample on its way.
        assert preview.shape == (4 * 10 + 2, 8 * 10 + 2, 3)
        std = float(pipe.model.first_stage.scale)
        info = json.loads((straight / "checkpoints/6/info/metadata").read_text())
        assert std == pytest.approx(info["scale_factor"])
        average = final(straight, 6)
        np.testing.assert_array_equal(
            params["unet"]["out_conv"]["kernel"], average["['ema']['unet']['out_conv']['kernel']"]
        )
    else:
        module = build_first_stage(found)
        shape = jax.eval_shape(lambda: init_autoencoder(module, jax.random.key(0)))
        assert jax.tree.map(np.shape, params["first_stage"]) == jax.tree.map(
            lambda s: s.shape, shape
        )
        codes = "['extra']['collections']['codebook']['quantize']['embedding']"
        np.testing.assert_array_equal(
            params["first_stage"]["quantize"]["embedding"], final(straight, 6)[codes]
        )
        assert {"d_weight", "disc_loss", "perplexity", "codebook_use"} <= metrics(straight)[
            0
        ].keys()
        # As a latent diffusion model's first stage it needs nothing else.
        stage = FirstStage(params["first_stage"], 1.0, module)
        assert stage.decode(stage.encode(np.zeros((1, 8, 8, 3), np.float32))).shape == (1, 8, 8, 3)

    # Another setting is another run.
    for name, value, message in [
        ("seed", 1, "seed=0, not 1"),
        ("optim.lr", 0.5, r"optim.lr=0.001, not 0.5"),
        ("best.metric", "los", "no validation metric; did you mean 'loss'"),
    ]:
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({name: value})
        with pytest.raises(ConfigError, match=message):
            train(other, stopped)


@pytest.fixture
def quick(pictures, first_stage) -> ConfigDict:
    """An autoencoder run without previews."""
    config = make_config("autoencoder", pictures, first_stage)
    config.preview_every = config.eval_every = 1000
    return config


def test_a_run_begins_with_a_models_parameters(quick, first_stage, tmp_path):
    quick.update(init=str(first_stage), steps=1, save_every=1)
    quick.optim.lr = 0.0
    params = load_model(train(quick, tmp_path / "same"))[1]
    jax.tree.map(np.testing.assert_array_equal, params, load_model(first_stage)[1])

    quick.model.first_stage.z_channels = SMALL_KL["z_channels"] + 2
    with pytest.raises(
        ConfigError,
        match=r"init: .* has decoder/conv_in/kernel \(3, 3, 4, 32\), "
        r"not \(3, 3, 6, 32\) and \d+ more",
    ):
        train(quick, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_without_the_memory_is_refused_with_both_figures(quick, tmp_path, monkeypatch):
    free = [1000]
    monkeypatch.setattr(cores, "free_memory", lambda mesh: free[0])
    figures = r"{}: 0\.0 GiB are needed, 0\.0 GiB are free"
    state = figures.format("parameters, averages and optimiser")
    with pytest.raises(ResourceError, match=f"out of memory: a smaller batch_size.*{state}"):
        train(quick, tmp_path / "state")
    assert not (tmp_path / "state").exists()
    monkeypatch.setattr(cores, "free_memory", lambda mesh: free.pop())
    free[:] = [1000, 2**60]
    step = figures.format("a training step")
    with pytest.raises(ResourceError, match=f"out of memory: a smaller batch_size.*{step}"):
        train(quick, tmp_path / "step")
    assert not free


def test_a_diffusion_run_that_begins_with_a_model_takes_its_scale(pictures, first_stage, tmp_path):
    config = make_config("diffusion", pictures, first_stage)
    config.update(steps=1, save_every=1, eval_every=10, preview_every=10)
    config.optim.lr = 0.0
    before = {**SMALL, "kind": "latent_diffusion", "scale_factor": 0.123}
    model, stage = build(before, None, None), load_model(first_stage)[1]["first_stage"]
    params = random_params(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), 3)
    save_model(tmp_path / "model", before, {**params, "first_stage": stage})

    config.init = str(tmp_path / "model")
    after, trained = load_model(train(config, tmp_path / "run"))
    assert after["scale_factor"] == 0.123
    jax.tree.map(np.testing.assert_array_equal, trained, {**params, "first_stage": stage})


def test_a_run_under_pmap_on_8_devices_evaluates_saves_and_resumes(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", make_mesh)
    quick.update(parallel="pmap", steps=1, save_every=1, eval_every=1, preview_every=2)
    train(quick, tmp_path)
    quick.steps = 2
    assert load_model(train(quick, tmp_path))[0]["trained_steps"] == 2
    assert [(m["step"], m["part"]) for m in metrics(tmp_path)] == [
        (i, part) for i in (1, 2) for part in ("train", "validation")
    ]


def poison(monkeypatch, bad) -> None:
    """Fills batches with NaN where ``bad(number)`` is true; numbers count requests from 1."""
    host_batch, calls = AutoencoderTask.host_batch, []

    def poisoned(self, raw, first_row=0):
        calls.append(1)
        batch = host_batch(self, raw, first_row)
        image = batch["image"].astype(np.float32)
        return batch | {"image": image * np.float32(np.nan) if bad(len(calls)) else image}

    monkeypatch.setattr(AutoencoderTask, "host_batch", poisoned)


@pytest.mark.parametrize(("poisoned_step", "last_good"), [(3, 0), (5, 3)])
def test_a_loss_that_is_no_number_stops_the_run_before_anything_is_saved(
    quick, tmp_path, monkeypatch, poisoned_step, last_good
):
    poison(monkeypatch, lambda number: number == poisoned_step)
    with pytest.raises(
        TrainingDiverged, match=rf"loss is nan.* at step {poisoned_step}; .* step {last_good}, in "
    ):
        train(quick, tmp_path / "run")
    saved = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == sorted({0, last_good})
    assert all(np.isfinite(a).all() for a in final(tmp_path / "run", last_good).values())
    assert not (tmp_path / "run" / "model").exists()


@pytest.fixture
def guarded(pictures, first_stage) -> ConfigDict:
    """A run with an adversary and a guard, without previews."""
    config = make_config("adversarial", pictures, first_stage)
    config.preview_every = config.eval_every = 1000
    return config


def test_a_guarded_run_goes_back_to_its_last_good_checkpoint(
    guarded, tmp_path, monkeypatch, caplog
):
    """One NaN batch at step 5: back to step 3, the adversarial weight halved from there on."""
    poison(monkeypatch, lambda number: number == 5)
    train(guarded, tmp_path / "hit")
    lines = [
        record.getMessage() for record in caplog.records if "back to step" in record.getMessage()
    ]
    assert len(lines) == 1
    assert re.fullmatch(
        r"the loss is nan and its gradient's norm nan at step 5: "
        r"back to step 3 \(1 of at most 2 times\)",
        lines[0],
    )
    assert [m["step"] for m in metrics(tmp_path / "hit") if m["part"] == "train"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    at_3, at_6 = final(tmp_path / "hit", 3), final(tmp_path / "hit", 6)
    assert (
        int(at_3["['extra']['guard']['rollbacks']"]),
        int(at_6["['extra']['guard']['rollbacks']"]),
    ) == (0, 1)
    # No average exists after this few steps.
    assert np.isinf(at_6.pop("['extra']['guard']['lowest']"))
    assert all(np.isfinite(a).all() for a in at_6.values())
    weight = {
        m["step"]: m["adversarial_weight"] / m["d_weight"]
        for m in metrics(tmp_path / "hit")
        if m["part"] == "train"
    }
    assert weight[3] == pytest.approx(1.0, rel=1e-4)  # the ramp is over, and d_weight below the cap
    # The figures are rounded to six digits.
    assert [weight[4], weight[6]] == pytest.approx([0.5, 0.5], rel=1e-4)


def test_a_guarded_run_that_diverges_again_and_again_stops(guarded, tmp_path, monkeypatch):
    """A permanent fault: after two attempts the run stops with an error."""
    poison(monkeypatch, lambda number: number >= 4)
    with pytest.raises(TrainingDiverged, match=r"loss is nan .* at step 4; .* step 3, in "):
        train(guarded, tmp_path / "run")
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [0, 3]


def test_an_exploding_d_weight_is_logged_and_a_ruined_reconstruction_rolled_back(
    guarded, tmp_path, monkeypatch, caplog
):
    """An adversarial weight of 1e6 from step 7 on; after one rollback it is 0."""
    monkeypatch.setattr(autoencoder, "GUARD_DECAY", 0.0)
    guarded.update(steps=12, save_every=6)
    guarded.adversary.update(weight=1e6, start=6, ramp=0, cap=0.0, alarm=1e3)
    guarded.guard.update(rollbacks=1, lower=0.0, rise=1.5)
    guarded.optim.update(lr=3e-3, warmup=6, clip=0.0)
    train(guarded, tmp_path / "run")
    messages = [record.getMessage() for record in caplog.records]
    assert re.match(
        r"step 7: d_weight is \S+, above adversary.alarm 1000",
        next(s for s in messages if "alarm" in s),
    )
    back = [line for line in messages if "back to step" in line]
    assert len(back) == 1
    assert re.match(
        r"the reconstruction loss is \S+ times its lowest at step (8|9|10|11|12): back to step 6 ",
        back[0],
    )
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        0,
        6,
        12,
    ]
    last = metrics(tmp_path / "run")[-2]
    assert (last["step"], last["adversarial_weight"]) == (12, 0.0)
    assert last["rise"] < 1.5


def report_of(workdir, config, first=0):
    """The report of a run without a model."""
    return Report(workdir, config, AutoencoderTask(config, None), first, lambda step: 0.1)


def test_a_suspect_step_is_not_saved(guarded, tmp_path):
    guarded.guard.rise = 2.0
    with contextlib.closing(report_of(tmp_path, guarded)) as report:
        seen = []
        for step, rise in enumerate((1.0, 1.41, 1.42, 1.99, 1.2), start=1):
            report.step(step, {"loss": 1.0, "grad_norm": 1.0, "rise": rise})
            seen.append(report.suspect)
    assert seen == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ({}, ""),
        ({"disc_loss": 0.5, "disc_grad_norm": 0.1, "rise": 1.9}, ""),
        ({"loss": np.inf}, "the loss is inf and its gradient's norm 1.0"),
        ({"grad_norm": np.inf}, "the loss is 1.0 and its gradient's norm inf"),
        (
            {"disc_loss": 0.5, "disc_grad_norm": np.nan},
            "the discriminator's loss is 0.5 and its gradient's norm nan",
        ),
        ({"rise": 2.5}, "the reconstruction loss is 2.50 times its lowest"),
    ],
)
def test_a_problem_stops_a_run(guarded, tmp_path, metrics, problem):
    guarded.guard.rise = 2.0
    metrics = {"loss": 1.0, "grad_norm": 1.0, **metrics}
    assert AutoencoderTask(guarded, None).problem(metrics) == problem
    if problem:
        report = report_of(tmp_path, guarded)
        with pytest.raises(TrainingDiverged, match=f"{problem} at step 1; lower optim.lr"):
            report.step(1, metrics)
        report.close()


class FakeWandb(types.ModuleType):
    """The part of the Weights & Biases API that a run uses."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.metrics, self.finished, self.Image = [], [], [], 0, np.shape

    def init(self, **given):
        self.runs.append(given)
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_logs_what_tensorboard_logs_and_a_resumed_run_keeps_its_id(
    quick, tmp_path, monkeypatch
):
    quick.wandb.project = "icons"
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first in (0, 2):
        with contextlib.closing(report_of(tmp_path, quick, first)) as report:
            report.step(first + 1, {"loss": 1.0, "grad_norm": 0.5})
            report.evaluation(first + 1, {"psnr": 20.0})
            report.preview(first + 1, np.zeros((4, 6, 3), np.uint8))
    for run in wandb.runs:
        assert (run["project"], run["dir"], run["resume"]) == ("icons", str(tmp_path), "allow")
        assert (run["config"]["optim"]["lr"], run["id"]) == (1e-3, wandb.runs[0]["id"])
    assert [len(wandb.runs), wandb.finished] == [2, 2]
    assert ("*", "step") in wandb.metrics
    train_, validation, preview = wandb.logged[:3]
    assert {**train_, "speed/images_per_second": 0.0, "speed/memory_gib": 1.0} == {
        "train/loss": 1.0,
        "train/grad_norm": 0.5,
        "train/learning_rate": 0.1,
        "speed/images_per_second": 0.0,
        "speed/memory_gib": 1.0,
        "data/waited_for_data": 0.0,
        "step": 1,
    }
    assert validation == {"eval/psnr": 20.0, "step": 1}
    assert preview == {"previews/made": (4, 6, 3), "step": 1}
    assert [logged["step"] for logged in wandb.logged] == [1, 1, 1, 3, 3, 3]

    def refuse(**given):
        raise RuntimeError("api_key not configured\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"wandb cannot start \(api_key not configured\)"):
        report_of(tmp_path, quick)


@pytest.mark.parametrize(("ready", "share"), [((True, True), 0.5), ((True, False), 0.0)])
def test_waiting_for_data_is_reported_only_if_the_device_waited(
    quick, tmp_path, monkeypatch, caplog, ready, share
):
    """A slow loader is hidden while the device still computes the previous step."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    caplog.set_level(logging.INFO, "ldm_jax")
    quick.steps = 1
    running = [types.SimpleNamespace(is_ready=lambda value=value: value) for value in ready]
    with contextlib.closing(report_of(tmp_path, quick)) as report:
        with report.waiting(running):
            now[0] += 3.0
        now[0] += 3.0
        report.step(1, {"loss": 1.0, "grad_norm": 0.5})
    assert metrics(tmp_path)[0]["waited_for_data"] == share
    assert ("waits 50 % of the time for data" in caplog.text) == bool(share)


# Not installed, or a folder of that name.
@pytest.mark.parametrize("there", [None, types.ModuleType("wandb")])
def test_a_wandb_project_without_wandb_is_an_error_before_the_run(
    quick, tmp_path, monkeypatch, there
):
    quick.wandb.project = "icons"
    monkeypatch.setitem(sys.modules, "wandb", there)
    with pytest.raises(ConfigError, match="wandb is not installed: pip install wandb"):
        train(quick, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_a_run_killed_at_any_moment_and_started_again_is_the_run_that_was_not(
    guarded, pictures, tmp_path
):
    """SIGKILL of train.py with a discriminator; the learning rate decays, to expose lost steps."""
    config = tmp_path / "tiny.py"
    guarded.update(steps=16, save_every=2)
    guarded.optim.update(decay="cosine")
    config.write_text(
        f"import json\n\nimport ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({json.dumps(guarded.to_json())!s}))\n"
    )
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def start(workdir):
        return child("train.py", f"--config={config}", f"--workdir={workdir}")

    process = start(straight)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == f"finished: the model is in {straight / 'model'}"
    noise = [
        line
        for line in stderr.splitlines()
        if not line.startswith(
            (
                "step ",
                "progress: ",
                "validation ",
                "finished",
                "the report ",
                "20 pictures",
                "0.",
                "learning rate ",
            )
        )
    ]
    assert not noise

    process, step, wait = start(killed), random.randint(3, 12), random.uniform(0, 0.05)
    lines = killed / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.read_text().count("\n") >= step):
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was to be killed before it ended"

    process = start(killed)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "resuming from step" in stderr
    assert_identical(final(killed, 16), final(straight, 16))
    assert [m["step"] for m in metrics(killed) if m["part"] == "train"] == list(range(1, 17))


def test_the_best_validations_are_kept(tmp_path):
    weights = {"x": np.arange(3.0)}

    def offered(best: BestCheckpoints, step: int, loss: float, psnr: float) -> bool:
        return best.offer(step, weights, {"scale_factor": 0.5}, {"loss": loss, "psnr": psnr})

    def kept() -> list[int]:
        return sorted(int(path.name) for path in (tmp_path / "best").iterdir())

    with contextlib.closing(BestCheckpoints(tmp_path, 2, "loss", "min")) as best:
        assert best.best() is None
        assert not offered(best, 1, np.nan, 9.0)
        assert [
            offered(best, step, loss, psnr)
            for step, loss, psnr in [(2, 3.0, 1.0), (3, 1.0, 3.0), (4, 2.0, 2.0)]
        ] == [
            True,
            True,
            False,  # but better than that of step 2
        ]
        assert not offered(best, 5, 2.0, 9.0)  # as good as the second
        assert best.best() == 3
        assert kept() == [3, 4]
        assert best.restore(3, weights)[1] == {"scale_factor": 0.5}
        np.testing.assert_array_equal(best.restore(3, weights)[0]["x"], weights["x"])
    # Reopened with a smaller number and another metric.
    with contextlib.closing(BestCheckpoints(tmp_path, 1, "psnr", "max")) as best:
        assert best.best() == 3
        assert not offered(best, 6, 0.0, 2.5)
        assert offered(best, 7, 9.0, 4.0)
        assert best.best() == 7
        assert kept() == [7]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            {"a": {"kernel": (3, 5)}},
            r"has in another shape ema/a/kernel \(3, 4\), not \(3, 5\) and 3 more",
        ),
        ({"a": {"kernel": (3, 4)}, "b": (2,)}, "lacks ema/b and 3 more"),
        ({"c": (3, 4)}, "lacks ema/c and 3 more; it has in addition ema/a/kernel and 3 more"),
    ],
)
def test_a_checkpoint_of_another_version_names_the_difference(tmp_path, other, difference):
    def state(shapes):
        params = jax.tree.map(np.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
        return create_state(params, optax.chain(optax.clip(1.0), optax.adam(0.1)), ema=True)

    with contextlib.closing(TrainingCheckpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state({"a": {"kernel": (3, 4)}}), {})
        same, _ = checkpoints.restore(1, state({"a": {"kernel": (3, 4)}}))
        assert same.params["a"]["kernel"].shape == (3, 4)
        message = f"was written by another version: .* it {difference}"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(1, state(other))


def test_a_model_half_written_by_a_killed_run_is_written_again(tmp_path):
    (tmp_path / ".model.partial" / "params").mkdir(parents=True)
    (tmp_path / ".model.partial" / "params" / "junk").write_text("x")
    save_model(tmp_path / "model", {"kind": "first_stage"}, {"x": np.ones(2, np.float32)})
    config, params = load_model(tmp_path / "model")
    assert config["kind"] == "first_stage"
    np.testing.assert_array_equal(params["x"], [1, 1])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
