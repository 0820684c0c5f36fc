"""Serves a web page to play with a model.

    ldm-app --model emoji

The page is for this machine alone unless --host says otherwise. It loads nothing from other hosts
and sends nothing to any.
"""

import contextlib
import sys
from typing import Any

from absl import flags

from ldm_jax.cli import run as cli
from ldm_jax.cli.run import say
from ldm_jax.cli.sample import MODEL, check_out, define_model_flags, load_model, lora_sweep
from ldm_jax.errors import RequestError
from ldm_jax.io.paths import local_only


def main() -> None:
    """Runs ``ldm-app``."""
    define_model_flags()
    flags.DEFINE_string("out", "outputs", "Folder of the pictures, and of what is uploaded.")
    text = "Address to listen on; 0.0.0.0 lets other machines of the network use the page."
    flags.DEFINE_string("host", "127.0.0.1", text)
    text = "Port (default: the first free one from 7860 on)."
    flags.DEFINE_integer("port", None, text, lower_bound=1, upper_bound=65535)
    flags.DEFINE_integer("max_upload", 20, "MiB of the largest upload.", lower_bound=1)
    text = "Give it twice to open the page to everybody who has its address."
    flags.DEFINE_bool("share", False, text)
    cli.run(serve)


def serve(args: Any) -> None:
    """Loads the model and serves its page until Ctrl-C."""
    from ldm_jax.app.server import import_gradio, launch
    from ldm_jax.app.studio import Studio

    if args.share and sys.argv.count("--share") < 2:
        raise RequestError(
            "--share lets everybody who has the address use this machine, through the servers of "
            "Gradio, from which it downloads a program: give --share twice if you mean it"
        )
    loras = lora_sweep(args.lora or [])
    if len(loras) > 1:
        raise RequestError("the page takes one strength of each --lora")
    out = check_out(args.out)
    import_gradio()
    from ldm_jax.kernels.cores import use_cores

    with contextlib.suppress(RuntimeError):  # JAX has its devices already, and keeps them
        use_cores()
    model = {name: getattr(args, name) for name in MODEL}
    say(f"loading {args.model} ...")
    pipe = load_model(model)
    if loras[0]:
        pipe = pipe.with_lora(*loras[0])
    launch(
        Studio(pipe, model, local_only(out, "the pictures of the page")),
        host=args.host,
        port=args.port,
        max_upload=args.max_upload,
        share=args.share,
    )
