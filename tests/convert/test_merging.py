"""Merges of models from the command line."""

import json

import numpy as np
import pytest
from originals import writer
from safetensors.numpy import load_file, save_file

from ldm_jax.cli.convert import main
from ldm_jax.convert.lora import pairs_of, split_strengths
from ldm_jax.convert.tables import flatten
from ldm_jax.errors import TargetError
from ldm_jax.io.checkpoint import load_model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", [1.0])),
        ("a.safetensors:0.6", ("a.safetensors", [0.6])),
        ("C:/x/a.pt", ("C:/x/a.pt", [1.0])),
        ("b.pt:-1", ("b.pt", [-1.0])),
        ("b.pt:0,0.5,1", ("b.pt", [0.0, 0.5, 1.0])),
    ],
)
def test_strengths_after_the_file(text, expected):
    assert split_strengths(text) == expected


def test_one_finite_strength_is_needed_where_there_is_no_sweep():
    assert pairs_of(["a.pt:0.5", ("b.pt:c", 2)]) == [("a.pt", 0.5), ("b.pt:c", 2.0)]
    with pytest.raises(TargetError, match="one strength"):
        pairs_of(["a.pt:0,1"])
    with pytest.raises(TargetError, match="finite"):
        pairs_of(["a.pt:nan"])


def test_means_and_differences_of_models(tmp_path, capsys):
    written = writer(tmp_path)
    a = load_file(written("kl"))
    paths = []
    for i, factor in enumerate((1.0, 2.0, 0.5)):
        paths.append(str(tmp_path / f"m{i}.safetensors"))
        save_file({n: x * np.float32(factor) for n, x in a.items()}, paths[-1])
    for out, models, weight, factor in (
        ("mean", paths[:2], "0.25", 1.25),
        ("difference", paths, "0.5", 1.75),
    ):
        target = str(tmp_path / out)
        assert main(["merge", *models, "--weights", weight, "--out", target]) == 0
        _, merged = load_model(target)
        single = tmp_path / f"single {out}"
        assert main([paths[0], "--out", str(single)]) == 0
        _, params = load_model(single)
        for path, leaf in flatten(params).items():
            np.testing.assert_allclose(flatten(merged)[path], factor * leaf, rtol=1e-5)
        assert json.loads((tmp_path / out / "merge.json").read_text())["weight"] == float(weight)
    capsys.readouterr()
    other = str(written("vqgan"))
    assert main(["merge", paths[0], other, "--out", str(tmp_path / "no")]) == 2
    assert "another kind of model" in capsys.readouterr().err
    assert main(["merge", paths[0], "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()
