"""A classifier of noisy latents, and the gradients by which it guides a diffusion model.

Dhariwal & Nichol 2021, arXiv:2105.05233, section 4; NoisyLatentImageClassifier of the original.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ldm_jax.diffusion.schedule import Schedule, level
from ldm_jax.models.encoder_unet import EncoderUNet, Pool
from ldm_jax.models.unet import Trunk, UNet


def classifier_of(
    unet: UNet, num_classes: int, image_size: int, pool: Pool = "attention"
) -> EncoderUNet:
    """The downward half of a diffusion model's UNet, as a classifier of its latents.

    Args:
      unet: The diffusion model's network.
      num_classes: Classes.
      image_size: Height and width of the latents.
      pool: See `EncoderUNet`.
    """
    return EncoderUNet(**classifier_fields(unet, num_classes, image_size), pool=pool)


def classifier_fields(unet: UNet, num_classes: int, image_size: int) -> dict[str, Any]:
    """Returns the fields of an `EncoderUNet` with the sizes of a UNet, as a config holds them."""
    internal = ("parent", "name", "dtype", "kernels", "remat")
    names = [f.name for f in dataclasses.fields(Trunk) if f.name not in internal]
    fields = {name: getattr(unet, name) for name in names}
    fields |= {"in_channels": unet.out_channels, "out_channels": num_classes}
    if fields["num_heads"] == fields["num_head_channels"] == -1:
        fields["num_heads"] = 1
    return {**fields, "image_size": image_size}


@flax.struct.dataclass
class Classifier:
    """A classifier with its parameters, and the schedule whose timesteps it was trained with."""

    params: Any
    schedule: Schedule
    module: EncoderUNet = flax.struct.field(pytree_node=False)
    names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def with_kernels(self, kernels: Any) -> "Classifier":
        """Returns the classifier as it is: faster forms of its operations have no derivative."""
        return self

    def logits(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Logits [b, classes] of latents x [b, h, w, c] at timesteps t [b]."""
        return self.module.apply({"params": self.params}, x, t)  # type: ignore[return-value]

    def gradient(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        """The gradient of log p(label | x, t) with respect to x, [b, h, w, c]."""

        def log_likelihood(x: jax.Array) -> jax.Array:
            scores = jax.nn.log_softmax(self.logits(x, t))
            return jnp.take_along_axis(scores, labels[:, None], axis=-1).sum()

        return jax.grad(log_likelihood)(x)

    def corrected(
        self,
        eps: jax.Array,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array,
        scale: jax.Array | float,
    ) -> jax.Array:
        """Eps - scale sqrt(1 - abar_t) grad log p(label | x, t), arXiv:2105.05233, algorithm 2."""
        t = jnp.broadcast_to(t, x.shape[:1])
        scale = jnp.reshape(jnp.asarray(scale), (-1, 1, 1, 1))
        return eps - scale * level(self.schedule, t, x)[1] * self.gradient(x, t, labels)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log p(label), of logits [..., k] and labels int [...] -> [...]."""
    scores = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]


def top_k_hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k likeliest: logits [..., c], labels [...] -> bool [...]."""
    return (jax.lax.top_k(logits, k)[1] == labels[..., None]).any(-1)
