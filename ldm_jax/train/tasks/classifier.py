"""A classifier of noisy latents, which guides a diffusion model (arXiv:2105.05233, section 4)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import RowCondition
from ldm_jax.conditioning.config import complete_model, row_condition
from ldm_jax.diffusion.schedule import q_sample
from ldm_jax.distributed.processes import fetch
from ldm_jax.errors import ConfigError
from ldm_jax.io import png
from ldm_jax.io.checkpoint import find_model, load_model
from ldm_jax.kernels import for_platform
from ldm_jax.models.build import build, construct
from ldm_jax.models.classifier import (
    Classifier,
    classifier_fields,
    cross_entropy,
    top_k_hits,
)
from ldm_jax.models.encoder_unet import EncoderUNet
from ldm_jax.models.ldm import FirstStage, LatentDiffusion, to_uint8
from ldm_jax.nn.layers import with_kernels
from ldm_jax.train.state import normal_rows, row_keys
from ldm_jax.train.tasks.base import Task, plain
from ldm_jax.train.tasks.diffusion import POSTERIOR, read_moments

TIMESTEP, NOISE = 1, 2  # purposes of a row's random numbers, after POSTERIOR


@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierTask(Task):
    """Trains a classifier on the noisy latents of a diffusion model, whose directory it reads.

    Attributes:
      config: The config.
      module: The classifier.
      model: The diffusion model; only its schedule and first stage are used.
      model_config: The ``config.json`` of the classifier.
      condition: Reads the class of a row.
    """

    config: Any
    module: EncoderUNet
    model: LatentDiffusion
    model_config: dict[str, Any]
    condition: RowCondition | None = None

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    exported_part: ClassVar[str] = "classifier"

    # ------------------------------------------------------------------------------ construction

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Returns the fields of a classifier."""
        return {
            "model": {
                "path": "",  # the model directory of the diffusion model
                "conditioner": {"kind": "class_vector"},  # how a row's class is read
                # Fields of the classifier that differ from the downward half of the UNet.
                "classifier": {"pool": "attention"},
            },
        }

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> "ClassifierTask":
        """Builds the classifier after the UNet of the diffusion model."""
        model = plain(config.model)
        if not model["path"]:
            raise ConfigError(
                "model.path is missing: give the directory of the diffusion model to guide"
            )
        saved, params = load_model(find_model(model["path"]))
        if saved.get("kind") != "latent_diffusion":
            raise ConfigError(f"model.path {model['path']} is no latent diffusion model")
        stage = params.get("first_stage")
        if not weights:
            stage = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), stage)
        diffusion = build(saved, None, stage, config.dtype)
        condition = row_condition(plain(config))
        complete = complete_model(model, condition, 0.0)
        factor = diffusion.first_stage.downsampling
        fields = classifier_fields(
            diffusion.unet, complete["conditioner"]["n_classes"], config.data.size[0] // factor
        )
        fields |= model["classifier"]
        module = construct(EncoderUNet, "model.classifier", fields)
        if config.data.size[0] != config.data.size[1]:
            raise ConfigError(f"data.size {tuple(config.data.size)}: a classifier takes squares")
        described = {
            "kind": "classifier",
            "classifier": fields,
            "schedule": saved["schedule"],
            "scale_factor": saved.get("scale_factor", 1.0),
            "classes": complete.get("classes", []),
        }
        task = cls(config, module, diffusion, described, condition)
        return with_kernels(task, for_platform(jax.default_backend()))

    # -------------------------------------------------------------------------------- parameters

    @property
    def frozen(self) -> dict[str, FirstStage]:
        """The first stage, with its scale."""
        return {"first_stage": self.model.first_stage}

    def init(self, key: jax.Array) -> Any:
        """Returns the parameters of the classifier."""
        side = self.module.image_size
        x = jnp.zeros((1, side, side, self.module.in_channels))
        return dict(self.module.init(key, x, jnp.zeros(1))["params"])

    def adopt(self, config: dict[str, Any], params: Any) -> tuple[Task, Any]:
        """Takes the classifier of a model directory."""
        return self, params.get("classifier", {})

    # ---------------------------------------------------------------------------------- the loss

    def latents(self, frozen: Any, batch: Any, keys: jax.Array) -> jax.Array:
        """Returns samples of the batch's latents [b, h, w, c]."""
        stage = frozen["first_stage"].with_kernels(self.module.kernels)
        moments = jax.lax.stop_gradient(read_moments(stage, batch))
        shape = (*moments.shape[1:3], stage.channels)
        return stage.latents(moments, normal_rows(keys, POSTERIOR, shape))

    def loss(
        self, params: Any, frozen: Any, batch: Any, step: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the cross entropy of the classes of noisy latents, at all timesteps alike.

        Args:
          params: Of `init`.
          frozen: Of the property.
          batch: "image" uint8 [b, H, W, 3], "label" and "row" int32 [b].
          step: The training step.
          train: With dropout of activations.
        """
        seed, schedule = self.config.seed + (not train), self.model.schedule
        keys = row_keys(seed, step, batch["row"])
        z = self.latents(frozen, batch, keys)
        fold = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, TIMESTEP)))
        t = (fold(keys) * schedule.timesteps).astype(jnp.int32)
        x = q_sample(schedule, z, t, normal_rows(keys, NOISE, z.shape[1:]))
        rngs = {"dropout": jax.random.fold_in(jax.random.key(seed), step)} if train else None
        logits: Any = self.module.apply({"params": params}, x, t, train, rngs=rngs)
        each = cross_entropy(logits, batch["label"])
        few = min(5, logits.shape[-1])
        loss = each.mean()
        return loss, {
            "loss": loss,
            "accuracy": top_k_hits(logits, batch["label"], 1).mean(),
            f"accuracy_{few}": top_k_hits(logits, batch["label"], few).mean(),
        }

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        """Returns the arrays that `loss` takes."""
        rows = first_row + np.arange(len(raw["image"]), dtype=np.int32)
        return {"image": raw["image"], "row": rows, "label": np.asarray(raw["condition"], np.int32)}

    def example_batch(self, cached: bool = False) -> dict[str, Any]:
        """Returns a batch of one row."""
        if cached:
            self.cache()
        image = np.zeros((1, *self.config.data.size, 3), np.uint8)
        return self.host_batch({"image": image, "condition": np.zeros(1, np.int32)})

    # ----------------------------------------------------------------------------------- results

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        """Returns held-out pictures at growing noise, labelled with the classes that are found.

        Each row has one noise level; the last line of a label is the likeliest class.
        """
        images, labels = raw["image"][:8], np.asarray(raw["condition"][:8])
        names = self.model_config["classes"] or [str(i) for i in range(self.module.out_channels)]
        batch = {"image": images, "row": np.arange(len(images), dtype=np.int32)}
        last = self.model.schedule.timesteps - 1
        levels = np.array([0, last // 4, last // 2, 3 * last // 4], np.int32)
        shown, logits = map(fetch, _at_levels(self, weights, frozen, batch, levels))
        found = logits.argmax(-1)  # [levels, b]
        rows = [f"t {t}" for t in levels]
        columns = []
        for label, best in zip(labels, found.T, strict=True):
            lines = [f"t {t}: {names[k]}" for t, k in zip(levels, best, strict=True)]
            columns.append("\n".join([names[label], *lines]))
        return png.labelled_grid(shown.reshape(-1, *shown.shape[2:]), rows, columns)

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """Exports the classifier, which a pipeline takes beside its model."""
        return self.model_config, {"classifier": weights}


def _at_levels(
    task: ClassifierTask, weights: Any, frozen: Any, batch: Any, levels: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """(pictures uint8 [levels, b, H, W, 3], logits [levels, b, classes]) of noisy latents."""

    @jax.jit
    def run(weights: Any, frozen: Any, batch: Any, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = row_keys(task.config.seed, jnp.int32(0), batch["row"])
        z = task.latents(frozen, batch, keys)
        x = q_sample(task.model.schedule, z, t, normal_rows(keys, NOISE, z.shape[1:]))
        classifier = Classifier(weights, task.model.schedule, task.module)
        stage = frozen["first_stage"].with_kernels(task.module.kernels)
        return to_uint8(stage.decode(x)), classifier.logits(x, jnp.full(len(x), t))

    made = [run(weights, frozen, batch, jnp.int32(t)) for t in levels]
    return jnp.stack([images for images, _ in made]), jnp.stack([scores for _, scores in made])
