"""Training of a CLIP model: pictures and captions in one space (arXiv:2103.00020)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.conditioning import Conditioner, make_conditioner
from ldm_jax.distributed.processes import fetch
from ldm_jax.errors import ConfigError, DataError
from ldm_jax.io import png
from ldm_jax.kernels import for_platform
from ldm_jax.models.build import DTYPES
from ldm_jax.models.clip import CLIP, clip_from_config, fit_pixels
from ldm_jax.models.ldm import to_float
from ldm_jax.train.tasks.base import Task, plain

_MOST_SCALE = np.log(100.0)  # of the logits, section 2.5


@dataclasses.dataclass(frozen=True, eq=False)
class ContrastiveTask(Task):
    """Trains both towers, so that a picture's caption is the nearest of its batch and the reverse.

    The other rows of a batch are the wrong answers: `optim.accumulate` above 1, and
    ``parallel="pmap"``, leave fewer of them.

    Attributes:
      config: The config.
      model: Both towers.
      text: The tokenizer of captions.
    """

    config: Any
    model: CLIP
    text: Conditioner

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> "ContrastiveTask":
        """Builds the towers of "model"; "vision" must take pictures without batch statistics."""
        fields = plain(config.model)
        for name in ("conditioner", "vision"):
            if name not in fields:
                raise ConfigError(f"model config: the section {name!r} is missing")
        if fields["vision"].get("kind") == "resnet":
            raise ConfigError(
                "model.vision.kind 'resnet' has fixed batch statistics and cannot be trained: "
                "choose 'vit'"
            )
        dtype = DTYPES[config.dtype]
        model = clip_from_config({"kind": "clip", **fields}, dtype)
        if model.text.projection_dim is None:
            raise ConfigError("model.conditioner.projection_dim is missing")
        if model.text.projection_dim != model.vision.projection_dim:
            raise ConfigError("model.conditioner and model.vision need the same projection_dim")
        text = make_conditioner(fields["conditioner"], dtype)
        return cls(config, model.with_kernels(for_platform(jax.default_backend())), text)

    def check_rows(self, loader: Any) -> None:
        """Captions tell pictures apart only where they differ."""
        captions = {loader.captions(row) for row in loader.source.rows} if loader.captions else {""}
        if len(captions) < 2:
            raise DataError(
                f"{loader.source.path}: every caption is the same: set data.text to the column of "
                "captions, or data.caption to a template over the columns"
            )

    def init(self, key: jax.Array) -> Any:
        """Returns the parameters of both towers and of the logits' scale."""
        return self.model.init(key)

    def loss(
        self, params: Any, frozen: Any, batch: Any, step: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the mean cross entropy of both directions (figure 3).

        Args:
          params: Of `init`.
          frozen: Nothing.
          batch: "image" uint8 [b, H, W, 3] and "tokens" int32 [b, n].
          step: The training step.
          train: Not used: neither tower draws.
        """
        scale = jnp.minimum(params["logit_scale"], _MOST_SCALE)
        pixels = fit_pixels(to_float(batch["image"]), self.model.vision.image_size)
        logits = self.model.logits({**params, "logit_scale": scale}, pixels, batch["tokens"])
        own = jnp.arange(len(logits))
        both = (
            optax.softmax_cross_entropy_with_integer_labels(each, own)
            for each in (logits, logits.T)
        )
        loss = jnp.mean(jnp.stack([each.mean() for each in both]))
        accuracy = (logits.argmax(1) == own).mean()
        return loss, {"loss": loss, "accuracy": accuracy, "logit_scale": jnp.exp(scale)}

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        """Returns the arrays that `loss` takes."""
        tokens = self.text.encode(raw["caption"])
        return {**super().host_batch(raw, first_row), "tokens": tokens}

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        """Returns held-out pictures, and for each a row of the pictures nearest to its caption.

        A row begins with the picture of the caption; the nearest pictures follow.
        """
        images = raw["image"]
        batch = self.host_batch(raw)
        scores = fetch(_scores(self.model, weights, batch["image"], batch["tokens"]))
        nearest = np.argsort(-scores, axis=0)[:7].T  # [captions, pictures]
        return png.sheet([images[[i, *nearest[i]]] for i in range(min(8, len(images)))])

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """Exports a CLIP model."""
        return {"kind": "clip", **plain(self.config.model)}, weights


@jax.jit(static_argnums=0)
def _scores(model: CLIP, params: Any, images: jax.Array, tokens: jax.Array) -> jax.Array:
    pixels = fit_pixels(to_float(images), model.vision.image_size)
    return model.logits(params, pixels, tokens)
