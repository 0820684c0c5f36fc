"""A first stage of label maps: VQSegmentationModel of taming-transformers (arXiv:2012.09841).

Maps become one-hot channels; the loss is the binary cross entropy of every channel, without a
discriminator. The codes are what a transformer or a diffusion model is conditioned on.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import RowCondition
from ldm_jax.conditioning.config import row_condition
from ldm_jax.distributed.processes import fetch
from ldm_jax.errors import ConfigError
from ldm_jax.io import png
from ldm_jax.train.tasks.autoencoder import GENERATOR, AutoencoderTask
from ldm_jax.train.tasks.base import plain, preview_rows


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


@dataclasses.dataclass(frozen=True, eq=False)
class LabelMapTask(AutoencoderTask):
    """Trains a VQ first stage on the label maps of a data set.

    ``model.conditioner`` and ``data.condition`` say how maps are read, as for a diffusion model
    that is conditioned on them.

    Attributes:
      condition: Reads the map of a row.
    """

    condition: RowCondition | None = None

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    any_pixels: ClassVar[bool] = False

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Returns the fields of a first stage, and how maps are read."""
        model = {"conditioner": {"kind": "rescale", "in_channels": 0}}
        return {**AutoencoderTask.defaults(), "model": model}

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks that nothing is asked for that has no meaning for labels."""
        super().check_config(config)
        labels, stage = config.model.conditioner.in_channels, config.model.first_stage
        for name in ("in_channels", "out_ch"):
            if stage.get(name) != labels:
                raise ConfigError(
                    f"model.first_stage.{name} is {stage.get(name)}: the maps have "
                    f"{labels} labels (model.conditioner.in_channels)"
                )
        if stage.get("kind") != "vq":
            raise ConfigError("model.first_stage.kind: label maps need a codebook, 'vq'")
        unused = {
            "adversary.weight": config.adversary.weight,
            "loss.perceptual_weight": config.loss.perceptual_weight,
            "loss.learn_logvar": config.loss.learn_logvar,
            "batch_resize": config.batch_resize,
        }
        for name, value in unused.items():
            if value:
                raise ConfigError(f"{name}: a first stage of label maps has none, leave it off")

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> "LabelMapTask":
        """Builds the autoencoder, and what reads the maps."""
        task = super().from_config(config, weights)
        assert isinstance(task, cls)
        return dataclasses.replace(task, condition=row_condition(plain(config)))

    def pixels(self, batch: Any) -> jax.Array:
        """Returns the one-hot maps [b, H, W, labels]; no label is no channel."""
        return jax.nn.one_hot(batch["map"], self.module.in_channels)

    def nll(self, x: jax.Array, frozen: Any, key: jax.Array | None = None) -> Any:
        """Returns the binary cross entropy against maps x, in the form of `make_nll`."""

        def nll(y: jax.Array, logvar: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            bce = binary_cross_entropy(y, x)
            named = x.any(-1)
            right = (y.argmax(-1) == x.argmax(-1)) & named
            accuracy = right.sum() / jnp.maximum(named.sum(), 1)
            return bce, {"bce_loss": bce, "rec_loss": bce, "accuracy": accuracy}

        return nll

    def evaluate(self, weights: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        """Returns the loss and its parts, and the share of right labels; nothing is drawn."""
        params = weights["params"]
        collections = {name: part for name, part in weights.items() if name != "params"}
        args = params, collections, batch, jnp.int32(0), GENERATOR, False
        (y, penalty), aux = self.forward(*args)
        bce, metrics = self.nll(self.pixels(batch), frozen)(y, jnp.zeros(()))
        name, weight = self.penalty
        metrics |= {name: penalty, "loss": bce + weight * penalty}
        return metrics | self.code_metrics(aux)

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        """Returns the maps int32 [b, H, W] and their rows."""
        rows = first_row + np.arange(len(raw["condition"]), dtype=np.int32)
        return {"map": np.asarray(raw["condition"], np.int32), "row": rows}

    def example_batch(self, cached: bool = False) -> dict[str, Any]:
        """Returns a batch of one row."""
        if cached:
            self.cache()
        return self.host_batch({"condition": np.zeros((1, *self.config.data.size), np.int32)})

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        """Returns sixteen held-out maps in colours, and their reconstructions below."""
        maps = np.asarray(raw["condition"][:16], np.int32)
        found = fetch(_labels(self.module, weights, self.pixels({"map": maps})))
        assert self.condition is not None
        pictures = [self.condition.draw(raw["image"][:16], labels) for labels in (maps, found)]
        return png.sheet(preview_rows(*pictures))


@jax.jit(static_argnums=0)
def _labels(module: Any, variables: Any, x: jax.Array) -> jax.Array:
    """The likeliest labels int32 [b, h, w] of reconstructed maps."""
    return module.apply(variables, x)[0].argmax(-1).astype(jnp.int32)
