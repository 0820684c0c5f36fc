"""Eight simulated devices on a CPU, programs compiled once per session, and a tiny model that answers to all of its inputs."""

import contextlib
import dataclasses
import gc
import logging
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["FLAX_PROFILE"] = (
    "false"  # names of scopes, which nobody reads here: a tenth of all tracing
)

import jaxlib

if jaxlib.__version__.startswith(
    "0.10."
):  # a quarter less compiling; XLA ends the process where it does not know a flag
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    )

import jax
import numpy as np
import pytest
from absl import app, flags

from ldm_jax.io.checkpoint import save_model
from ldm_jax.kernels import cores, heap
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build, init_params
from ldm_jax.sampling import program as generation
from ldm_jax.sampling.pipeline import Pipeline, load
from ldm_jax.train.tasks.diffusion import DiffusionTask

ROOT = Path(__file__).parent.parent

KL = {
    "kind": "kl",
    "embed_dim": 4,
    "z_channels": 4,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "attn_type": "none",
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
}

# GroupNorm(32) of 32 channels is instance norm, in which an added time embedding cancels: the level of 64 channels sees the time.
TINY = {
    "kind": "latent_diffusion",
    "objective": "eps",
    "scale_factor": 0.5,
    "schedule": {
        "beta_schedule": "linear",
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 100,
    },
    "first_stage": KL,
    "conditioner": {
        "kind": "bert",
        "dim": 16,
        "depth": 1,
        "max_seq_len": 12,
        "heads": 2,
        "head_dim": 8,
    },
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "context_dim": 16,
    },
    "sampling": {"size": [16, 16], "steps": 4, "guidance": 3.0},
}

# Still smaller, to train: compiling a step takes longer than all its running. Letters and digits have the first 1100 token ids.
SMALL_KL = {**KL, "ch_mult": [1]}
SMALL = {
    **TINY,
    "schedule": {**TINY["schedule"], "timesteps": 10},
    "first_stage": SMALL_KL,
    "conditioner": {**TINY["conditioner"], "vocab_size": 1100},
    "unet": {**TINY["unet"], "channel_mult": [1], "attention_resolutions": []},
}


def pytest_configure() -> None:
    # Tracing makes very many objects and little rubbish: looking for it all the time takes a tenth of the time.
    gc.set_threshold(100_000, 20, 10)
    jax.config.update(
        "jax_traceback_in_locations_limit", 0
    )  # nor are the lines of the code written into every program
    jax.config.update("jax_num_cpu_devices", 8)
    # Nearly all the time goes into compiling programs that run for an instant; unoptimised ones are no less exact.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if (
        "JAX_COMPILATION_CACHE_DIR" not in os.environ
    ):  # many tests, and their child processes, build the same programs
        cache = tempfile.mkdtemp(prefix="ldm_jax_xla_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        jax.config.update("jax_compilation_cache_dir", cache)

    with contextlib.suppress(
        SystemExit
    ):  # absl defines its own flags at the first program; those stay
        app.run(lambda argv: None, argv=["pytest"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays with one worker, which compiles and traces its fixtures once; the reference cases, which share none, fill up at the end."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_parity.py" in nodeid else nodeid.split("::")[0]

    return ByFile(config, log)


def pytest_unconfigure() -> None:
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    ours = Path(cache).name.startswith("ldm_jax_xla_")
    if ours and "PYTEST_XDIST_WORKER" not in os.environ:  # which is done before the others are
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(autouse=True)
def cheap_compiling() -> Iterator[None]:
    """Nobody may leave it switched off: everything after would take several times as long, and nothing else would tell."""
    yield
    assert jax.config.read("jax_disable_most_optimizations")


@pytest.fixture(autouse=True)
def own_log() -> None:
    """A command run in this process sets up the log for people; a test wants to read it."""
    ours = logging.getLogger("ldm_jax")
    ours.handlers, ours.propagate, ours.disabled = [], True, False
    ours.setLevel(
        logging.WARNING
    )  # not what it inherits: absl, where it is used, sets the root's to its own


@pytest.fixture
def no_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process show nothing: compiling a preview takes longer than the run."""
    blank = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(DiffusionTask, "preview", lambda *_: blank)


def worst(found, expected) -> float:
    """The largest difference of any leaf, relative to the largest number of that leaf; NaN where one has a NaN."""

    def apart(a, b) -> float:
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        same = a == b  # infinities too
        return float(
            np.abs(np.where(same, 0, a) - np.where(same, 0, b)).max() / (np.abs(b).max() + 1e-30)
        )

    return float(np.max(jax.tree.leaves(jax.tree.map(apart, found, expected))))


def random_params(shapes: Any, seed: int) -> Any:
    """Parameters of these shapes, none of them zero, so that layers which start at zero do something too."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name, noise = path[-1].key, rng.standard_normal(shape.shape)
        if name == "scale":
            noise = 1 + 0.1 * noise
        elif name == "bias":
            noise = 0.1 * noise
        elif name == "kernel":
            noise = noise / np.sqrt(np.prod(shape.shape[:-1]))
        return noise.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of a few thousand parameters; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model, key = build(TINY, None, None), jax.random.key(0)
    params = random_params(jax.eval_shape(lambda: init_params(model, key)), 0)
    module = model.first_stage.module
    save_model(
        path,
        TINY,
        {
            **params,
            "first_stage": random_params(jax.eval_shape(lambda: init_autoencoder(module, key)), 1),
        },
    )
    return path


def pipeline_of(config: dict) -> Pipeline:
    """A pipeline of random parameters on one device."""
    model, key = build(config, None, None), jax.random.key(0)
    params = random_params(jax.eval_shape(lambda: init_params(model, key)), 0)
    module = model.first_stage.module
    stage = module and random_params(jax.eval_shape(lambda: init_autoencoder(module, key)), 1)
    return Pipeline(
        dataclasses.replace(
            model, params=params, first_stage=model.first_stage.replace(params=stage)
        ),
        devices=1,
    )


@pytest.fixture(scope="session")
def pipe(tiny_dir: Path) -> Pipeline:
    """The tiny model on one device."""
    return load(tiny_dir, devices=1)


class ExactPipeline(Pipeline):
    """Its pictures come out as they leave the decoder, not rounded to 8 bits; other pipelines, compiled in between, are as ever."""

    def compute(self, *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "to_uint8", lambda x: x)
            return super().compute(*args)


def load_exact(path: Path, **options: Any) -> ExactPipeline:
    """`load` for `ExactPipeline`."""
    loaded = load(path, **options)
    loaded.__class__ = ExactPipeline
    return loaded


@pytest.fixture(scope="session")
def exact_pipe(tiny_dir: Path) -> ExactPipeline:
    """The tiny model on one device, with pictures float32."""
    return load_exact(tiny_dir, devices=1)


@pytest.fixture(scope="session")
def compilations() -> list[str]:
    """Grows by one at every compilation."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: (
            seen.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    return seen


# ------------------------------------------------------------------------------------------------------------- the two programs


class Ran(NamedTuple):
    """What a program left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """What it said on stderr, but for the line that tells what is being loaded."""
        return [line for line in self.stderr.splitlines() if not line.startswith("loading ")]


def run_here(
    script: str, *argv: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Ran:
    """Runs train.py or sample.py in this process through its own flags: far quicker than a new process, and as true."""
    import grain  # noqa: F401  (defines flags of its own, which are to stay)

    ours, before = logging.getLogger("ldm_jax"), set(flags.FLAGS)
    kept = ours.handlers, ours.propagate, ours.level
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    # On one device, as nearly everybody's machine has: on eight, a batch of one is a batch of eight.
    monkeypatch.setattr(cores, "all_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(
        heap, "keep_large_blocks", lambda: False
    )  # this process belongs to the tests
    capfd.readouterr()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code or 0
    finally:
        ours.handlers, ours.propagate, ours.level = kept
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    return Ran(status, *capfd.readouterr())


def child(script: str, *argv: Any, devices: int = 1, **popen: Any) -> subprocess.Popen[str]:
    """train.py or sample.py in a new process, on simulated devices."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


@pytest.fixture
def script(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """``script("sample.py", "--prompt=x", ...)`` -> what it left behind."""
    return partial(run_here, capfd=capfd, monkeypatch=monkeypatch)
