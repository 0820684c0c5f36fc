"""--config by name: "emoji:smoke" is the config in the package, unless there is such a file."""

import pytest

from ldm_jax.cli.config import CONFIGS, config_names, config_path, with_config_path

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("emoji", "{configs}/emoji.py"),
        ("emoji:smoke", "{configs}/emoji.py:smoke"),
        ("emoji.py:smoke", "{configs}/emoji.py:smoke"),
        ("configs/emoji.py:smoke", "{configs}/emoji.py:smoke"),
        ("configs/emoji", "{configs}/emoji.py"),
        ("elsewhere/emoji.py", "elsewhere/emoji.py"),
        ("emojii:smoke", "emojii:smoke"),
    ],
)
def test_a_name_is_a_file_of_the_package(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    assert config_path(name) == expected.format(configs=CONFIGS)


def test_a_file_has_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji.py").write_text("")
    assert config_path("emoji.py:x") == "emoji.py:x"
    assert config_path("emoji") == f"{CONFIGS}/emoji.py"


def test_the_command_line():
    emoji = f"--config={CONFIGS}/emoji.py"
    assert with_config_path(["x", "--config", "emoji", "--a=b"]) == ["x", emoji, "--a=b"]
    assert with_config_path(["x", "emoji", "--config.steps=3"], positional=1) == [
        "x",
        emoji,
        "--config.steps=3",
    ]
    assert with_config_path(["x", "--workdir=emoji"], positional=1) == ["x", "--workdir=emoji"]
    assert {"emoji", "sd_v1"} <= set(config_names())
    assert "common" not in config_names()
