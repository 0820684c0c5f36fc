"""Eight simulated CPU devices, programs compiled once per session, and a tiny model."""

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
# Scope names are not read here and slow down tracing.
os.environ["FLAX_PROFILE"] = "false"

import jaxlib

# This flag shortens compilation; XLA aborts the process on flags it does not know.
if jaxlib.__version__.startswith("0.10."):
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

# GroupNorm(32) of 32 channels is instance norm and cancels an added time embedding; the level of 64
# channels depends on the time.
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

# A smaller model for training tests, whose time is mostly compilation. Letters and digits have the
# first 1,100 token ids.
SMALL_KL = {**KL, "ch_mult": [1]}
SMALL = {
    **TINY,
    "schedule": {**TINY["schedule"], "timesteps": 10},
    "first_stage": SMALL_KL,
    "conditioner": {**TINY["conditioner"], "vocab_size": 1100},
    "unet": {**TINY["unet"], "channel_mult": [1], "attention_resolutions": []},
}


def pytest_configure() -> None:
    # Tracing allocates many objects and little garbage: collect it less often.
    gc.set_threshold(100_000, 20, 10)
    # Programs carry no source lines.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    jax.config.update("jax_num_cpu_devices", 8)
    # Compilation dominates the run time of tiny programs; optimisation does not change exactness.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Many tests and their child processes compile the same programs.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.mkdtemp(prefix="ldm_jax_xla_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        jax.config.update("jax_compilation_cache_dir", cache)

    # absl defines its own flags at the first app.run; run_here keeps those.
    with contextlib.suppress(SystemExit):
        app.run(lambda argv: None, argv=["pytest"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Runs a file on one worker, which compiles its fixtures once; reference cases fill up."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_parity.py" in nodeid else nodeid.split("::")[0]

    return ByFile(config, log)


def pytest_unconfigure() -> None:
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    ours = Path(cache).name.startswith("ldm_jax_xla_")
    if ours and "PYTEST_XDIST_WORKER" not in os.environ:  # a worker ends before the others
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Drops compiled programs after a file if the process has grown: workers stay under 3 GB."""
    yield
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    if pages * os.sysconf("SC_PAGE_SIZE") > 3 * 2**29:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def cheap_compiling() -> Iterator[None]:
    """No test may leave optimisation on: all later compilations would be slower."""
    yield
    assert jax.config.read("jax_disable_most_optimizations")


@pytest.fixture(autouse=True)
def own_log() -> None:
    """Restores the logger, which commands configure, so that caplog receives its records."""
    ours = logging.getLogger("ldm_jax")
    ours.handlers, ours.propagate, ours.disabled = [], True, False
    # Explicitly, because absl changes the root logger's level.
    ours.setLevel(logging.WARNING)


@pytest.fixture
def no_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the preview by a blank image: compiling one takes longer than the run."""
    blank = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(DiffusionTask, "preview", lambda *_: blank)


def worst(found, expected) -> float:
    """The largest error of any leaf relative to its largest magnitude; NaN where one has a NaN."""

    def apart(a, b) -> float:
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        same = a == b  # infinities too
        return float(
            np.abs(np.where(same, 0, a) - np.where(same, 0, b)).max() / (np.abs(b).max() + 1e-30)
        )

    return float(np.max(jax.tree.leaves(jax.tree.map(apart, found, expected))))


def random_params(shapes: Any, seed: int) -> Any:
    """Random nonzero parameters of these shapes, also for layers that are initialised to zero."""
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
    """A model directory of a few thousand parameters; tests that modify it make a copy."""
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
    """Returns the decoder's float32 output instead of 8-bit images."""

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
    """The tiny model on one device, with float32 images."""
    return load_exact(tiny_dir, devices=1)


@pytest.fixture(scope="session")
def compilations() -> list[str]:
    """A list that grows by one entry per compilation."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: (
            seen.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    return seen


# --------------------------------------------------------------------------------- programs


class Ran(NamedTuple):
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr, without the one that names the loaded model."""
        return [line for line in self.stderr.splitlines() if not line.startswith("loading ")]


def run_here(
    script: str, *argv: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Ran:
    """Runs a script in this process through its flags: faster than a new process."""
    import grain  # noqa: F401  (defines flags, which must stay defined)

    ours, before = logging.getLogger("ldm_jax"), set(flags.FLAGS)
    kept = ours.handlers, ours.propagate, ours.level
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    # One device: on eight, a batch of one would be padded to eight.
    monkeypatch.setattr(cores, "all_devices", lambda: jax.devices()[:1])
    # The allocator of the test process stays unchanged.
    monkeypatch.setattr(heap, "keep_large_blocks", lambda: False)
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
    """Starts a script in a new process on simulated devices."""
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
    """``script("sample.py", "--prompt=x", ...)`` runs the script and returns its `Ran`."""
    return partial(run_here, capfd=capfd, monkeypatch=monkeypatch)
