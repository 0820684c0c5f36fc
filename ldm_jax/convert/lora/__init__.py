"""LoRA files (kohya, LyCORIS, peft and diffusers), merged into the parameters of a model."""

from ldm_jax.convert.lora.merge import merge_lora, read_lora

__all__ = ["merge_lora", "read_lora"]
