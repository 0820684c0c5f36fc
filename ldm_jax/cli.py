"""What train.py and sample.py share with a person: one-line errors, quiet libraries, the compilation cache, pictures on disk."""

import difflib
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

REPLAYED = ("model", "prompt", "seed", "steps", "guidance", "eta", "sampler", "size", "dtype", "batch")


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
        except (ValueError, OSError) as error:  # ConfigError, RequestError, DataError, CheckpointError are ValueErrors
            if os.environ.get("LDM_JAX_TRACEBACK"):
                raise
            sys.exit(_fail(error))

    app.run(body, flags_parser=parse)


def _flag_mistake(error: Exception, argv: list[str]) -> str:
    """What is wrong with the command line, in our words where those of absl and ml_collections read poorly."""
    text = str(error.args[0]) if error.args else type(error).__name__  # str() of a KeyError is a repr
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
        return f"unknown flag --{error.flagname}" + (f"; did you mean --{near[0]}?" if near else "; --help lists them")
    if missing := re.findall(r"Flag --(\w+) must have a value other than None", text):
        return f"missing {' and '.join(f'--{name}=...' for name in missing)}; --help explains every flag"
    if isinstance(error, KeyError | AttributeError) and (named := re.search(r"(\w+)", text.replace("\\", ""))):
        asked_for = [a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")]
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

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "ldm_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def say(text: str) -> None:
    """One line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------- sample.py


def sample(args: Any) -> None:
    """Makes the pictures that the flags ask for, and writes them."""
    request = replayed(args.replay) if args.replay else asked(args)
    out = Path(args.out)
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"--out {out} cannot be written: {there} is {'read-only' if there.is_dir() else 'not a folder'}"
        )

    began = time.perf_counter()
    say(f"loading {request['model']} ...")
    import numpy as np
    from tqdm import tqdm

    from ldm_jax import pictures
    from ldm_jax.pipeline import load

    yaml = request["model_config"]
    pipe = load(request["model"], config=yaml, dtype=request["dtype"], parallel=args.parallel)
    names = ("steps", "guidance", "eta", "sampler", "size")
    chosen = pipe.settings(**{name: request[name] for name in names})
    settings = {name: getattr(chosen, name) for name in names}
    prompts, seeds = request["prompts"], request["seeds"]
    batch = request["batch"] or min(len(prompts), 8)
    stream = pipe.stream(prompts, seeds=seeds, batch=batch, **settings)

    say(
        f"making {len(prompts)} pictures, {settings['steps']} steps of {settings['sampler']}; the first batch compiles unless it was cached"
    )
    out.mkdir(parents=True, exist_ok=True)
    number, paths, images = next_number(out), [], []
    with tqdm(total=len(prompts), unit="picture", dynamic_ncols=True, disable=None) as bar:
        for done in stream:
            for place, image in zip(done.places, done.images, strict=True):
                kept = {
                    "model": request["model"],
                    **({} if yaml is None else {"model_config": yaml}),
                    "prompt": prompts[place],
                    "seed": seeds[place],
                    **settings,
                    "dtype": pipe.dtype,
                    "batch": batch,
                }
                paths.append(out / f"{number + place:05d}-{slug(prompts[place])}-{seeds[place]}.png")
                pictures.save_png(paths[-1], image, kept)
            images.append(done.images)
            bar.update(len(done.places))
    if args.grid and len(paths) > 1:
        per_prompt = len(prompts) // len(dict.fromkeys(prompts))
        columns = per_prompt if 1 < per_prompt <= 16 else None
        paths.append(out / f"{number:05d}-grid.png")
        pictures.save_png(
            paths[-1],
            pictures.grid(np.concatenate(images), columns),
            {"prompts": list(dict.fromkeys(prompts)), **settings},
        )
    say(
        f"{len(prompts)} pictures in {time.perf_counter() - began:.1f} s: {paths[-1] if len(paths) < 3 else f'{paths[0]} ... {paths[-1]}'}"
    )


def asked(args: Any) -> dict[str, Any]:
    """The request in the flags."""
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--prompts_file {args.prompts_file} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts_file {args.prompts_file} has no prompt in it")
    if not prompts:
        raise ValueError('give --prompt "..." or --prompts_file FILE')
    size = None
    if args.size:
        if not (match := re.fullmatch(r"(\d+)x(\d+)", args.size)):
            raise ValueError(f"--size {args.size!r}: write HEIGHTxWIDTH, for example 64x96")
        size = [int(match[1]), int(match[2])]
    names = ("model", "model_config", "steps", "guidance", "eta", "sampler", "batch", "dtype")
    return {
        **{name: getattr(args, name) for name in names},
        "size": size,
        "prompts": [prompt for prompt in prompts for _ in range(args.num)],
        "seeds": [args.seed + i for _ in prompts for i in range(args.num)],
    }


def replayed(path: str) -> dict[str, Any]:
    """The request that made a picture: alone, but in a batch of the same size, so that it comes out the same to the bit."""
    from ldm_jax.pictures import read_settings

    kept = read_settings(path)
    missing = [name for name in REPLAYED if name not in kept]
    if missing:
        raise ValueError(f"{path}: its settings lack {missing[0]!r}, so it cannot be made again (a grid?)")
    return {"model_config": None, **kept, "prompts": [kept["prompt"]], "seeds": [kept["seed"]]}


def next_number(out: Path) -> int:
    """One more than the highest number that a picture in ``out`` begins with."""
    numbers = [int(match[1]) for path in out.glob("*.png") if (match := re.match(r"(\d{5,})-", path.name))]
    return max(numbers, default=-1) + 1


def slug(text: str) -> str:
    """A part of a file name that tells the prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"


# ----------------------------------------------------------------------------------------------------------------------- train.py


def train(args: Any) -> None:
    """Trains what the flags ask for."""
    if not args.workdir:
        raise ValueError("missing --workdir=...; --help explains every flag")
    from ldm_jax import parallel
    from ldm_jax.train.loop import TrainingDiverged, TrainingStopped, train

    if args.distributed or args.coordinator:
        parallel.start(args.coordinator, args.processes, args.process_index)
        if not parallel.is_first():
            logging.getLogger("ldm_jax").setLevel(logging.WARNING)
    try:
        train(args.config, args.workdir)
    except TrainingDiverged as error:
        raise ValueError(str(error)) from None
    except TrainingStopped as error:
        sys.exit(_fail(error, parallel.STOPPED))
