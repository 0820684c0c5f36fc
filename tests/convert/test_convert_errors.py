"""Conversion: one-line errors."""

import numpy as np
import pytest
from originals import MODELS, Written, stderr_lines, writer
from safetensors.numpy import load_file, save_file

import ldm_jax
from ldm_jax.cli.convert import main
from ldm_jax.convert.compvis.infer import Original
from ldm_jax.convert.compvis.original import config_of, read_yaml
from ldm_jax.convert.compvis.whole import whole_from_config
from ldm_jax.convert.compvis.writing import to_compvis
from ldm_jax.errors import CheckpointError, TargetError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return writer(tmp_path_factory.mktemp("originals"))


def test_everything_that_does_not_fit_is_listed(written, tmp_path, capsys):
    arrays = load_file(written("class"))
    gone, bad = "model.diffusion_model.out.2.bias", "cond_stage_model.embedding.weight"
    arrays["surplus"] = arrays.pop(gone)
    arrays[bad] = arrays[bad][:, :-1].copy()
    arrays["betas"] = arrays["betas"] * 2
    save_file(arrays, tmp_path / "x.safetensors")
    yaml_file = written("class").with_suffix(".yaml")
    assert (
        main(
            [
                str(tmp_path / "x.safetensors"),
                "--out",
                str(tmp_path / "m"),
                "--config",
                str(yaml_file),
            ]
        )
        == 2
    )
    text = capsys.readouterr().err
    for part in (
        f"missing (1):\n    {gone}",
        "unexpected (1):\n    surplus",
        f"{bad}: found (5, 11)",
        "    betas",
    ):
        assert part in text
    assert not (tmp_path / "m").exists()
    with pytest.raises(CheckpointError, match="surplus"):
        ldm_jax.load(tmp_path / "x.safetensors", config=yaml_file)


UNET_ROW, STAGE_ROW = (
    "model.diffusion_model.output_blocks.3.0.",
    "first_stage_model.encoder.down.1.block.0.",
)


@pytest.mark.parametrize(
    ("old", "new", "shape"),
    [
        # A count that a loop would never reach.
        (UNET_ROW, UNET_ROW.replace("3", "3" * 30), None),
        (STAGE_ROW, STAGE_ROW.replace("1", "9" * 12), None),
        ("model.diffusion_model.input_blocks.0.0.weight", None, ()),
        ("model.diffusion_model.input_blocks.0.0.weight", None, (0, 4, 3, 3)),
        ("model.diffusion_model.input_blocks.0.0.weight", None, (31, 4, 3, 3)),
        ("first_stage_model.encoder.conv_in.weight", None, (0, 0)),
        ("first_stage_model.decoder.conv_in.weight", None, (5,)),
        ("betas", None, ()),
        ("betas", None, (0,)),
    ],
)
def test_names_and_shapes_of_nothing_are_refused(written, tmp_path, capsys, old, new, shape):
    arrays = load_file(written("class"))
    renamed = {name.replace(old, new) if new else name: a for name, a in arrays.items()}
    if shape is not None:
        renamed[old] = np.zeros(shape, np.float32)
    save_file(renamed, tmp_path / "x.safetensors")
    assert main([str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "m")]) == 2
    assert stderr_lines(capsys)[0].startswith("error: ")
    assert not (tmp_path / "m").exists()
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0


def test_nothing_is_written_over(written, tmp_path, capsys):
    source, out = str(written("kl")), tmp_path / "model"
    assert main([source, "--out", str(out)]) == 0
    back = tmp_path / "back.safetensors"
    back.write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    report = ["--report", str(back)]
    for argv in (
        [source, "--out", str(out)],
        [source, "--out", str(tmp_path / "new"), *report],
        ["export", str(out), "--to", "compvis", "--out", str(back)],
    ):
        capsys.readouterr()
        assert main(argv) == 2
        (line,) = stderr_lines(capsys)
        assert "give a new" in line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is no YAML"),
        ("lr: 1", "describes no model"),
        ("model: {target: a.B, params: {x: '${y.z}'}}", r"refers to ${y.z}"),
        ("model: {target: no.such.Class}", "no.such.Class is not supported"),
        (
            "model: {target: ldm.models.autoencoder.AutoencoderKL}",
            "AutoencoderKL cannot be built: KeyError",
        ),
        (
            "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {unet_config: 3}}",
            "cannot be built",
        ),
        (None, "cannot be read: No such file"),
    ],
)
def test_an_empty_yaml_is_a_one_line_error(written, tmp_path, capsys, text, message):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    assert main([str(written("kl")), "--out", str(tmp_path / "m"), "--config", str(file)]) == 2
    (line,) = stderr_lines(capsys)
    assert message in line


@pytest.mark.fast
def test_numbers_in_yaml_are_numbers(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "target: a.B\nparams: {a: 1e-4, b: [2E3, text, 1.5e-06], c: 1}"
    )
    assert read_yaml(tmp_path / "x.yaml") == (
        "a.B",
        {"a": 1e-4, "b": [2e3, "text", 1.5e-06], "c": 1},
        (),
    )


@pytest.mark.fast
def test_files_of_no_known_family_are_one_line(tmp_path, capsys):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    assert main([str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "m")]) == 2
    assert "neither a latent diffusion model nor a first stage" in stderr_lines(capsys)[0]
    assert main([str(tmp_path / "missing"), "--out", str(tmp_path / "m")]) == 2
    assert "no such file" in stderr_lines(capsys)[0]
    assert main([str(tmp_path / "x.safetensors")]) == 2  # argparse requires --out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "v"}, "cannot hold a model that predicts v"),
        ({"unet": {"norm_groups": 8}}, "norm_groups"),
        ({"schedule": {"zero_terminal_snr": True}}, "zero terminal SNR"),
    ],
)
def test_options_the_original_lacks_are_named(tmp_path, change, message):
    target, params = MODELS["class"]
    config = config_of(Original(target, params), whole_from_config(target, params).modules)
    for section, value in change.items():
        config[section] = {**config[section], **value} if isinstance(value, dict) else value
    with pytest.raises(TargetError, match=message):
        to_compvis(config, {}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
