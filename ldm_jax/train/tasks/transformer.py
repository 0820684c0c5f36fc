"""The second stage of a VQGAN: a transformer over the codes of a frozen first stage."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import RowCondition
from ldm_jax.conditioning.config import complete_model, frozen_conditioner, row_condition
from ldm_jax.data.captions import CAPTION_SETTINGS
from ldm_jax.distributed.processes import fetch
from ldm_jax.errors import CheckpointError, ConfigError
from ldm_jax.io import png
from ldm_jax.io.checkpoint import find_model, load_model, read_config
from ldm_jax.kernels import for_platform
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build_first_stage
from ldm_jax.models.code_transformer import (
    CodeTransformer,
    build,
    check_lengths,
    cross_entropy,
    init_transformer,
    keep_codes,
)
from ldm_jax.models.ldm import to_float, to_uint8
from ldm_jax.sampling.codes import CodesConfig, CodeSteps, generate_pictures
from ldm_jax.sampling.inputs import Inputs
from ldm_jax.train.state import row_keys
from ldm_jax.train.tasks.base import Cache, Task, check_cacheable, plain, preview_rows

# Purposes of a row's random numbers: each key is used once.
KEEP, RANDOM = range(2)

# Settings of data that change no record of a cache; see `ldm_jax.train.tasks.diffusion`.
UNCACHED_SETTINGS = ("cache", "num_workers", "flip", *CAPTION_SETTINGS)


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerTask(Task):
    """Trains a transformer to predict each code of a picture from the condition and those before.

    Attributes:
      config: The config.
      model: The model; the transformer's parameters are those of the state.
      model_config: The ``config.json`` of the model that it becomes.
      condition: Makes the condition of a training row; None where there is none to make.
    """

    config: Any
    model: CodeTransformer
    model_config: dict[str, Any]
    condition: RowCondition | None

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    exported_part: ClassVar[str] = "transformer"

    # ------------------------------------------------------------------------------ construction

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Returns the fields of a transformer over codes."""
        return {
            "loss": {
                # Probability that a code of the input stays; others become random in training.
                "pkeep": 1.0,
            },
            "model": {"permuter": "Identity"},  # the order of the codes
        }

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks the probability that a code stays."""
        if not 0 <= config.loss.pkeep <= 1:
            raise ConfigError(f"loss.pkeep must be from 0 to 1, not {config.loss.pkeep}")

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> "TransformerTask":
        """Builds the model; first stage and coded conditions come from their directories."""
        fields = plain(config.model)
        fields["first_stage"], stage = first_stage(fields.get("first_stage", {}), weights)
        fields["conditioner"], coded = frozen_conditioner(fields["conditioner"], weights)
        condition = row_condition(plain(config))
        fields = complete_model(fields, condition, 0.0)
        fields = {"kind": "transformer", "pkeep": config.loss.pkeep, **fields}
        fields.setdefault("sampling", {}).setdefault("size", list(config.data.size))
        params = {"conditioner": {} if coded is None else coded}
        model = build(fields, params, config.dtype, stage)
        model = model.with_kernels(for_platform(jax.default_backend()))
        task = cls(config, model, fields, condition)
        task.check_lengths()
        return task

    def check_lengths(self) -> None:
        """Raises ConfigError where conditions or codes do not fit the transformer."""
        size, f = tuple(self.config.data.size), self.model.first_stage.downsampling
        latent = size[0] // f, size[1] // f
        if (latent[0] * f, latent[1] * f) != size:
            raise ConfigError(f"data.size {size}: height and width must be multiples of {f}")
        try:
            self.model.conditioner.check_size(size, latent)
        except ValueError as error:
            raise ConfigError(f"model.conditioner.{error}") from None
        shape = check_lengths(self.model, latent).shape
        if self.config.loss.pkeep <= 0 and np.prod(shape[1:]) != np.prod(latent):
            raise ConfigError(
                "loss.pkeep 0 makes all codes in one pass, for which the condition needs as many "
                "tokens as the picture: take a coded map or coordinates"
            )

    def adopt(self, config: dict[str, Any], params: Any) -> tuple[Task, Any]:
        """Takes the transformer of a model directory."""
        return self, params.get("transformer", {})

    # -------------------------------------------------------------------------------- parameters

    @property
    def frozen(self) -> dict[str, Any]:
        """The first stage, and the parameters of the condition."""
        return {
            "first_stage": self.model.first_stage,
            "conditioner": self.model.params["conditioner"],
        }

    def init(self, key: jax.Array) -> Any:
        """Returns fresh parameters of the transformer."""
        return init_transformer(self.model, key)

    @property
    def decays(self) -> Callable[[Any], Any]:
        """Only the weights of linear layers decay."""
        return decayed

    # ---------------------------------------------------------------------------------- the loss

    def loss(
        self, params: Any, frozen: Any, batch: Any, step: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean cross entropy in nats of a picture's codes.

        Args:
          params: Of the transformer.
          frozen: Of the property.
          batch: "image" uint8 [b, H, W, 3], or "moments" int32 [b, h, w, 1], codes of a cache;
            "encoded" conditions [b, ...]; "row" int32 [b], each row's place in the global batch.
          step: The training step.
          train: With random codes in the input, and dropout.
        """
        model, seed = self.with_frozen(frozen), self.config.seed
        codes = jax.lax.stop_gradient(read_codes(model, batch))
        condition = jax.lax.stop_gradient(model.condition(frozen["conditioner"], batch["encoded"]))
        z = target = model.sequence(codes)
        options: dict[str, Any] = {}
        if train:
            rng = jax.random.fold_in(jax.random.key(seed), step)
            options = {"train": True, "rngs": {"dropout": rng}}
            if (pkeep := self.config.loss.pkeep) < 1:
                keys, n = row_keys(seed, step, batch["row"]), z.shape[1]
                u, random = jax.vmap(partial(draw_replacements, n, model.gpt.vocab_size))(keys)
                z = keep_codes(z, random, u, pkeep)
        logits = model.logits(params, condition, z, **options)
        loss = cross_entropy(logits, target)
        accuracy = (logits.argmax(-1) == target).mean(dtype=jnp.float32)
        return loss, {"loss": loss, "accuracy": accuracy}

    def with_frozen(self, frozen: Any, params: Any = None) -> CodeTransformer:
        """Returns the model with the arrays that a step gets as arguments."""
        stage = frozen["first_stage"].with_kernels(self.model.gpt.kernels)
        parts = {"transformer": params, "conditioner": frozen["conditioner"]}
        return dataclasses.replace(self.model, first_stage=stage, params=parts)

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        """Returns the arrays that `loss` takes."""
        kept = "moments" if "moments" in raw else "image"
        rows = first_row + np.arange(len(raw[kept]), dtype=np.int32)
        return {kept: raw[kept], "row": rows, **self.model.conditioner.encode_rows(raw)}

    def example_batch(self, cached: bool = False) -> dict[str, Any]:
        """Returns a batch of one row; the null condition has the shapes of any other."""
        size = tuple(self.config.data.size)
        raw: dict[str, Any] = {"image": np.zeros((1, *size, 3), np.uint8)}
        raw |= self.model.conditioner.example_rows(size)
        if cached:
            f = self.model.first_stage.downsampling
            del raw["image"]
            raw["moments"] = np.zeros((1, size[0] // f, size[1] // f, 1), np.int32)
        return self.host_batch(raw)

    # ----------------------------------------------------------------------------------- a cache

    def cache(self, dtype: str = "float16") -> Cache:
        """Returns what is kept: codes, with those of the mirror image, and classes."""
        config, model, conditioner = self.config, self.model, self.model.conditioner
        check_cacheable(config, conditioner)

        def encode(stage: Any, image: jax.Array) -> jax.Array:
            sides = [image, image[:, :, ::-1]] if config.data.flip else [image]
            coded = dataclasses.replace(model, first_stage=stage)
            codes = [coded.codes_of(to_float(side)) for side in sides]
            return jnp.stack(codes, axis=1)[..., None]

        def host_arrays(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
            return {name: batch[name] for name in conditioner.cache_fields()}

        pixels = jax.ShapeDtypeStruct((1, *config.data.size, 3), jnp.uint8)
        codes = jax.eval_shape(encode, model.first_stage, pixels)
        fields = {"moments": {"dtype": "int32", "shape": codes.shape[1:]}}
        fields |= conditioner.cache_fields()
        return Cache(self.cache_key(), fields, encode, model.first_stage, host_arrays)

    def cache_key(self) -> dict[str, Any]:
        """Returns what the records depend on."""
        data = {k: v for k, v in plain(self.config.data).items() if k not in UNCACHED_SETTINGS}
        data |= {"path": Path(self.config.data.path).name}
        digest = hashlib.sha256(b"codes")
        for path, leaf in jax.tree.leaves_with_path(self.model.first_stage.params):
            array = np.asarray(leaf)
            name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
            digest.update(name.encode() + array.tobytes())
        key = {f"data.{name}": value for name, value in data.items()}
        return key | {
            "model.classes": self.model_config.get("classes"),
            "model.conditioner.kind": self.model_config["conditioner"]["kind"],
            "first stage sha256": digest.hexdigest(),
            **self.model.conditioner.cache_key(),
        }

    # ----------------------------------------------------------------------------------- results

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        """Returns samples of held-out conditions.

        The rows, of eight pictures: drawn conditions, samples, pictures whose second half of codes
        is sampled, the held-out pictures, and their reconstructions by the first stage.
        """
        raw = {name: values[:16] for name, values in raw.items()}
        batch, f = self.host_batch(raw), self.model.first_stage.downsampling
        encoded, n = batch["encoded"], len(batch["row"])
        size, sampling = tuple(self.config.data.size), self.model_config["sampling"]
        window = size[0] // f, size[1] // f
        steps = CodeSteps(np.float32(sampling.get("temperature", 1.0)))
        if (top_p := sampling.get("top_p")) is not None:
            steps = steps._replace(top_p=np.float32(top_p))
        config = CodesConfig(size, window, sampling.get("top_k"))
        model = self.with_frozen(frozen, weights)
        inputs = Inputs(np.arange(n, dtype=np.uint32), encoded)
        samples = fetch(sample_preview(model, steps, inputs, config).images)
        halves = image = drawn = None
        kept = fetch(reconstruct(model, {k: raw[k] for k in ("image", "moments") if k in raw}))
        if "image" in raw:
            image = raw["image"]
            half = steps._replace(first=np.int32(window[0] * window[1] // 2))
            if self.config.loss.pkeep > 0:
                halves = fetch(
                    sample_preview(model, half, inputs._replace(image=image), config).images
                )
            if self.condition is not None:
                drawn = self.condition.draw(image, raw["condition"])
        return png.sheet(preview_rows(drawn, samples, halves, image, kept))

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """Exports the whole model, with its first stage and what codes its condition."""
        params = {"transformer": weights, "first_stage": self.model.first_stage.params}
        if coded := self.model.params["conditioner"]:
            params["conditioner"] = coded
        return self.model_config, params


def decayed(params: Any) -> Any:
    """Returns a tree of booleans: embeddings, norms and biases of a transformer do not decay."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def first_stage(fields: dict[str, Any], weights: bool) -> tuple[dict[str, Any], Any]:
    """Returns a first stage's config, and its parameters or their shapes.

    Args:
      fields: The config's "first_stage": "path" is its model directory, which completes the other
        fields; without one, "untrained" makes random parameters, for a trial run.
      weights: False reads no parameters and returns shapes.
    """
    fields = dict(fields)
    path, untrained = fields.pop("path", None), fields.pop("untrained", False)
    params = None
    if path and weights:
        saved, parts = load_model(find_model(path))
        if "first_stage" not in parts:
            raise ConfigError(f"model.first_stage.path {path} has no first stage")
        fields, params = {**saved["first_stage"], **fields}, parts["first_stage"]
    elif path:
        try:
            fields = {**read_config(find_model(path))["first_stage"], **fields}
        except CheckpointError as error:
            if "kind" not in fields:
                raise ConfigError(
                    f"{error}; or give the architecture in model.first_stage, to plan without it"
                ) from None
    elif weights and not untrained:
        raise ConfigError(
            "model.first_stage.path is missing: "
            "train a first stage of kind 'vq' and give its model directory"
        )
    if params is None:
        module: Any = build_first_stage({"first_stage": fields})
        if module is None:
            raise ConfigError("model.first_stage: the identity has no codes")
        init, key = partial(init_autoencoder, module), jax.random.key(0)
        params = jax.jit(init)(key) if weights else jax.eval_shape(init, key)
    return fields, params


def read_codes(model: CodeTransformer, batch: Any) -> jax.Array:
    """Returns the codes of a batch int32 [b, h, w]: of the cache, or of its pictures."""
    if "moments" in batch:
        return batch["moments"][..., 0].astype(jnp.int32)
    return model.codes_of(to_float(batch["image"]))


def draw_replacements(n: int, vocabulary: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws (uniform numbers [n], random tokens [n]) of a row, for `keep_codes`."""
    u = jax.random.uniform(jax.random.fold_in(key, KEEP), (n,))
    return u, jax.random.randint(jax.random.fold_in(key, RANDOM), (n,), 0, vocabulary)


@partial(jax.jit, static_argnums=3)
def sample_preview(model: Any, steps: Any, inputs: Inputs, config: CodesConfig) -> Any:
    """Samples a batch of pictures."""
    return generate_pictures(model, steps, inputs, config=config, kernels=model.gpt.kernels)


@jax.jit
def reconstruct(model: CodeTransformer, batch: Any) -> jax.Array:
    """Returns what the first stage keeps of a batch, uint8 [b, H, W, 3]."""
    return to_uint8(model.decode(read_codes(model, batch)))
