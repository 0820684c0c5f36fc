"""A model here under the original's names, with the YAML that the original builds it from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ldm_jax.convert.compvis.original import write_yaml
from ldm_jax.convert.originals import original_of, whole_from_config
from ldm_jax.convert.tables import to_theirs
from ldm_jax.errors import CheckpointError, TargetError
from ldm_jax.io.atomic import atomic_path


def to_compvis(config: Mapping[str, Any], params: Mapping[str, Any], out: Path) -> None:
    """Writes ``out`` (.safetensors) and beside it the .yaml; both load strictly in the original.

    Raises:
      TargetError: The original cannot hold the model.
      CheckpointError: The .yaml exists already.
    """
    yaml_file = out.with_suffix(".yaml")
    if yaml_file.exists():
        raise CheckpointError(f"{yaml_file} is already there; give a new name or remove it first")
    original = original_of(config)
    tree = {part: params.get(part, {}) for part in ("unet", "conditioner", *params)}
    if "logvar" in params:
        original.params["learn_logvar"] = True
    if original.params.get("scale_by_std"):
        tree["scale_factor"] = np.float32(config["scale_factor"])
    section = config.get("conditioner", {})
    section = section.get("text", section)
    kind = section.get("kind")
    pad, open_clip = section.get("pad_token_id"), section.get("hidden_act") == "gelu"
    if kind == "clip" and pad != (0 if open_clip else None):
        raise TargetError(f"the original cannot hold a text encoder with pad_token_id={pad!r}")
    if section.get("added_tokens"):
        raise TargetError("the original cannot hold added tokens")
    if kind in ("bert", "tokens") and "to_logits" not in tree["conditioner"]:
        # The original stores a projection that nothing calls.
        vocabulary, dim = tree["conditioner"]["token_emb"]["embedding"].shape
        zeros = {
            "kernel": np.zeros((dim, vocabulary), np.float32),
            "bias": np.zeros(vocabulary, np.float32),
        }
        tree["conditioner"] = {**tree["conditioner"], "to_logits": zeros}
    whole = whole_from_config(original.target, original.params)
    parts = {part: leaves for part, leaves in tree.items() if part in whole.shapes}
    arrays = to_theirs(whole.table, parts, where=str(out))
    with atomic_path(out) as partial:
        save_file(arrays, partial, metadata={"format": "pt"})
    write_yaml(yaml_file, original)
