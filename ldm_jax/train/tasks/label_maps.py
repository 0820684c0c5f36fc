"""Losses of first stages of label maps: VQSegmentationModel of taming-transformers."""

import jax
import jax.numpy as jnp


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean binary cross entropy over all elements of logits and targets in [0, 1], []."""
    return jnp.mean(jax.nn.softplus(logits) - targets * logits)


def label_loss(
    logits: jax.Array, targets: jax.Array, penalty: jax.Array, weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss [], metrics) of label maps [b, h, w, labels].

    Args:
      logits: Reconstructed maps.
      targets: One-hot maps; the channels are averaged, too.
      penalty: The quantiser's loss.
      weight: Its weight, the original's codebook_weight.
    """
    bce = binary_cross_entropy(logits, targets)
    loss = bce + weight * penalty
    return loss, {"bce_loss": bce, "quant_loss": penalty, "loss": loss}
