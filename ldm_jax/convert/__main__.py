"""``python -m ldm_jax.convert inspect SRC``: what a checkpoint is, without running or loading it."""

import sys
from collections import Counter
from math import prod

from ldm_jax.convert.reader import Checkpoint, ReaderError, open_checkpoint

# Names that only one family has, the most telling first.
FAMILIES = {
    "Stable Diffusion v1 (CompVis)": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "latent diffusion (CompVis)": "model.diffusion_model.time_embed.0.weight",
    "VQGAN (taming-transformers) or VQ first stage": "quantize.embedding.weight",
    "KL first stage (CompVis)": "post_quant_conv.weight",
    "UNet (diffusers)": "time_embedding.linear_1.weight",
    "CLIP text tower (transformers)": "text_model.embeddings.position_embedding.weight",
}


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What `inspect` prints: label -> text."""
    names, tree = checkpoint.tensors, checkpoint.tree if isinstance(checkpoint.tree, dict) else {}
    shadows = sum(name.startswith("model_ema.") for name in names)
    values = Counter[str]()
    for name, tensor in names.items():
        if not name.startswith("model_ema."):
            values[str(tensor.dtype)] += prod(tensor.shape)
    told = {
        "file": f"{checkpoint.path.name} ({checkpoint.format})",
        "family": next((family for family, name in FAMILIES.items() if name in names), "unknown"),
        "values": f"{sum(values.values()):,} in {len(names) - shadows} tensors, EMA and optimizer aside",
        "dtype": ", ".join(f"{dtype} {n:,}" for dtype, n in values.most_common()),
        "EMA": f"{shadows} tensors" if shadows else "none",
        "step": ", ".join(f"{key} {tree[key]}" for key in ("epoch", "global_step") if isinstance(tree.get(key), int))
        or "-",
    }
    if checkpoint.standins:
        told["not loaded"] = ", ".join(f"{name} ({n})" for name, n in sorted(checkpoint.standins.items()))
    return told


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if len(argv) != 2 or argv[0] != "inspect":
        print("usage: python -m ldm_jax.convert inspect SRC", file=sys.stderr)
        return 2
    try:
        with open_checkpoint(argv[1]) as checkpoint:
            for label, text in describe(checkpoint).items():
                print(f"{label:<12}{text}")
    except ReaderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
