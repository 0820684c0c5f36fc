"""Downloads pipelines of diffusers from the Hugging Face Hub, through huggingface_hub."""

import re
from pathlib import Path

from ldm_jax.errors import CheckpointError

# The folders that are read here.
_FOLDERS = (
    "unet",
    "vae",
    "vqvae",
    "text_encoder",
    "text_encoder_2",
    "bert",
    "scheduler",
    "low_res_scheduler",
    "tokenizer",
    "tokenizer_2",
)


def wanted(files: list[str]) -> list[str]:
    """Returns the files of a repository to download: configs, and one set of weights a folder.

    A set is single or sharded, safetensors where there are any; variants (model.fp16.safetensors)
    are left out.
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
    """Returns the downloaded folder of a Hub id ``org/name``; returns anything else unchanged.

    Without network, an earlier download is used.

    Raises:
      CheckpointError: There is nothing, huggingface_hub is missing, or it is no pipeline.
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
            f"there is no folder {name!r}; to download it from the Hugging Face Hub,"
            " pip install huggingface_hub"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # of the network, the Hub or its cache
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"there is no folder {name!r}, and its download failed: {reason}"
        ) from None


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import get_session

    try:
        # The client itself would retry for half a minute.
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:
        return Path(snapshot_download(name, local_files_only=True))
    files = HfApi().list_repo_files(name)
    if "model_index.json" not in files:
        raise CheckpointError(
            f"{name} on the Hugging Face Hub has no model_index.json: no pipeline of diffusers"
        )
    return Path(snapshot_download(name, allow_patterns=wanted(files)))
