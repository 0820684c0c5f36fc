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
from ldm_jax.diffusion.samplers import SAMPLERS, step_grid
from ldm_jax.latent import (
    DTYPES,
    ConfigError,
    apply,
    build,
    build_first_stage,
    generate,
    init_params,
    nearest,
    to_uint8,
)
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.train import autoencoder_step, diffusion_step
from ldm_jax.train.adversarial import DISCRIMINATOR_LOSSES, Adversary
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.state import TrainState, averaged, extra_of

LOG = logging.getLogger(__name__)


class Task(Protocol):
    """One trainable thing. ``frozen`` are the arrays that the step reads and never changes, ``most_rollbacks`` how often a run that diverged may go
    back to its last checkpoint."""

    frozen: Any
    most_rollbacks: int = 0

    def prepare(self, images: Callable[[int], Iterable[np.ndarray]]) -> dict[str, Any]:
        """What must be measured on the data once, before the first step (``images(n)`` gives n batches of uint8 pictures); kept with the run."""
        return {}

    def use(self, prepared: dict[str, Any]) -> None:
        """Takes what `prepare` measured, now or in the run that this one resumes."""
        return

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters; compiled by the caller."""
        ...

    def extra(self, key: jax.Array) -> dict[str, Any]:
        """What the state carries beside parameters, at the start; compiled by the caller."""
        return {}

    def weights(self, state: TrainState) -> Any:
        """What `evaluate`, `preview` and `export` read of a state."""
        return averaged(state)

    def rollbacks(self, state: TrainState) -> int:
        """How often the run that made this state went back to a checkpoint because it diverged."""
        return 0

    def recover(self, state: TrainState, rollbacks: int) -> TrainState:
        """A checkpoint's state to go on from, after ``rollbacks`` of them."""
        return state

    def make_step(self, tx: Any, *, seed: int, ema: float, parts: int) -> Callable[..., Any]:
        """``step(state, frozen, batch, *, axis_name=None) -> (state, metrics)``."""
        ...

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        """A loader's batch -> the arrays of the step's."""
        ...

    def evaluate(self, weights: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        """Metrics of one batch, pure; the same batch always draws the same noise."""
        ...

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        """A picture uint8 [H, W, 3] of how far it has come."""
        ...

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """(config, params) of the model directory."""
        ...


class AutoencoderTask(Task):
    """Trains a first stage, KL or VQ, with or without an adversary."""

    def __init__(self, config: Any):
        self.config = config
        module = build_first_stage({"first_stage": config.model["first_stage"]}, config.dtype)
        if module is None:
            raise ConfigError("model.first_stage: the identity has nothing to train")
        quantizer = getattr(module, "quantizer", None)
        if config.loss.restart_codes and quantizer not in ("vq", "ema"):
            raise ConfigError(
                f"loss.restart_codes is for codebooks (vq, ema), not for {quantizer or 'kl'}: switch it off"
            )
        if config.updates not in ("fused", "parity"):
            raise ConfigError(
                f"updates {config.updates!r} does not exist{nearest(config.updates, ('fused', 'parity'))}"
            )
        if getattr(module, "remap", None) is not None:
            raise ConfigError(
                "model.first_stage.remap tells which codes of a trained model are in use: leave it out to train"
            )
        self.module, self.most_rollbacks = module, config.guard.rollbacks
        self.adversary = make_adversary(config)
        self.disc_tx = None if self.adversary is None else make_optimizer(config.optim, config.steps)
        self.perceptual: autoencoder_step.Perceptual | None = None
        self.frozen: dict[str, Any] = {}
        if config.loss.perceptual_weight and config.loss.vgg16:
            from ldm_jax.models.perceptual import load_lpips

            lpips, params = load_lpips(config.loss.vgg16, config.loss.lpips_heads)
            self.perceptual = lambda p, a, b: apply(lpips, p, a, b)
            self.frozen = {"perceptual": params}
        elif config.loss.perceptual_weight:
            LOG.warning("without loss.vgg16 and loss.lpips_heads there is no perceptual term")
        self._reconstruct = jax.jit(lambda v, x: to_uint8(self.module.apply(v, x)[0]))

    def init(self, key: jax.Array) -> Any:
        logvar = {"logvar": jnp.float32(self.config.loss.logvar_init)} if self.config.loss.learn_logvar else {}
        return {**init_autoencoder(self.module, key), **logvar}

    def extra(self, key: jax.Array) -> dict[str, Any]:
        guard = self.most_rollbacks > 0 or self.config.guard.rise > 0
        return autoencoder_step.make_extra(
            self.module, key, adversary=self.adversary, disc_tx=self.disc_tx, guard=guard
        )

    def weights(self, state: TrainState) -> Any:
        """All the module's collections."""
        return {"params": averaged(state), **extra_of(state).get("collections", {})}

    def rollbacks(self, state: TrainState) -> int:
        return int(extra_of(state)["guard"]["rollbacks"]) if self.most_rollbacks else 0

    def recover(self, state: TrainState, rollbacks: int) -> TrainState:
        guard = extra_of(state)["guard"]
        number = jax.device_put(np.int32(rollbacks), guard["rollbacks"].sharding)
        return dataclasses.replace(state, extra=extra_of(state) | {"guard": guard | {"rollbacks": number}})

    def make_step(self, tx: Any, *, seed: int, ema: float, parts: int) -> Callable[..., Any]:
        return autoencoder_step.make_step(
            self.module,
            tx,
            self.config.loss,
            seed=seed,
            ema=ema,
            parts=parts,
            perceptual=self.perceptual,
            adversary=self.adversary,
            disc_tx=self.disc_tx,
            fused=self.config.updates == "fused",
        )

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        return {"image": raw["image"], "row": first_row + np.arange(len(raw["image"]), dtype=np.int32)}

    def evaluate(self, weights: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        return autoencoder_step.evaluate(self.module, self.config.loss, self.perceptual, weights, frozen, batch)

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        images = raw["image"][:16]
        made = np.asarray(self._reconstruct(weights, images / np.float32(127.5) - 1))
        rows = [row for i in range(0, len(images), 8) for row in (images[i : i + 8], made[i : i + 8])]
        return pictures.grid(np.concatenate(rows), columns=min(8, len(images)))

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """An averaged codebook is exported as what it now is, a plain one."""
        fields = plain(self.config.model["first_stage"])
        params = {name: part for name, part in weights["params"].items() if name != "logvar"}
        if fields.get("quantizer") == "ema":
            fields["quantizer"] = "vq"
            params["quantize"] = {"embedding": weights["codebook"]["quantize"]["embedding"]}
        return {"kind": "first_stage", "first_stage": fields}, {"first_stage": params}


def make_adversary(config: Any) -> Adversary | None:
    """The adversary of a config; None where it has no weight."""
    fields = config.adversary
    if not fields.weight:
        return None
    if fields.loss not in DISCRIMINATOR_LOSSES:
        raise ConfigError(f"adversary.loss {fields.loss!r} does not exist{nearest(fields.loss, DISCRIMINATOR_LOSSES)}")
    module = PatchDiscriminator(
        ndf=fields.channels, n_layers=fields.layers, use_actnorm=fields.actnorm, dtype=DTYPES[config.dtype]
    )
    if module.patches(min(config.data.size)) < 1:
        raise ConfigError(
            f"adversary.layers {fields.layers} is too many for pictures of {min(config.data.size)} pixels"
        )
    return Adversary(
        module,
        loss=fields.loss,
        start=fields.start,
        factor=fields.factor,
        weight=fields.weight,
        ramp=fields.ramp,
        cap=fields.cap,
        lower=config.guard.lower,
    )


class DiffusionTask(Task):
    """Trains a UNet and its text encoder on the latents of a first stage that stays as it is."""

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
        self.model_config = {"kind": "latent_diffusion", **model}
        self._set(build(self.model_config, None, params, config.dtype))

    def _set(self, model: Any) -> None:
        self.model = model
        self.frozen = {"first_stage": model.first_stage, "null": model.conditioner.encode_null(1)}

    def prepare(self, images: Callable[[int], Iterable[np.ndarray]]) -> dict[str, Any]:
        if "scale_factor" in self.model_config:
            return {"scale_factor": self.model_config["scale_factor"]}
        unscaled = dataclasses.replace(self.model.first_stage, scale=1.0)
        scale = diffusion_step.scale_factor(unscaled, list(images(self.config.scale_factor_batches)), self.config.seed)
        LOG.info("scale factor %.5f, from %d batches", scale, self.config.scale_factor_batches)
        return {"scale_factor": scale}

    def use(self, prepared: dict[str, Any]) -> None:
        self.model_config["scale_factor"] = prepared["scale_factor"]
        first_stage = dataclasses.replace(self.model.first_stage, scale=np.float32(prepared["scale_factor"]))
        self._set(dataclasses.replace(self.model, first_stage=first_stage))

    def init(self, key: jax.Array) -> Any:
        params = init_params(self.model, key)
        if self.config.loss.learn_logvar:
            params["logvar"] = jnp.full(self.model.schedule.timesteps, self.config.loss.logvar_init)
        return params

    def make_step(self, tx: Any, *, seed: int, ema: float, parts: int) -> Callable[..., Any]:
        return diffusion_step.make_step(self.model, tx, self.config.loss, seed=seed, ema=ema, parts=parts)

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        rows = first_row + np.arange(len(raw["image"]), dtype=np.int32)
        return {"image": raw["image"], "row": rows, "encoded": self.model.conditioner.encode(raw["caption"])}

    def evaluate(self, weights: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        loss = diffusion_step.make_loss(self.model, self.config.loss, self.config.seed + 1)
        return loss(weights, frozen, batch, jnp.int32(0), train=False)[1]

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        sampling = self.model_config["sampling"]
        captions = list(self.config.preview_captions or raw["caption"][:16])
        sampler = SAMPLERS["ddim"]
        nodes = sampler.nodes(
            self.model.schedule,
            step_grid("uniform", min(25, self.model.schedule.timesteps), self.model.schedule.timesteps),
        )
        conditioner = self.model.conditioner
        images = _preview(
            dataclasses.replace(self.model, params=weights, first_stage=frozen["first_stage"]),
            nodes,
            conditioner.encode(captions),
            conditioner.encode_null(len(captions)),
            np.arange(len(captions), dtype=np.uint32),
            np.float32(sampling["guidance"]),
            tuple(sampling["size"]),
        )
        return pictures.grid(np.asarray(images))

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        return self.model_config, {**weights, "first_stage": self.frozen["first_stage"].params}


@jax.jit(static_argnums=6)
def _preview(
    model: Any, nodes: Any, encoded: Any, null: Any, seeds: Any, guidance: Any, size: tuple[int, int]
) -> jax.Array:
    return generate(model, SAMPLERS["ddim"], nodes, encoded, null, seeds, guidance, size)


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict as the plain dict that JSON would give back."""
    return json.loads(config.to_json_best_effort())


TASKS = {"autoencoder": AutoencoderTask, "diffusion": DiffusionTask}
