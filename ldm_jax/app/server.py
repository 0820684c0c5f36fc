"""Serves the page: on this machine alone, with limits, and without a call to any other host."""

import os
from typing import Any

from ldm_jax.app.studio import Studio
from ldm_jax.errors import RequestError

# The browser refuses to load anything from another host.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; object-src 'none'; base-uri 'self'"
)
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def quiet() -> None:
    """Turns off what Gradio and the Hub would send. Call it before Gradio is imported."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[name] = "1"
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


def import_gradio() -> Any:
    """Returns the module gradio; raises RequestError where it is not installed."""
    quiet()
    try:
        import gradio
    except ImportError:
        raise RequestError('the page needs Gradio: pip install "ldm_jax[app]"') from None
    return gradio


class Policy:
    """ASGI middleware that adds the content security policy to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request."""
        own = [
            (b"content-security-policy", POLICY.encode()),
            (b"referrer-policy", b"no-referrer"),
            (b"x-content-type-options", b"nosniff"),
        ]

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self.app(scope, receive, with_policy)


def launch(
    studio: Studio,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_upload: int = 20,
    share: bool = False,
    block: bool = True,
) -> Any:
    """Serves the page of a studio.

    Args:
      studio: The model and its folder of pictures.
      host: Address to listen on.
      port: Port; None takes the first free one from 7860 on.
      max_upload: MiB of the largest upload.
      share: Whether Gradio's servers forward a public address to this page.
      block: Whether to serve until interrupted.

    Returns:
      The `gradio.Blocks`; ``local_url`` is its address.

    Raises:
      RequestError: The page cannot be served there.
    """
    gradio = import_gradio()
    from starlette.middleware import Middleware

    from ldm_jax.app.page import CSS, build

    page = build(studio)
    theme = gradio.themes.Default(font=FONT, font_mono=MONO)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme,
            css=CSS,
            max_file_size=max_upload * 2**20,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Policy)]},
        )
    except OSError as error:
        raise RequestError(
            f"the page cannot listen on {host}, port {port or 7860}: give another --host or --port"
        ) from error
    print(f"ldm_jax is at {page.share_url or page.local_url}", flush=True)
    if block:
        page.block_thread()
    return page
