"""The two things that are trained, in the shape that the one loop wants."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.columns import Mask
from ldm_jax.conditioning.drawing import draw_conditions
from ldm_jax.conditioning.training import (
    Conditions,
    check_sizes,
    load_frozen,
    make_condition,
    name_classes,
)
from ldm_jax.diffusion.samplers import SAMPLERS, step_grid
from ldm_jax.distributed.parallel import fetch
from ldm_jax.errors import CheckpointError, ConfigError, did_you_mean
from ldm_jax.io import png as pictures
from ldm_jax.io.checkpoint import find_model, load_model, read_config
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.ldm import (
    DTYPES,
    apply,
    build,
    build_conditioner,
    build_first_stage,
    init_params,
    to_uint8,
)
from ldm_jax.models.vqgan import VQModelInterface
from ldm_jax.sampling.program import Form, Made, Plan, Rows, generate
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.state import TrainState, averaged, extra_of
from ldm_jax.train.tasks import autoencoder_step, diffusion_step
from ldm_jax.train.tasks.adversarial import DISCRIMINATOR_LOSSES, Adversary

LOG = logging.getLogger(__name__)
COLUMNS = 8  # of a preview


class Task(Protocol):
    """One trainable thing. ``frozen`` are the arrays that the step reads and never changes, ``most_rollbacks`` how often a run that diverged may go
    back to its last checkpoint.
    """

    frozen: Any
    most_rollbacks: int = 0

    def prepare(self, batches: Callable[[int], Iterable[dict[str, Any]]]) -> dict[str, Any]:
        """What must be measured on the data once, before the first step (``batches(n)`` gives n of the loader's); kept with the run."""
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

    def adopt(self, config: dict[str, Any], params: Any) -> Any:
        """What `init` makes, of a model directory's (config, params); what the state does not train is left out."""
        ...


class AutoencoderTask(Task):
    """Trains a first stage, KL or VQ, with or without an adversary.

    With ``weights`` False no file is read: shapes stand for what would be in them, which is enough to plan.
    """

    def __init__(self, config: Any, weights: bool = True):
        self.config = config
        module = build_first_stage(
            {"first_stage": config.model["first_stage"]}, config.dtype, config.remat
        )
        if module is None:
            raise ConfigError("model.first_stage: the identity has nothing to train")
        quantizer = getattr(module, "quantizer", None)
        if config.loss.restart_codes and quantizer not in ("vq", "ema"):
            raise ConfigError(
                f"loss.restart_codes is for codebooks (vq, ema), not for {quantizer or 'kl'}: switch it off"
            )
        if config.updates not in ("fused", "parity"):
            raise ConfigError(
                f"updates {config.updates!r} does not exist{did_you_mean(config.updates, ('fused', 'parity'))}"
            )
        if getattr(module, "remap", None) is not None:
            raise ConfigError(
                "model.first_stage.remap tells which codes of a trained model are in use: leave it out to train"
            )
        self.module, self.most_rollbacks = module, config.guard.rollbacks
        self.adversary = make_adversary(config)
        self.disc_tx = (
            None if self.adversary is None else make_optimizer(config.optim, config.steps)
        )
        self.perceptual: autoencoder_step.Perceptual | None = None
        self.frozen: dict[str, Any] = {}
        if config.loss.perceptual_weight and config.loss.vgg16:
            from ldm_jax.models.perceptual import LPIPS, load_lpips

            if weights:
                lpips, params = load_lpips(config.loss.vgg16, config.loss.lpips_heads)
            else:
                lpips, pixels = LPIPS(), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
                params = jax.eval_shape(lpips.init, jax.random.key(0), pixels, pixels)["params"]
            self.perceptual = lambda p, a, b: apply(lpips, p, a, b)
            self.frozen = {"perceptual": params}
        elif config.loss.perceptual_weight:
            LOG.warning("without loss.vgg16 and loss.lpips_heads there is no perceptual term")
        self._reconstruct = jax.jit(lambda v, x: to_uint8(self.module.apply(v, x)[0]))

    def init(self, key: jax.Array) -> Any:
        logvar = (
            {"logvar": jnp.float32(self.config.loss.logvar_init)}
            if self.config.loss.learn_logvar
            else {}
        )
        return {**init_autoencoder(self.module, key), **logvar}

    def extra(self, key: jax.Array) -> dict[str, Any]:
        guard = self.most_rollbacks > 0 or self.config.guard.rise > 0
        return autoencoder_step.make_extra(
            self.module,
            key,
            adversary=self.adversary,
            disc_tx=self.disc_tx,
            guard=guard,
            new_codes=self.config.loss.restart_codes,
        )

    def weights(self, state: TrainState) -> Any:
        """All the module's collections."""
        return {"params": averaged(state), **extra_of(state).get("collections", {})}

    def rollbacks(self, state: TrainState) -> int:
        return int(extra_of(state)["guard"]["rollbacks"]) if self.most_rollbacks else 0

    def recover(self, state: TrainState, rollbacks: int) -> TrainState:
        guard = extra_of(state)["guard"]
        number = jax.device_put(np.int32(rollbacks), guard["rollbacks"].sharding)
        return dataclasses.replace(
            state, extra=extra_of(state) | {"guard": guard | {"rollbacks": number}}
        )

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
        return {
            "image": raw["image"],
            "row": first_row + np.arange(len(raw["image"]), dtype=np.int32),
        }

    def evaluate(self, weights: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        return autoencoder_step.evaluate(
            self.module, self.config.loss, self.perceptual, weights, frozen, batch
        )

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        images = raw["image"][:16]
        return pictures.sheet(
            _rows(images, fetch(self._reconstruct(weights, images / np.float32(127.5) - 1)))
        )

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """An averaged codebook is exported as what it now is, a plain one."""
        fields = plain(self.config.model["first_stage"])
        params = {name: part for name, part in weights["params"].items() if name != "logvar"}
        if fields.get("quantizer") == "ema":
            fields["quantizer"] = "vq"
            params["quantize"] = {"embedding": weights["codebook"]["quantize"]["embedding"]}
        return {"kind": "first_stage", "first_stage": fields}, {"first_stage": params}

    def adopt(self, config: dict[str, Any], params: Any) -> Any:
        return params.get("first_stage", {})


def make_adversary(config: Any) -> Adversary | None:
    """The adversary of a config; None where it has no weight."""
    fields = config.adversary
    if not fields.weight:
        return None
    if fields.loss not in DISCRIMINATOR_LOSSES:
        raise ConfigError(
            f"adversary.loss {fields.loss!r} does not exist{did_you_mean(fields.loss, DISCRIMINATOR_LOSSES)}"
        )
    module = PatchDiscriminator(
        ndf=fields.channels,
        n_layers=fields.layers,
        use_actnorm=fields.actnorm,
        dtype=DTYPES[config.dtype],
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
    """Trains a UNet and its conditioner, unless that is frozen, on the latents of a first stage that stays as it is.

    With ``weights`` False no file is read: shapes stand for what would be in them, which is enough to plan.
    """

    def __init__(self, config: Any, weights: bool = True):
        self.config = config
        model = plain(config.model)
        path = model["first_stage"].pop("path", None)
        params = None
        if not weights:
            params = first_stage_shapes(model, path)
        elif path:
            saved, params = load_model(find_model(path))
            params = params["first_stage"]
            model["first_stage"] = {**saved["first_stage"], **model["first_stage"]}
        elif model["first_stage"].get("kind") != "identity":
            raise ConfigError(
                "model.first_stage.path is missing: train a first stage and give its model directory"
            )
        self.conditioner_params = (
            load_frozen(model["conditioner"]) if weights else frozen_shapes(model["conditioner"])
        )
        condition = make_condition(plain(config))
        name_classes(model, condition, config.loss.caption_dropout)
        if model["schedule"].get("zero_terminal_snr") and model["objective"] == "eps":
            raise ConfigError(
                "model.schedule.zero_terminal_snr: its last step is pure noise, which teaches eps nothing: set model.objective='v'"
            )
        self.model_config = {"kind": "latent_diffusion", **model}
        built = build(self.model_config, None, params, config.dtype, config.remat)
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
        scale = diffusion_step.scale_factor(
            unscaled, list(batches(self.config.scale_factor_batches)), self.config.seed
        )
        LOG.info("scale factor %.5f, from %d batches", scale, self.config.scale_factor_batches)
        return {"scale_factor": scale}

    def use(self, prepared: dict[str, Any]) -> None:
        self.model_config["scale_factor"] = prepared["scale_factor"]
        first_stage = dataclasses.replace(
            self.model.first_stage, scale=np.float32(prepared["scale_factor"])
        )
        self._set(dataclasses.replace(self.model, first_stage=first_stage))

    def init(self, key: jax.Array) -> Any:
        params = init_params(self.model, key)
        if self.conditioner_params is not None:
            del params["conditioner"]
        if self.config.loss.learn_logvar:
            params["logvar"] = jnp.full(self.model.schedule.timesteps, self.config.loss.logvar_init)
        return params

    def make_step(self, tx: Any, *, seed: int, ema: float, parts: int) -> Callable[..., Any]:
        return diffusion_step.make_step(
            self.model, tx, self.config.loss, seed=seed, ema=ema, parts=parts
        )

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        what = "moments" if "moments" in raw else "image"  # from the latent cache, or from pictures
        rows = first_row + np.arange(len(raw[what]), dtype=np.int32)
        return {what: raw[what], "row": rows, "encoded": self.conditions.encode(raw)}

    def evaluate(self, weights: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        loss = diffusion_step.make_loss(self.model, self.config.loss, self.config.seed + 1)
        return loss(weights, frozen, batch, jnp.int32(0), train=False)[1]

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        """Rows of eight held-out pictures: their conditions, where those can be drawn, samples made of them, the pictures, what the first stage
        keeps of them. Samples of ``preview_captions`` go before. Then, of a first stage with a codebook, the first eight samples again, each step
        brought to the codes; and last the first sample on its way, the x0 that its steps predict.
        """
        sampling = self.model_config["sampling"]
        params = weights | (
            {} if self.conditioner_params is None else {"conditioner": frozen["conditioner"]}
        )
        raw = {name: values[:16] for name, values in raw.items()}
        captions = list(self.config.preview_captions) if self.conditions.condition is None else []
        asked = {"caption": captions} if captions else raw
        encoded = self.conditions.encode(asked)
        n = len(asked["caption"])
        null = self.model.conditioner.encode_null(n)
        image = mask = None
        if isinstance(
            self.conditions.condition, Mask
        ):  # as a pipeline asks: what is told of them is made in the program
            image, mask = raw["image"], raw["condition"]
            encoded, null = (
                part["text"] if isinstance(part, dict) else None for part in (encoded, null)
            )
        steps = min(25, self.model.schedule.timesteps)
        grid = step_grid("uniform", steps, self.model.schedule.timesteps)
        noise = {name: sampling[name] for name in ("eta", "temperature") if name in sampling}
        nodes = SAMPLERS["ddim"].nodes(self.model.schedule, grid, **noise)
        guidance = np.full(n, sampling["guidance"], np.float32)
        rows_in = Rows(
            np.arange(n, dtype=np.uint32), encoded, null, guidance, image=image, mask=mask
        )
        model = dataclasses.replace(self.model, params=params, first_stage=frozen["first_stage"])
        form = Form(tuple(sampling["size"]), progress=_spread(steps, COLUMNS), progress_rows=1)
        made = _preview(model, nodes, rows_in, form)
        samples = fetch(made.images)
        pixels = {name: raw[name] for name in ("image", "moments") if name in raw}
        kept = (
            None
            if self.model.first_stage.module is None
            else fetch(_reconstruct(frozen["first_stage"], pixels))
        )
        shown = draw_conditions(self.conditions.condition, raw)
        rows = (
            _rows(samples) + _rows(raw.get("image"), kept)
            if captions
            else _rows(shown, samples, raw.get("image"), kept)
        )
        if isinstance(self.model.first_stage.module, VQModelInterface):
            first = jax.tree.map(lambda a: a[:COLUMNS], rows_in)
            rows.append(fetch(_preview(model, nodes, first, Form(form.size, quantize=True)).images))
        return pictures.sheet([*rows, fetch(made.progress)[0]])

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        kept = {} if self.conditioner_params is None else {"conditioner": self.conditioner_params}
        return self.model_config, {
            **weights,
            **kept,
            "first_stage": self.frozen["first_stage"].params,
        }

    def adopt(self, config: dict[str, Any], params: Any) -> Any:
        """Its scale factor too: the UNet has learnt latents of that size."""
        if "scale_factor" in config:
            self.model_config.setdefault("scale_factor", config["scale_factor"])
        return {
            name: part for name, part in params.items() if name in ("unet", "conditioner", "logvar")
        }


def first_stage_shapes(model: dict[str, Any], path: str | None) -> Any:
    """Shapes of the first stage's parameters. Its architecture is that of the model directory at ``path``, where there is one, and of ``model``."""
    if path:
        try:
            model["first_stage"] = {
                **read_config(find_model(path))["first_stage"],
                **model["first_stage"],
            }
        except CheckpointError as error:
            if "kind" not in model["first_stage"]:
                raise ConfigError(
                    f"{error}; or give the architecture in model.first_stage, to plan without it"
                ) from None
    module = build_first_stage(model)
    return (
        None
        if module is None
        else jax.eval_shape(partial(init_autoencoder, module), jax.random.key(0))
    )


def frozen_shapes(conditioner: dict[str, Any]) -> Any:
    """What `load_frozen` gives, as shapes."""
    if conditioner.get("kind") == "hybrid" and isinstance(conditioner.get("text"), dict):
        return frozen_shapes(conditioner["text"])
    conditioner.pop("path", None)
    if not conditioner.pop("frozen", False):
        return None
    return jax.eval_shape(build_conditioner({"conditioner": conditioner}).init, jax.random.key(0))


@jax.jit(static_argnums=3)
def _preview(model: Any, nodes: Any, rows: Rows, form: Form) -> Made:
    return generate(model, SAMPLERS["ddim"], Plan(nodes), rows, form)


@jax.jit
def _reconstruct(stage: Any, batch: Any) -> jax.Array:
    return to_uint8(stage.decode(stage.latents(diffusion_step.read_moments(stage, batch))))


def _spread(n: int, most: int) -> tuple[int, ...]:
    """At most so many of 0 ... n - 1, evenly spread, the first and the last among them."""
    return tuple(int(i) for i in np.linspace(0, n - 1, min(n, most)).round())


def _rows(*kinds: np.ndarray | None) -> list[np.ndarray]:
    """Pictures of several kinds, uint8 [n, H, W, 3] or None each -> rows of `COLUMNS`, what belongs together one above the other."""
    there = [kind for kind in kinds if kind is not None]
    return [
        kind[i : i + COLUMNS]
        for i in range(0, len(there[0]) if there else 0, COLUMNS)
        for kind in there
    ]


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict as the plain dict that JSON would give back."""
    return json.loads(config.to_json_best_effort())


TASKS = {"autoencoder": AutoencoderTask, "diffusion": DiffusionTask}
