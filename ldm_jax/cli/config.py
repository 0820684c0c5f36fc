"""The ``--config`` flag: a config file, or the name of a config in the package."""

from pathlib import Path

from ml_collections import config_flags

CONFIGS = Path(__file__).parent.parent / "configs"


def define_config_flag() -> None:
    """Defines ``--config`` and ``--config.FIELD``."""
    text = "A config file, or a name in ldm_jax/configs; emoji:smoke is a short run of emoji."
    config_flags.DEFINE_config_file("config", None, text, lock_config=True)


def config_names() -> list[str]:
    """Returns the names of the configs in the package; other modules there are their parts."""
    files = sorted(CONFIGS.glob("*.py"))
    return [file.stem for file in files if "\ndef get_config(" in file.read_text("utf-8")]


def config_path(name: str) -> str:
    """Returns the file, with its variant, of a config.

    Args:
      name: "emoji", "emoji:smoke", "emoji.py:smoke", "configs/emoji.py", or the path of a file,
        which has precedence.
    """
    stem, _, variant = name.partition(":")
    file = Path(stem)
    packaged = CONFIGS / f"{file.stem}.py"
    named = str(file.parent) in (".", "configs") and file.suffix in ("", ".py")
    if (file.suffix == ".py" and file.is_file()) or not named or not packaged.is_file():
        return name
    return f"{packaged}:{variant}" if variant else str(packaged)


def with_config_path(argv: list[str], positional: int | None = None) -> list[str]:
    """Returns a command line whose ``--config`` is a file.

    Args:
      argv: The command line.
      positional: Index of an argument that may be the config without ``--config=``.
    """
    found, after_flag = [], False
    for i, arg in enumerate(argv):
        if after_flag or (i == positional and not arg.startswith("-")):
            arg = f"--config={config_path(arg)}"
        elif arg.startswith("--config="):
            arg = f"--config={config_path(arg.removeprefix('--config='))}"
        after_flag = arg == "--config"
        found += [] if after_flag else [arg]
    return found
