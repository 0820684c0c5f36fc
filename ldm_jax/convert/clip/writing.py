"""A CLIP model directory under OpenAI's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from ldm_jax.convert.clip.tables import openai_table
from ldm_jax.convert.tables import to_theirs
from ldm_jax.errors import ConfigError, TargetError
from ldm_jax.io.atomic import atomic_path
from ldm_jax.models.clip import clip_from_config

_SIZES = ("input_resolution", "context_length", "vocab_size")


def to_clip(config: Mapping[str, Any], params: Mapping[str, Any], out: Path) -> None:
    """Writes ``out`` (.safetensors), the state dict that OpenAI's code builds a model from.

    Raises:
      TargetError: The model is no CLIP, or of sizes that OpenAI's code does not infer.
    """
    try:
        model = clip_from_config(config)
    except ConfigError as error:
        raise TargetError(str(error)) from None
    towers = [model.text, *([] if config["vision"]["kind"] == "resnet" else [model.vision])]
    for tower in towers:
        fields = {name: getattr(tower, name) for name in ("hidden_act", "num_attention_heads")}
        wanted = {
            "hidden_act": "quick_gelu",
            "num_attention_heads": max(tower.hidden_size // 64, 1),
        }
        for name, value in wanted.items():
            if fields[name] != value:
                raise TargetError(f"OpenAI's layout cannot hold {name}={fields[name]!r}")
    arrays = to_theirs(openai_table(model), params, where=str(out))
    arrays = {name: array for name, array in arrays.items() if name not in _SIZES}
    with atomic_path(out) as partial:
        save_file(arrays, partial, metadata={"format": "pt"})
