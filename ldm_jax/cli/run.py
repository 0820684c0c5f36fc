"""What train.py and sample.py share: one-line errors, quiet libraries, the compilation cache; and train.py's own."""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from ldm_jax.errors import LdmJaxError


def run(main: Callable[[Any], None]) -> None:
    """Parses the flags and calls ``main(flags)``. A mistake of the person's ends in one line on stderr and exit status 2."""

    def parse(argv: list[str]) -> list[str]:
        config = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
        if config is not None and not (file := Path(re.sub(r"\.py:.*", ".py", config))).is_file():
            sys.exit(_fail(f"--config {file} does not exist"))
        try:
            return app.parse_flags_with_usage(argv) if "--help" in argv else flags.FLAGS(argv)
        except Exception as error:  # absl's own, and whatever a config file raises while it is read
            sys.exit(_fail(_flag_mistake(error, argv)))

    def body(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(_fail(f"unexpected argument {argv[1]!r}; every setting is a --flag"))
        setup()
        try:
            main(flags.FLAGS)
        except KeyboardInterrupt:
            sys.exit(_fail("stopped", 130))
        except (LdmJaxError, ValueError, OSError) as error:
            if os.environ.get("LDM_JAX_TRACEBACK"):
                raise
            sys.exit(_fail(error))

    app.run(body, flags_parser=parse)


def _flag_mistake(error: Exception, argv: list[str]) -> str:
    """What is wrong with the command line, in our words where those of absl and ml_collections read poorly."""
    text = (
        str(error.args[0]) if error.args else type(error).__name__
    )  # str() of a KeyError is a repr
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
        return f"unknown flag --{error.flagname}" + (
            f"; did you mean --{near[0]}?" if near else "; --help lists them"
        )
    if missing := re.findall(r"Flag --(\w+) must have a value other than None", text):
        return f"missing {' and '.join(f'--{name}=...' for name in missing)}; --help explains every flag"
    if isinstance(error, KeyError | AttributeError) and (
        named := re.search(r"(\w+)", text.replace("\\", ""))
    ):
        asked_for = [
            a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")
        ]
        field = next((field for field in asked_for if named[1] in field.split(".")), named[1])
        near = re.search(r'Did you mean "(\w+)"', text)
        return f"config has no field {field!r}" + (f"; did you mean {near[1]!r}?" if near else "")
    if "Traceback" in text:  # the config file's own error, with where it was raised
        return f"--config: {text.strip().splitlines()[-1].split(': ', 1)[-1]}"
    return text


def _fail(error: object, status: int = 2) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    return status


def setup() -> None:
    """Quiet libraries, our own log on stderr, and the persistent compilation cache."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns of every wait for a save before
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("ldm_jax")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)

    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        Path.home() / ".cache" / "ldm_jax" / "xla"
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def say(text: str) -> None:
    """One line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)
