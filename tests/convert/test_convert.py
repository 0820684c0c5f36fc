"""Conversion of whole checkpoints: no array lost, no silent assumption, bit-exact round trips."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from originals import MODELS, Written, stderr_lines, writer
from safetensors.numpy import load_file, save_file

from ldm_jax.cli.convert import main
from ldm_jax.convert.compvis.infer import infer
from ldm_jax.convert.compvis.names import EMA
from ldm_jax.convert.compvis.original import config_of, read_yaml
from ldm_jax.convert.compvis.schedules import schedule_params
from ldm_jax.convert.compvis.whole import BUFFERS, whole_from_config
from ldm_jax.convert.conversion import read_model
from ldm_jax.convert.converted import sha256
from ldm_jax.convert.verify import outputs_of
from ldm_jax.diffusion.schedule import make_betas
from ldm_jax.errors import TargetError
from ldm_jax.io.checkpoint import load_model, read_config

# -------------------------------------------------------------------------------------- round trips


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return writer(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize(
    ("name", "dtype", "with_yaml"),
    [
        ("text", np.float16, True),
        ("class", np.float32, False),
        ("clip inpainting", np.float16, False),
        ("rescale", np.float32, True),
        ("held twice", np.float32, False),
        ("small picture", np.float16, False),
        ("unconditional", np.float16, False),
        ("ready-made", np.float32, False),
        ("kl", np.float32, False),
        ("vqgan", np.float16, True),
        ("gumbel", np.float32, False),
    ],
)
def test_there_and_back_is_the_same_to_the_bit(written, tmp_path, name, dtype, with_yaml):
    source, out, back = written(name, dtype), tmp_path / "model", tmp_path / "back.safetensors"
    config = ["--config", str(source.with_suffix(".yaml"))] if with_yaml else []
    assert main([str(source), "--out", str(out), *config]) == 0
    assert main(["export", str(out), "--to", "compvis", "--out", str(back)]) == 0

    theirs, ours = load_file(source), load_file(back)
    assert ours.keys() == theirs.keys()  # so that the original loads it strictly
    report = json.loads((out / "conversion.json").read_text())
    kept = {entry["source"]: entry for entry in report["entries"]}
    left = {entry["source"]: entry["why"] for entry in report["left_out"]}
    assert kept.keys() | left.keys() == theirs.keys()
    assert not kept.keys() & left.keys()
    for source_name, a in theirs.items():
        b = ours[source_name]
        assert b.shape == a.shape
        if source_name in kept:
            entry = kept[source_name]
            assert (entry["shape"], entry["dtype"]) == (list(a.shape), a.dtype.name)
            assert sha256(b) == sha256(a) == entry["sha256"], source_name
        else:
            assert np.allclose(a.astype(np.float64), b, rtol=2e-3, atol=1e-6), source_name
            known = (*BUFFERS.split(), "scale_factor")
            assert (
                source_name in known
                or source_name.startswith("cond_stage_model.")
                or "position_ids" in source_name
            )
    # What the YAML that comes with it describes is again the same model.
    again = read_yaml(back.with_suffix(".yaml"))
    whole = whole_from_config(again.target, again.params)
    config = read_config(out)
    del config["format"]
    assert config_of(again, whole.modules, config.get("scale_factor")) == config


def without_size(section: Any) -> Any:
    """A file does not contain the resolution of its feature maps."""
    return (
        {k: without_size(v) for k, v in section.items() if k != "size"}
        if isinstance(section, dict)
        else section
    )


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_determine_the_yaml_configuration(written, name):
    arrays, (target, params) = load_file(written(name)), MODELS[name]
    found, given = infer(arrays), read_yaml(written(name).with_suffix(".yaml"))
    options = {"buffers": False} if "unet_config" in params else {}
    whole, known = (
        whole_from_config(o.target, o.params, losses=False, **options) for o in (found, given)
    )
    assert whole.modules == known.modules
    assert sorted(e.source for e in whole.table) == sorted(e.source for e in known.table)
    ours, theirs = config_of(found, whole.modules, 1.0), config_of(given, known.modules, 1.0)
    for section in ("unet", "first_stage", "conditioner", "objective", "kind"):
        assert without_size(ours.get(section)) == without_size(theirs.get(section))
    if "unet_config" in params:
        assert found.target == target
        schedule = {
            "beta_schedule": "linear",
            **{n: params[n] for n in ("timesteps", "linear_start", "linear_end")},
        }
        assert ours["schedule"] == schedule
        assumed = " ".join(found.assumed)
        assert all(word in assumed for word in ("num_head_channels 32", "eps", "size"))
        assert ("scale_factor" in assumed) == ("scale_by_std" not in params)


def test_averages_are_converted_unless_raw_weights_are_requested(written, tmp_path, capsys):
    source = written("class", ema=True)
    arrays = load_file(source)
    raw, average = "model.diffusion_model.out.2.bias", "model_ema.diffusion_modelout2bias"
    for flag, taken in (([], average), (["--no-ema"], raw)):
        out = tmp_path / f"model{len(flag)}"
        assert main([str(source), "--out", str(out), *flag]) == 0
        report = json.loads((out / "conversion.json").read_text())
        (entry,) = (e for e in report["entries"] if e["path"] == "unet/out_conv/bias")
        assert (entry["source"], entry["sha256"]) == (taken, sha256(arrays[taken]))
        (other,) = (e for e in report["left_out"] if e["source"] in {raw, average} - {taken})
        assert "average" in other["why"]
        shadows = {n for n in arrays if n.startswith(EMA)} - {f"{EMA}decay", f"{EMA}num_updates"}
        assert {e["source"] for e in report["entries"]} & shadows == (
            shadows if taken == average else set()
        )
    assert "averaged" in capsys.readouterr().out
    assert main([str(written("class")), "--out", str(tmp_path / "none"), "--ema"]) == 2
    assert stderr_lines(capsys) == [
        f"error: {written('class').name} holds no averages of its weights; leave --ema out"
    ]


def test_arrays_outside_the_model_are_left_out_by_name(written, tmp_path):
    arrays = load_file(written("class"))
    beside = {"model_ema.decay", "model_ema.num_updates", "safety_checker.visual_projection.weight"}
    save_file(
        arrays | {name: np.zeros(2, np.float32) for name in beside}, tmp_path / "x.safetensors"
    )
    converted = read_model(tmp_path)  # a folder that holds nothing else
    assert beside <= {entry["source"] for entry in converted.left_out}
    assert not beside & {entry["source"] for entry in converted.entries}
    assert converted.about["ema"] is False


def test_dtype_casts_the_parameters(written, tmp_path):
    out = tmp_path / "model"
    assert (
        main(
            [
                str(written("kl")),
                "--out",
                str(out),
                "--dtype",
                "bfloat16",
                "--report",
                str(tmp_path / "r.json"),
            ]
        )
        == 0
    )
    _, params = load_model(out)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert json.loads((tmp_path / "r.json").read_text())["dtype"] == "bfloat16"
    assert not (out / "conversion.json").exists()


# ---------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "params",
    [
        {
            "beta_schedule": "linear",
            "timesteps": 1000,
            "linear_start": 0.00085,
            "linear_end": 0.012,
        },
        {"beta_schedule": "linear", "timesteps": 50, "linear_start": 0.0015, "linear_end": 0.0195},
        {
            "beta_schedule": "sqrt_linear",
            "timesteps": 1000,
            "linear_start": 0.0001,
            "linear_end": 0.02,
        },
        {"beta_schedule": "sqrt", "timesteps": 100, "linear_start": 0.0001, "linear_end": 0.02},
        {"beta_schedule": "cosine", "timesteps": 100},
    ],
    ids=lambda params: f"{params['beta_schedule']}{params['timesteps']}",
)
def test_schedules_are_recognised_by_their_betas(params, dtype):
    betas = make_betas(
        **{"kind" if name == "beta_schedule" else name: value for name, value in params.items()}
    )
    found, assumed = schedule_params({"betas": betas.astype(dtype)})
    assert assumed == []
    if params["beta_schedule"] != "sqrt" or dtype == np.float32:
        assert found == params
    assert found["beta_schedule"] == params["beta_schedule"]
    if dtype == np.float32 and params["beta_schedule"] == "linear":
        assert schedule_params({"alphas_cumprod": np.cumprod(1 - betas).astype(dtype)}) == (
            params,
            [],
        )


def test_other_schedules_are_an_error_and_none_is_an_assumption():
    with pytest.raises(TargetError, match="no known schedule; give the original's YAML"):
        schedule_params({"betas": np.linspace(0.1, 0.3, 20, dtype=np.float32) ** 3})
    found, (line,) = schedule_params({})
    assert found["timesteps"] == 1000
    assert "none in the file" in line


# ------------------------------------------------------------------------------------------- verify


def test_verify_prints_the_error_of_a_recorded_case(written, tmp_path, capsys):
    converted = read_model(written("kl"))
    rng = np.random.default_rng(1)
    given = {
        "x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32),
        "z": rng.normal(size=(1, 4, 8, 8)).astype(np.float32),
    }
    found = {
        name: np.asarray(a)
        for name, a in outputs_of(converted.config, converted.params, given).items()
    }
    assert set(found) == {"mean", "logvar", "decode_z"}
    found["mean"] = found["mean"] + np.float32(0.5)
    arrays = {f"in/{n}": a for n, a in given.items()} | {
        f"out/{n}": np.ascontiguousarray(a) for n, a in found.items()
    }
    save_file(arrays, tmp_path / "case.safetensors")
    spec = {"atol": dict.fromkeys(found, 0.1), "rtol": 0.0}
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": {"case": spec}}))
    case = str(tmp_path / "case.safetensors")
    assert main([str(written("kl")), "--out", str(tmp_path / "m"), "--verify", case]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verified")]
    assert len(lines) == 3
    assert any("mean: error 0.5, 5 of what is allowed" in line for line in lines)
    assert any("decode_z: error 0, 0 of" in line for line in lines)
