"""Pipelines of diffusers on the Hugging Face Hub, through huggingface_hub and its cache."""

import re
from pathlib import Path

from ldm_jax.errors import CheckpointError

# Of a pipeline, what is read here: no half-precision copies, no weights of what is left out.
_FOLDERS = ("unet", "vae", "vqvae", "text_encoder", "bert", "scheduler", "tokenizer")


def wanted(files: list[str]) -> list[str]:
    """The files of a repository to download: descriptions, and of each folder's weights one full set, safetensors where there are any.

    A set is single or sharded; copies in another precision or without averaging (``model.fp16.safetensors``) are no part of it.
    """
    inside = [file for file in files if file.count("/") == 1 and file.split("/")[0] in _FOLDERS]
    weights = [
        file
        for file in inside
        if re.fullmatch(r"[^.]*(\.safetensors|\.bin)(\.index\.json)?", file.split("/")[1])
    ]
    safe = {file.split("/")[0] for file in weights if ".safetensors" in file}
    chosen = [file for file in weights if file.split("/")[0] not in safe or ".safetensors" in file]
    texts = [file for file in inside if file.endswith((".json", ".txt")) and ".index." not in file]
    return sorted({*chosen, *texts, "model_index.json"})


def fetched(name: str | Path) -> str | Path:
    """The downloaded folder of a Hub id ``org/name``; anything else, and a path whose folder exists, as it is.

    Without network, what was downloaded before. CheckpointError with one line where there is nothing, or huggingface_hub is missing, or the
    repository is no pipeline of diffusers.
    """
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[\w.-]*\w/[\w.-]*\w", name)
        or Path(name).parent.exists()
    ):
        return name
    try:
        return _download(name)
    except ImportError:
        raise CheckpointError(
            f"there is no folder {name!r}; to fetch it from the Hugging Face Hub, pip install huggingface_hub"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # of the network, the Hub or its cache: each has many
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"there is no folder {name!r}, and the Hugging Face Hub does not give it: {reason}"
        ) from None


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import get_session

    try:
        get_session().head(
            constants.ENDPOINT, timeout=10
        )  # the client would try for half a minute before it gives up
    except Exception:
        return Path(snapshot_download(name, local_files_only=True))
    files = HfApi().list_repo_files(name)
    if "model_index.json" not in files:
        raise CheckpointError(
            f"{name} on the Hugging Face Hub is no pipeline of diffusers: it has no model_index.json"
        )
    return Path(snapshot_download(name, allow_patterns=wanted(files)))
