"""The two things that are trained, in the shape that the one loop wants."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import pictures
from ldm_jax.checkpoint import find_model, load_model
from ldm_jax.data import Mask, draw_conditions
from ldm_jax.diffusion.samplers import SAMPLERS, step_grid
from ldm_jax.latent import (
    ConfigError,
    apply,
    build,
    build_first_stage,
    generate,
    init_params,
    masked_condition,
    to_float,
    to_uint8,
)
from ldm_jax.models.autoencoder import AutoencoderKL, init_autoencoder
from ldm_jax.train import autoencoder_step, diffusion_step
from ldm_jax.train.conditions import Conditions, check_sizes, load_frozen, make_condition, name_classes

LOG = logging.getLogger(__name__)


class Task(Protocol):
    """One trainable thing. ``frozen`` are the arrays that the step reads and never changes."""

    frozen: Any

    def prepare(self, batches: Callable[[int], Iterable[dict[str, Any]]]) -> dict[str, Any]:
        """What must be measured on the data once, before the first step (``batches(n)`` gives n of the loader's); kept with the run."""
        ...

    def use(self, prepared: dict[str, Any]) -> None:
        """Takes what `prepare` measured, now or in the run that this one resumes."""
        ...

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters; compiled by the caller."""
        ...

    def make_step(self, tx: Any, *, seed: int, ema: float, parts: int) -> Callable[..., Any]:
        """``step(state, frozen, batch, *, axis_name=None) -> (state, metrics)``."""
        ...

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        """A loader's batch -> the arrays of the step's."""
        ...

    def evaluate(self, params: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        """Metrics of one batch, pure; the same batch always draws the same noise."""
        ...

    def preview(self, params: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        """A picture uint8 [H, W, 3] of how far it has come."""
        ...

    def export(self, params: Any) -> tuple[dict[str, Any], Any]:
        """(config, params) of the model directory."""
        ...


class AutoencoderTask:
    """Trains a first stage."""

    def __init__(self, config: Any):
        self.config = config
        module = build_first_stage({"first_stage": config.model["first_stage"]}, config.dtype)
        if module is None:
            raise ConfigError("model.first_stage: the identity has nothing to train")
        if not isinstance(module, AutoencoderKL):
            raise ConfigError("model.first_stage: only the kind 'kl' can be trained")
        self.module = module
        self.perceptual: autoencoder_step.Perceptual | None = None
        self.frozen: dict[str, Any] = {}
        if config.loss.perceptual_weight and config.loss.vgg16:
            from ldm_jax.models.perceptual import load_lpips

            lpips, params = load_lpips(config.loss.vgg16, config.loss.lpips_heads)
            self.perceptual = lambda p, a, b: apply(lpips, p, a, b)
            self.frozen = {"perceptual": params}
        self._reconstruct = jax.jit(lambda p, x: to_uint8(apply(self.module, p, x)[0]))

    def prepare(self, batches: Callable[[int], Iterable[dict[str, Any]]]) -> dict[str, Any]:
        return {}

    def use(self, prepared: dict[str, Any]) -> None:
        pass

    def init(self, key: jax.Array) -> Any:
        return init_autoencoder(self.module, key)

    def make_step(self, tx: Any, *, seed: int, ema: float, parts: int) -> Callable[..., Any]:
        return autoencoder_step.make_step(
            self.module, tx, self.config.loss, seed=seed, ema=ema, parts=parts, perceptual=self.perceptual
        )

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        return {"image": raw["image"], "row": first_row + np.arange(len(raw["image"]), dtype=np.int32)}

    def evaluate(self, params: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        loss = autoencoder_step.make_loss(self.module, self.config.loss, self.config.seed, self.perceptual)
        _, metrics = loss(params, frozen, batch, jnp.int32(0), train=False)
        x = batch["image"].astype(jnp.float32) / 127.5 - 1
        y = jnp.clip(apply(self.module, params, x)[0], -1, 1)
        # Of pixels in [0, 1]: a range of 2 has 4 times the squared error.
        metrics["psnr"] = -10 * jnp.log10(jnp.square(x - y).mean((1, 2, 3)) / 4 + 1e-10).mean()
        return metrics

    def preview(self, params: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        images = raw["image"][:16]
        made = np.asarray(self._reconstruct(params, images / np.float32(127.5) - 1))
        rows = [row for i in range(0, len(images), 8) for row in (images[i : i + 8], made[i : i + 8])]
        return pictures.grid(np.concatenate(rows), columns=min(8, len(images)))

    def export(self, params: Any) -> tuple[dict[str, Any], Any]:
        model = {"kind": "first_stage", "first_stage": plain(self.config.model["first_stage"])}
        return model, {"first_stage": params}


class DiffusionTask:
    """Trains a UNet and its conditioner, unless that is frozen, on the latents of a first stage that stays as it is."""

    def __init__(self, config: Any):
        self.config = config
        model = plain(config.model)
        path = model["first_stage"].pop("path", None)
        params = None
        if path:
            saved, params = load_model(find_model(path))
            params = params["first_stage"]
            model["first_stage"] = {**saved["first_stage"], **model["first_stage"]}
        elif model["first_stage"].get("kind") != "identity":
            raise ConfigError("model.first_stage.path is missing: train a first stage and give its model directory")
        self.conditioner_params = load_frozen(model["conditioner"])
        condition = make_condition(plain(config))
        name_classes(model, condition, config.loss.caption_dropout)
        if model["schedule"].get("zero_terminal_snr") and model["objective"] == "eps":
            raise ConfigError(
                "model.schedule.zero_terminal_snr: its last step is pure noise, which teaches eps nothing: set model.objective='v'"
            )
        self.model_config = {"kind": "latent_diffusion", **model}
        built = build(self.model_config, None, params, config.dtype)
        check_sizes(built, tuple(config.data.size))
        self.conditions = Conditions(built.conditioner, condition)
        self._set(built)

    def _set(self, model: Any) -> None:
        self.model = model
        self.frozen = {"first_stage": model.first_stage, "null": self.conditions.null()}
        if self.conditioner_params is not None:
            self.frozen["conditioner"] = self.conditioner_params

    def prepare(self, batches: Callable[[int], Iterable[dict[str, Any]]]) -> dict[str, Any]:
        if "scale_factor" in self.model_config:
            return {"scale_factor": self.model_config["scale_factor"]}
        unscaled = dataclasses.replace(self.model.first_stage, scale=1.0)
        scale = diffusion_step.scale_factor(unscaled, list(batches(self.config.scale_factor_batches)), self.config.seed)
        LOG.info("scale factor %.5f, from %d batches", scale, self.config.scale_factor_batches)
        return {"scale_factor": scale}

    def use(self, prepared: dict[str, Any]) -> None:
        self.model_config["scale_factor"] = prepared["scale_factor"]
        first_stage = dataclasses.replace(self.model.first_stage, scale=np.float32(prepared["scale_factor"]))
        self._set(dataclasses.replace(self.model, first_stage=first_stage))

    def init(self, key: jax.Array) -> Any:
        params = init_params(self.model, key)
        if self.conditioner_params is not None:
            del params["conditioner"]
        if self.config.loss.learn_logvar:
            params["logvar"] = jnp.full(self.model.schedule.timesteps, self.config.loss.logvar_init)
        return params

    def make_step(self, tx: Any, *, seed: int, ema: float, parts: int) -> Callable[..., Any]:
        return diffusion_step.make_step(self.model, tx, self.config.loss, seed=seed, ema=ema, parts=parts)

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        what = "moments" if "moments" in raw else "image"  # from the latent cache, or from pictures
        rows = first_row + np.arange(len(raw[what]), dtype=np.int32)
        return {what: raw[what], "row": rows, "encoded": self.conditions.encode(raw)}

    def evaluate(self, params: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        loss = diffusion_step.make_loss(self.model, self.config.loss, self.config.seed + 1)
        return loss(params, frozen, batch, jnp.int32(0), train=False)[1]

    def preview(self, params: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        sampling = self.model_config["sampling"]
        params = params | ({} if self.conditioner_params is None else {"conditioner": frozen["conditioner"]})
        raw = {name: values[:16] for name, values in raw.items()}
        if self.config.preview_captions and self.conditions.condition is None:
            raw = {"caption": list(self.config.preview_captions)}
        encoded = self.conditions.encode(raw)
        if isinstance(self.conditions.condition, Mask):
            encoded = _masked(frozen["first_stage"], to_float(raw["image"]), encoded)
        n = len(raw["caption"])
        sampler = SAMPLERS["ddim"]
        nodes = sampler.nodes(
            self.model.schedule,
            step_grid("uniform", min(25, self.model.schedule.timesteps), self.model.schedule.timesteps),
        )
        images = _preview(
            dataclasses.replace(self.model, params=params, first_stage=frozen["first_stage"]),
            nodes,
            encoded,
            self.model.conditioner.encode_null(n),
            np.arange(n, dtype=np.uint32),
            np.float32(sampling["guidance"]),
            tuple(sampling["size"]),
        )
        shown = draw_conditions(self.conditions.condition, raw)
        if shown is None:
            return pictures.grid(np.asarray(images))
        # What was asked for, what was made, and what was asked about, one above the other.
        columns = [np.concatenate(column) for column in zip(shown, np.asarray(images), raw["image"], strict=True)]
        return pictures.grid(columns, columns=min(8, n))

    def export(self, params: Any) -> tuple[dict[str, Any], Any]:
        kept = {} if self.conditioner_params is None else {"conditioner": self.conditioner_params}
        return self.model_config, {**params, **kept, "first_stage": self.frozen["first_stage"].params}


_masked = jax.jit(masked_condition)


@jax.jit(static_argnums=6)
def _preview(
    model: Any, nodes: Any, encoded: Any, null: Any, seeds: Any, guidance: Any, size: tuple[int, int]
) -> jax.Array:
    return generate(model, SAMPLERS["ddim"], nodes, encoded, null, seeds, guidance, size)


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict as the plain dict that JSON would give back."""
    return json.loads(config.to_json_best_effort())


TASKS = {"autoencoder": AutoencoderTask, "diffusion": DiffusionTask}
