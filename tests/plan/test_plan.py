"""Plans: sizes and arithmetic against counts by hand, compiled texts, errors."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import SMALL, SMALL_KL
from ml_collections import ConfigDict

from ldm_jax.configs import kl_f8, sd_v1, txt2img_1p4b
from ldm_jax.configs.common import base
from ldm_jax.distributed.chips import CHIPS, chip_of
from ldm_jax.distributed.flops import count_flops, peak_bytes
from ldm_jax.errors import ConfigError, PlanError
from ldm_jax.kernels.cpu import chunked
from ldm_jax.kernels.gpu import cudnn
from ldm_jax.kernels.reference import attention as plain
from ldm_jax.kernels.tpu import splash
from ldm_jax.plan import chips
from ldm_jax.plan.chips import GIB, find_devices, parse_topology
from ldm_jax.plan.hlo import collectives, parse
from ldm_jax.plan.planner import largest_batch, plan
from ldm_jax.plan.programs import Compiled, Step, out_of_memory
from ldm_jax.plan.report import as_dict, as_row, as_text
from ldm_jax.plan.roofline import LAUNCH_SECONDS
from ldm_jax.plan.roofline import kernels as kernels_of
from ldm_jax.train.tasks import TASKS

# SMALL_KL: seven residual blocks of two 3x3 convolutions 32 -> 32, and convolutions 3 -> 32,
# 32 -> 8, 4 -> 32, 32 -> 3.
KERNELS = 9 * (14 * 32 * 32 + 3 * 32 + 32 * 8 + 4 * 32 + 32 * 3)
BIASES = 14 * 32 + 32 + 8 + 32 + 3
NORMS, DENSE = (14 + 2) * 2 * 32, (8 * 8 + 8) + (4 * 4 + 4)
PARAMETERS = KERNELS + BIASES + NORMS + DENSE
PIXELS = 8 * 8


@pytest.fixture
def first_stage():
    config = base("autoencoder")
    config.update(batch_size=16)
    config.data.update(path="nowhere", size=(8, 8))
    config.model.first_stage = ConfigDict(SMALL_KL)
    return config


@pytest.fixture
def diffusion():
    config = base("diffusion")
    config.update(batch_size=16)
    config.data.update(path="nowhere", size=(8, 8))
    for section in ("objective", "schedule", "conditioner", "unet"):
        config.model[section] = (
            ConfigDict(SMALL[section]) if isinstance(SMALL[section], dict) else SMALL[section]
        )
    config.model.first_stage = ConfigDict({**SMALL_KL, "path": "does/not/exist"})
    return config


def test_first_stage_agrees_with_counts_by_hand(first_stage):
    made = plan(first_stage, parse_topology("cpu:8"), compile=False)
    assert made.parameters == {"first_stage": PARAMETERS}
    assert (
        made.bytes["parameters"]
        == made.bytes["average"]
        == made.bytes["gradients"]
        == 4 * PARAMETERS
    )
    assert 0 <= made.bytes["optimiser"] - 8 * PARAMETERS <= 16  # counters
    assert made.bytes["batch"] == 2 * (PIXELS * 3 + 4)
    # Forwards, and backwards to every kernel and to every input but the picture.
    forward, first = 2 * KERNELS * PIXELS, 2 * 9 * 3 * 32 * PIXELS
    assert made.flops["convolution"] == 16 * (3 * forward - first)
    assert made.flops["product"] == 16 * 3 * 2 * (8 * 8 + 4 * 4) * PIXELS
    assert made.flops["attention"] == 0
    assert made.useful == made.flops["convolution"] + made.flops["product"]
    assert made.compiled is None
    assert made.utilisation(True) is None


def test_rematerialised_products_are_not_useful(first_stage):
    kept = plan(first_stage, parse_topology("cpu:8"), compile=False)
    first_stage.remat = "blocks"
    again = plan(first_stage, parse_topology("cpu:8"), compile=False)
    assert again.useful == kept.useful
    # The first convolution of each of the seven blocks once more; the second is not needed.
    assert (
        again.flops["convolution"] - kept.flops["convolution"] == 16 * 2 * 9 * 7 * 32 * 32 * PIXELS
    )
    assert again.per_picture < kept.per_picture


def test_dead_code_is_not_counted(first_stage):
    """d_weight needs the last layer's gradient alone of two more pull-backs through the decoder."""
    alone = plan(first_stage, parse_topology("cpu"), compile=False).flops["convolution"]
    first_stage.adversary.update(weight=0.5, start=1, layers=1, channels=1)
    assert (
        alone
        < plan(first_stage, parse_topology("cpu"), compile=False).flops["convolution"]
        < 1.2 * alone
    )


def test_memory_options_reach_the_state(first_stage):
    first_stage.optim.mu_dtype = "bfloat16"
    made = plan(first_stage, parse_topology("cpu:8"), compile=False)
    assert 0 <= made.bytes["optimiser"] - 6 * PARAMETERS <= 16
    first_stage.optim.update(kind="adafactor", b1=0.0)
    assert (
        plan(first_stage, parse_topology("cpu:8"), compile=False).bytes["optimiser"]
        < 6 * PARAMETERS
    )


def test_fsdp_divides_the_state_and_gathers_it(first_stage):
    first_stage.mesh.update(data=1, fsdp=8)
    made = plan(first_stage, parse_topology("cpu:8"))
    # Replicated: too small to shard, or indivisible.
    small = BIASES + NORMS + DENSE + 9 * (3 * 32 + 32 * 3)
    assert made.bytes["parameters"] <= 4 * ((PARAMETERS - small) / 8 + small)
    assert made.compiled is not None
    assert made.compiled.needed > made.bytes["parameters"] + made.bytes["optimiser"]
    gathered = sum(c.times * c.size for c in made.compiled.collectives if c.kind == "all-gather")
    assert gathered >= 4 * 9 * 14 * 32 * 32  # every split kernel at least once
    assert all(c.group == 8 for c in made.compiled.collectives if c.kind == "all-gather")
    shown = as_text(made)
    assert "all-gather" in shown
    assert "the memory of a CPU is not known" in shown.splitlines()[-1]


def test_zero1_splits_the_optimiser_over_fsdp_if_the_mesh_has_it(first_stage):
    first_stage.mesh.zero1 = True
    over_data = plan(first_stage, parse_topology("v5e:4x2"), compile=False)
    first_stage.mesh.fsdp = 8
    over_fsdp = plan(first_stage, parse_topology("v5e:8x8"), per_chip=1, compile=False)
    assert over_data.bytes["optimiser"] == over_fsdp.bytes["optimiser"] < PARAMETERS * 8 / 6
    assert over_data.bytes["parameters"] == over_fsdp.bytes["parameters"] == 4 * PARAMETERS


def test_cached_latents_need_no_file_and_no_encoder(diffusion):
    pictures = plan(diffusion, parse_topology("v5e:4x2"), compile=False)
    cached = plan(diffusion, parse_topology("v5e:4x2"), compile=False, cached=True)
    assert pictures.parameters == cached.parameters
    assert cached.parameters["first_stage (frozen)"] == PARAMETERS
    encoder = 2 * 9 * (6 * 32 * 32 + 3 * 32 + 32 * 8) * PIXELS
    assert pictures.flops["convolution"] - cached.flops["convolution"] == 16 * encoder
    assert cached.largest is not None
    assert cached.largest > 100
    figures = json.loads(json.dumps(as_dict(cached)))
    assert figures["verdict"].startswith("fits by the analytic bound")
    assert figures["per_chip"] == 2
    assert as_row(cached).count("|") == 12


def test_forward_takes_whole_weights_in_the_dtype_of_products(diffusion):
    diffusion.mesh.update(data=1, fsdp=8)  # of the training
    made = plan(diffusion, parse_topology("cpu:8"), what="forward", per_chip=2)
    trained = plan(diffusion, parse_topology("cpu:8"), per_chip=2, compile=False, cached=True)
    assert made.parameters == {"unet": trained.parameters["unet"]}
    assert made.bytes["parameters"] == 4 * made.parameters["unet"]
    # The backward pass costs twice the forward pass; the text encoder adds to both.
    assert 2 < trained.useful / made.useful < 4
    assert made.compiled is not None
    assert made.compiled.collectives == []
    assert made.batch == 16
    diffusion.dtype = "bfloat16"
    half = plan(diffusion, parse_topology("cpu:8"), what="forward", compile=False)
    assert half.bytes["parameters"] == 2 * made.parameters["unet"]
    assert half.rows == 1
    assert "a call of the UNet" in as_row(half)
    assert "a call of the UNet" in as_text(half)


def test_an_accelerator_decodes_one_large_picture_after_the_other(diffusion):
    diffusion.data.size = (512, 512)
    pixels = 4 * 3 * 512**2  # floats of one picture; the widest layer has 32 channels instead of 3
    chip = parse_topology("v5e:1x1")
    one, eight = (plan(diffusion, chip, what="decode", per_chip=n, compile=False) for n in (1, 8))
    assert one.parameters == eight.parameters == {"first_stage": PARAMETERS}
    assert eight.useful == 8 * one.useful
    grown = eight.bytes["activations"] - one.bytes["activations"]
    assert 7 * pixels <= grown <= 7 * 3 * pixels  # finished pictures stay, and become uint8
    assert eight.bytes["batch"] == 8 * one.bytes["batch"] > 0


def test_a_frozen_conditioner_is_not_trained(diffusion):
    trained = Step(
        diffusion, jax.sharding.AbstractMesh((8, 1, 1), ("data", "fsdp", "tensor")), False, True
    )
    diffusion.model.conditioner.frozen = True
    frozen = Step(diffusion, trained.mesh, False, True)
    assert frozen.parameters()["conditioner (frozen)"] == trained.parameters()["conditioner"]
    assert set(frozen.state.params) == {"unet"}
    assert (
        count_flops(frozen.trace(1, ""))["product"] < count_flops(trained.trace(1, ""))["product"]
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (kl_f8, {"": 83_653_863}),
        (sd_v1, {"unet": 859_520_964}),
        # The original's transformer has a projection to the vocabulary that it never uses.
        (txt2img_1p4b, {"unet": 872_300_484, "conditioner": 581_994_042 - 1281 * 30522}),
    ],
    ids=["kl_f8", "sd_v1", "txt2img_1p4b"],
)
def test_the_large_configs_are_the_released_architectures(config, expected):
    config = config.get_config()
    params = jax.eval_shape(
        TASKS[config.task].from_config(config, weights=False).init, jax.random.key(0)
    )
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()
    }
    assert (sizes if config.task == "diffusion" else {"": sum(sizes.values())}) == expected


# ---- counting


def test_arithmetic_is_counted_by_kind():
    def f(x, w, k):
        y = jnp.einsum("bnc,cd->bnd", x, w)
        a = jnp.einsum("bnd,bmd->bnm", y, y)
        c = jax.lax.conv_general_dilated(
            x[None], k, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.lax.fori_loop(0, 5, lambda _, b: b @ b, a[0]).sum() + c.sum()

    x, w, k = jnp.ones((4, 4, 3)), jnp.ones((3, 7)), jnp.ones((3, 3, 3, 5))
    counted = count_flops(jax.make_jaxpr(f)(x, w, k).jaxpr)
    assert counted["product"] == 2 * 16 * 3 * 7 + 5 * 2 * 4**3
    assert counted["attention"] == 2 * 4 * 4 * 4 * 7
    forward = 2 * 2 * 2 * 5 * 9 * 3
    assert counted["convolution"] == forward
    backward = count_flops(jax.make_jaxpr(jax.grad(f, (0, 2)))(x, w, k).jaxpr)
    # The primal of a sum may be dead code.
    assert backward["convolution"] in (2 * forward, 3 * forward)
    assert counted["other"] > 0


def test_flops_of_kernels():
    """Two products in the forward pass, four in the backward pass and the first again."""

    def arithmetic(form, given):
        jaxpr = jax.make_jaxpr(jax.grad(lambda *qkv: form(*qkv, 0.2).sum(), (0, 1, 2)))(
            *given
        ).jaxpr
        return count_flops(jaxpr)

    given = [jax.ShapeDtypeStruct((2, n, 3, 40), jnp.float32) for n in (256, 384, 384)]
    once = 2 * 2 * 3 * 256 * 384
    assert arithmetic(plain, given)["attention"] == 6 * once * 40
    # Per-head products have no batch dimensions.
    assert arithmetic(chunked, given)["attention"] == 0
    assert arithmetic(chunked, given)["product"] == 7 * once * 40
    kernel = arithmetic(splash, given)
    # Plus the product of the output and its gradient.
    assert kernel["attention"] == 7 * once * 40 + 2 * 2 * 3 * 256 * 40
    # A head of 40 channels costs the matrix unit as much as one of 128.
    assert kernel["padded"] == 7 * once * 128


def test_flops_of_cudnn_attention(monkeypatch):
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    q = jax.ShapeDtypeStruct((2, 256, 3, 40), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: cudnn(q, q, q, 0.2).astype(jnp.float32).sum()))(
        q
    ).jaxpr
    assert count_flops(jaxpr)["attention"] == 7 * 2 * 2 * 3 * 256**2 * 40


def test_peak_bytes_counts_live_buffers():
    def f(x):
        a = x + 1
        b = a * 2  # a and b are alive, and then b alone
        return b.sum()

    n = 1000
    assert peak_bytes(jax.make_jaxpr(f)(jnp.ones(n)).jaxpr) == 2 * 4 * n
    kept = jax.make_jaxpr(jax.grad(lambda x: jnp.sin(jnp.sin(jnp.sin(x))).sum()))(jnp.ones(n)).jaxpr
    assert peak_bytes(kept) >= 4 * 4 * n


def parse_file(name):
    return parse((Path(__file__).parent / name).read_text())


@pytest.mark.fast
def test_collectives_of_a_compiled_text():
    found = {
        (c.kind, c.size, c.group, c.times) for c in collectives(parse_file("collectives.hlo"), 16)
    }
    assert found == {
        ("all-gather", 2 * 128 * 128, 16, 3),
        ("collective-permute", 2 * 8 * 128, 16, 3),
        ("all-reduce", 4 * 11, 4, 1),
        ("all-gather", 4 * 32 * 4, 16, 1),
        ("all-gather", 2 * 5, 8, 1),
        ("all-reduce", 2 * 7, 2, 1),
        ("reduce-scatter", 4 * 64 * 128, 16, 1),
        ("reduce-scatter", 4 * 64 * 8 + 2 * 32, 16, 1),
        ("reduce-scatter", 4 * 4 * 128 * 8, 8, 1),
    }
    reduced = next(
        c for c in collectives(parse_file("collectives.hlo"), 16) if c.name == "all-reduce.1"
    )
    assert reduced.sent == 2 * 44 * 3 / 4


@pytest.mark.fast
def test_kernels_of_a_gpu_text():
    chip = chips.CHIPS["h200"]
    found = {k.name: k for k in kernels_of(parse_file("gpu.hlo"), chip)}
    x, w = 2 * 64 * 64 * 64, 9 * 64 * 128
    conv = 2 * 2 * x * 9 * 64
    assert {name: (k.kind, k.times, k.flops) for name, k in found.items()} == {
        "row": ("elementwise", 50, 0),
        "updated": ("elementwise", 50, 0),
        "less": ("compare", 50, 0),
        "filter": ("transpose", 1, 0),
        "wide": ("elementwise", 1, 0),
        "conv": ("convolution", 1, conv),
        "dfilter": ("convolution", 1, conv),
        "dx": ("convolution", 1, conv),
        "dense": ("product", 1, 2 * x * 64),
        "attention": ("attention", 1, 2 * 2 * 2 * 8 * 4096**2 * 8),
    }
    # Of a table that a loop reads and writes row by row, only the row counts.
    assert found["row"].nbytes == 4 * (2 * 1024 + 1)
    assert found["updated"].nbytes == 4 * (2 * 1024 + 1)
    assert found["filter"].nbytes == 2 * 2 * w
    assert found["conv"].nbytes == 2 * (x + w + 2 * x)
    assert {name: k.widened for name, k in found.items() if k.widened} == {"wide": 4 * x}
    assert found["wide"].seconds == 6 * x / chip.bandwidth + LAUNCH_SECONDS
    assert found["conv"].seconds == conv / chip.peak + LAUNCH_SECONDS
    assert found["conv"].source == "UNet/conv"


@pytest.mark.compile
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs ldm_jax[cuda]"
)
def test_a_gpu_program_is_planned_without_a_gpu(diffusion):
    diffusion.dtype = "bfloat16"
    diffusion.data.size = (64, 64)
    made = plan(diffusion, parse_topology("h200:2"), what="forward", per_chip=2)
    assert made.compiled is not None
    launched = made.compiled.kernels
    assert made.compiled.seconds == pytest.approx(sum(k.total for k in launched))
    # Padding aside, the kernels do the arithmetic that the jaxpr has.
    counted = sum(k.times * k.flops for k in launched)
    assert 0.9 * made.useful / 2 < counted < 1.5 * made.useful / 2
    # No filter is laid out again, and no activation is written in float32.
    assert not [k.source for k in launched if k.kind == "transpose" or k.widened]
    shown = as_text(made)
    assert "a roofline of each kernel, not measured" in shown
    assert "float32 copies" in shown


@pytest.mark.parametrize(("start", "limit"), [(4, 11), (16, 11), (1, 3), (1, 0)])
def test_the_largest_batch_is_found_in_four_compilations(start, limit):
    runs = []

    def run(n):
        runs.append(n)
        return Compiled(fits=n <= limit, needed=5 + n)

    assert largest_batch(run, 5 + limit + 0.5, start) == limit
    assert len(runs) == len(set(runs)) <= 4


# ---- errors


@pytest.mark.fast
@pytest.mark.parametrize("text", ["", "v5e", "v5e:4x", "v5e:0x4", "tpu:8", "cpu:x"])
def test_malformed_topologies_are_refused(text):
    with pytest.raises(PlanError, match=r"write KIND:SHAPE, for example v5e:4x4"):
        parse_topology(text)


@pytest.mark.fast
def test_topologies():
    assert parse_topology("cpu").size == 1
    assert parse_topology("v5p:8x8x16").size == 1024
    assert parse_topology("h200:8").chip == chips.CHIPS["h200"]


@pytest.mark.fast
def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    assert find_devices(parse_topology("v5e:4x4")) == (
        None,
        'the TPU compiler is not installed: pip install "ldm_jax[tpu]" (no TPU is needed)',
    )
    assert find_devices(parse_topology("h200:8")) == (
        None,
        'the CUDA compiler is not installed: pip install "ldm_jax[cuda]" (no GPU is needed)',
    )


def test_mistakes_end_in_one_line(first_stage, diffusion):
    cpu = parse_topology("cpu:8")
    with pytest.raises(ConfigError, match="trains on pictures"):
        plan(first_stage, cpu, cached=True)
    with pytest.raises(ConfigError, match="only a diffusion stage samples"):
        plan(first_stage, cpu, what="forward")
    with pytest.raises(PlanError, match=r"--what 'encode' does not exist; did you mean 'decode'\?"):
        plan(first_stage, cpu, what="encode")
    del diffusion.model.first_stage["kind"]
    with pytest.raises(ConfigError, match=r"give the architecture in model\.first_stage"):
        plan(diffusion, cpu)
    first_stage.batch_size = 12
    with pytest.raises(ConfigError, match="must be a multiple of 8"):
        plan(first_stage, cpu)
    with pytest.raises(PlanError, match="the compiler failed: INTERNAL: no"):
        out_of_memory("INTERNAL: no\nmore")
    assert (
        out_of_memory(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.5G of 15.75G hbm."
        )
        == 21.5 * GIB
    )


def test_the_command(script, tmp_path):
    file = tmp_path / "plan.json"
    ran = script(
        "ldm_jax/plan/__main__.py",
        "configs/emoji_kl.py:smoke",
        "--topology=h200:8",
        "--nocompile",
        f"--json={file}",
    )
    assert ran.status == 0, ran.stderr
    assert "verdict        fits by the analytic bound" in ran.stdout
    assert json.loads(file.read_text())["config"] == "emoji_kl:smoke"
    ran = script("ldm_jax/plan/__main__.py", "configs/emoji_kl.py:smoke", "--topology=v9:8")
    assert (ran.status, len(ran.lines)) == (2, 1)
    assert "write KIND:SHAPE" in ran.stderr


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    assert chip_of(kind) == (name and CHIPS[name])
