"""What the console commands share: flags, one-line errors, logging, the compilation cache."""

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from ldm_jax.cli.config import config_names
from ldm_jax.errors import LdmJaxError, ResourceError, did_you_mean
from ldm_jax.io.resources import resource_errors

# Errors of the machine, not of the program: no space, no permission, no such file ...
EXPECTED = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EIO),
    *(errno.EMFILE, errno.ENOMEM, errno.ELOOP, errno.ENOTEMPTY),
}
MEMORY_ADVICE = "lower the batch or the size"
PIPE_CLOSED = 141  # as a shell reports SIGPIPE


def run(main: Callable[[Any], None]) -> None:
    """Parses the flags and calls ``main(flags)``.

    An expected error ends in one line on stderr and exit status 2, Ctrl-C in 130; any other
    exception shows its traceback.
    """

    def parse(argv: list[str]) -> list[str]:
        config = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
        if config is not None and not (file := Path(re.sub(r"\.py:.*", ".py", config))).is_file():
            known = did_you_mean(file.stem, config_names())
            near = known if known.startswith(";") else ""
            sys.exit(fail(f"--config {file} does not exist{near}"))
        try:
            with resource_errors(MEMORY_ADVICE):
                if "--help" not in argv:
                    return flags.FLAGS(argv)
                _show_flags_of(main)
                return app.parse_flags_with_usage(argv)
        except (OSError, ResourceError) as error:  # of --help, or of what a config file reads
            sys.exit(fail(error))
        except Exception as error:  # absl's own, and what a config file raises while it is read
            sys.exit(fail(_flag_mistake(error, argv)))

    def body(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(fail(f"unexpected argument {argv[1]!r}; every setting is a --flag"))
        setup()
        if status := one_line(Path(sys.argv[0]).name, lambda: main(flags.FLAGS)):
            sys.exit(status)

    app.run(body, flags_parser=parse)


def _show_flags_of(main: Callable[[Any], None]) -> None:
    """Lets ``--help`` show the command's own description and flags.

    absl shows those of the script that was started, which only imports the command.
    """
    sys.modules["__main__"].__doc__ = sys.modules[main.__module__].__doc__
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("ldm_jax."):
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def one_line(name: str, main: Callable[[], Any], *, lists: bool = False) -> int:
    """Runs ``main``; returns the exit status: 0, 2 for an expected error, 130 for Ctrl-C.

    Expected errors, a full disk and exhausted memory among them, become one line on stderr, which
    ``name`` starts. LDM_JAX_TRACEBACK=1 shows their traceback.

    Args:
      name: What the line starts with.
      main: The command.
      lists: Keep the lines of a message that lists what does not fit.
    """
    try:
        with resource_errors(MEMORY_ADVICE):
            main()
            sys.stdout.flush()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return fail("stopped", 130, name)
    except BrokenPipeError:  # of a reader that has seen enough, as `head`
        return PIPE_CLOSED
    except (LdmJaxError, OSError) as error:
        if os.environ.get("LDM_JAX_TRACEBACK"):
            raise
        if not isinstance(error, LdmJaxError) and error.errno not in EXPECTED:
            raise
        return fail(error, 2, name, lists=lists)
    finally:
        _drop_unwritten()
    return 0


def _drop_unwritten() -> None:
    """Drops printed text that cannot be written, which Python would report again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: object, status: int = 2, name: str | None = None, *, lists: bool = False) -> int:
    """Prints an error as one line, or with its ``lists``, and returns ``status``."""
    text = str(error).strip() if lists else " ".join(str(error).split())
    text = text or type(error).__name__
    if isinstance(error, OSError) and not isinstance(error, LdmJaxError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    with contextlib.suppress(OSError):  # a log on a full disk
        print(f"{name or Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    return status


def _flag_mistake(error: Exception, argv: list[str]) -> str:
    """Returns what is wrong with the command line, where absl's own words read poorly."""
    text = str(error.args[0]) if error.args else type(error).__name__  # str(KeyError) is a repr
    if isinstance(error, flags.UnrecognizedFlagError):
        near = did_you_mean(error.flagname, list(flags.FLAGS)).replace("mean '", "mean '--")
        return f"unknown flag --{error.flagname}" + (
            near.replace("'", "") if near.startswith(";") else "; --help lists them"
        )
    if missing := re.findall(r"Flag --(\w+) must have a value other than None", text):
        names = " and ".join(f"--{name}=..." for name in missing)
        return f"missing {names}; --help explains every flag"
    named = re.search(r"(\w+)", text.replace("\\", ""))
    if isinstance(error, KeyError | AttributeError) and named:
        given = [a.split("=")[0].removeprefix("--config.") for a in argv if "--config." in a]
        field = next((field for field in given if named[1] in field.split(".")), named[1])
        near = re.search(r'Did you mean "(\w+)"', text)
        return f"config has no field {field!r}" + (f"; did you mean {near[1]!r}?" if near else "")
    if "Traceback" in text:  # the config file's own error, with where it was raised
        return f"--config: {text.strip().splitlines()[-1].split(': ', 1)[-1]}"
    return text


def setup() -> None:
    """Sets up logging on stderr and the persistent compilation cache; quiets libraries."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns of every wait for a save before
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("ldm_jax")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)

    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    cache = cache or str(Path.home() / ".cache" / "ldm_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def program_folder() -> Path:
    """Returns the folder of compiled programs, within that of the compilation cache."""
    import jax

    return Path(jax.config.values["jax_compilation_cache_dir"]) / "programs"


def say(text: str) -> None:
    """Prints one line on stderr."""
    print(text, file=sys.stderr, flush=True)
