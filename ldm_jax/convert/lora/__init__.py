"""LoRA files (kohya, LyCORIS, peft and diffusers), merged into the parameters of a model."""

from ldm_jax.convert.lora.merge import (
    merge_lora,
    merge_loras,
    pairs_of,
    read_lora,
    split_strengths,
)

__all__ = ["merge_lora", "merge_loras", "pairs_of", "read_lora", "split_strengths"]
