"""The latent diffusion stage: a UNet and its conditioner, on latents of a frozen first stage."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import RowCondition
from ldm_jax.conditioning.config import (
    check_sizes,
    complete_model,
    frozen_conditioner,
    row_condition,
)
from ldm_jax.data.buckets import batch_sizes, make_buckets
from ldm_jax.data.captions import CAPTION_SETTINGS
from ldm_jax.diffusion import objective as obj
from ldm_jax.diffusion.samplers import SAMPLERS, step_grid
from ldm_jax.diffusion.schedule import condition_timesteps, q_sample
from ldm_jax.distributed.processes import fetch
from ldm_jax.errors import CheckpointError, ConfigError, DataError
from ldm_jax.io import png
from ldm_jax.io.checkpoint import find_model, load_model, read_config
from ldm_jax.kernels import for_platform
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import build, build_first_stage, init_params
from ldm_jax.models.ldm import LatentDiffusion, to_float, to_uint8
from ldm_jax.models.vqgan import VQModelInterface
from ldm_jax.sampling.inputs import Inputs
from ldm_jax.sampling.program import Pictures, SamplingConfig, Steps, generate
from ldm_jax.train.state import normal_rows, row_keys
from ldm_jax.train.tasks.base import (
    Batches,
    Cache,
    Task,
    check_cacheable,
    check_choices,
    plain,
    preview_rows,
)

LOG = logging.getLogger(__name__)

# Purposes of a row's random numbers: each key is used once.
POSTERIOR, TIMESTEP, NOISE, CAPTION, OFFSET, CONDITION = range(6)

# Settings of data that change no record of a latent cache: where it is, how pictures are read, and
# what training draws from a record (the first caption template is that of the kept tokens).
UNCACHED_SETTINGS = ("cache", "num_workers", "flip", "prior", *CAPTION_SETTINGS)


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionTask(Task):
    """Trains a UNet, and its conditioner unless that is frozen.

    Attributes:
      config: The config.
      model: The model; its parameters are those of the state, but for the first stage's.
      model_config: The ``config.json`` of the model that it becomes.
      condition: Makes the condition of a training row; None where that is the caption or nothing.
      conditioner_params: Parameters of a frozen conditioner.
    """

    config: Any
    model: LatentDiffusion
    model_config: dict[str, Any]
    condition: RowCondition | None
    conditioner_params: Any = None

    headline: ClassVar[tuple[str, ...]] = ("loss", "loss_simple")
    bins: ClassVar[tuple[str, ...]] = tuple(f"loss_simple_q{quarter}" for quarter in range(1, 5))
    any_size: ClassVar[bool] = True

    # ------------------------------------------------------------------------------ construction

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Returns the fields of a diffusion stage."""
        return {
            "scale_factor_batches": 64,  # batches that the latents' scale is measured on
            "preview_captions": (),  # prompts of previews; (): captions of held-out images
            # DreamBooth's prior preservation (arXiv:2208.12242, equation 2): half of each batch are
            # pictures of the class. Other fields of "data" may differ too, such as "caption".
            "data": {"prior": {"path": "", "caption": "{text}", "weight": 1.0}},
            "loss": {
                "kind": "l2",  # or "l1", "huber"
                "huber_c": 0.1,  # where "huber" turns from a parabola to a line
                "posterior": "sample",  # of the first stage; or "mode"
                "simple_weight": 1.0,
                "elbo_weight": 0.0,
                "logvar_init": 0.0,
                "learn_logvar": False,
                "min_snr_gamma": 0.0,  # 0: all timesteps have the same weight
                "p2_gamma": 0.0,  # the same; 0.5 or 1 are usual (arXiv:2204.00227)
                "p2_k": 1.0,
                # Above 1, noisy timesteps are drawn more often (arXiv:2403.03206, equation 23).
                "timestep_shift": 1.0,
                "timesteps": "uniform",  # or "logit_normal" (arXiv:2403.03206, equation 19)
                "logit_mean": 0.0,
                "logit_std": 1.0,
                "caption_dropout": 0.1,  # of any condition, for classifier-free guidance
                "offset_noise": 0.0,  # standard deviation of the per-channel noise offset
                # Above 1, the condition is noised too, at so many levels (num_timesteps_cond).
                "condition_levels": 1,
            },
        }

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks the choices among names."""
        check_choices(
            config,
            {
                "loss.kind": obj.POINTWISE,
                "loss.posterior": ("sample", "mode"),
                "loss.timesteps": ("uniform", "logit_normal"),
            },
        )
        prior = config.data.prior
        if prior.path and (config.batch_size % 2 or config.data.cache):
            raise ConfigError(
                "data.prior needs an even batch_size, and pictures: leave data.cache empty"
            )
        if prior.path and make_buckets(plain(config.data)) is not None:
            raise ConfigError(
                "data.prior mixes pictures of one size: leave data.prior or data.buckets empty"
            )
        if prior.path and not prior.weight > 0:
            raise ConfigError(f"data.prior.weight must be above 0, not {prior.weight}")
        loss = config.loss
        for name in ("huber_c", "logit_std", "p2_k"):
            if loss[name] <= 0:
                raise ConfigError(f"loss.{name} must be above 0, not {loss[name]}")
        if loss.min_snr_gamma and loss.p2_gamma:
            raise ConfigError("loss.min_snr_gamma and loss.p2_gamma both weigh timesteps: set one")

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> Self:
        """Builds the model; first stage and frozen conditioner come from their directories."""
        model = plain(config.model)
        path, first_stage = model["first_stage"].pop("path", None), None
        if not weights:
            model["first_stage"], first_stage = first_stage_shapes(model["first_stage"], path)
        elif path:
            saved, params = load_model(find_model(path))
            first_stage = params["first_stage"]
            model["first_stage"] = {**saved["first_stage"], **model["first_stage"]}
        elif model["first_stage"].get("kind") != "identity":
            raise ConfigError(
                "model.first_stage.path is missing: "
                "train a first stage and give its model directory"
            )
        model["conditioner"], frozen = frozen_conditioner(model["conditioner"], weights)
        return cls.of_model(config, model, first_stage, frozen)

    @classmethod
    def of_model(
        cls, config: Any, model: dict[str, Any], first_stage: Any, conditioner: Any = None
    ) -> Self:
        """Builds the task of a model.

        Args:
          config: The config.
          model: The model's own config, with a whole section "first_stage".
          first_stage: Parameters of the first stage, or their shapes.
          conditioner: Those of a frozen conditioner.
        """
        condition = row_condition(plain(config))
        model = complete_model(model, condition, config.loss.caption_dropout)
        if model["schedule"].get("zero_terminal_snr") and model["objective"] == "eps":
            raise ConfigError(
                "model.schedule.zero_terminal_snr: its last step is pure noise, from which eps "
                "learns nothing: set model.objective='v'"
            )
        model = {"kind": "latent_diffusion", **model}
        built = build(model, None, first_stage, config.dtype, config.remat)
        built = built.with_kernels(for_platform(jax.default_backend()))
        for size in batch_sizes(plain(config.data)):
            check_sizes(built, size)
        levels = config.loss.condition_levels
        if not 1 <= levels <= built.schedule.timesteps or (
            levels > 1 and built.conditioner.gives_vector
        ):
            raise ConfigError(
                f"loss.condition_levels {levels}: give a number from 1 to the schedule's "
                f"{built.schedule.timesteps} timesteps, and 1 where the condition is a class number"
            )
        return cls(config, built, model, condition, conditioner)

    def measure(self, batches: Batches) -> dict[str, Any]:
        """Measures the scale factor of the latents, unless the config gives it."""
        if "scale_factor" in self.model_config:
            return {"scale_factor": self.model_config["scale_factor"]}
        stage, n = dataclasses.replace(self.model.first_stage, scale=1.0), self.config
        scale = scale_factor(stage, list(batches(n.scale_factor_batches)), n.seed)
        LOG.info("scale factor %.5f, from %d batches", scale, n.scale_factor_batches)
        return {"scale_factor": scale}

    def with_measured(self, measured: Mapping[str, Any]) -> "DiffusionTask":
        """Returns the task with its scale factor."""
        scale = measured.get("scale_factor", 1.0)
        stage = dataclasses.replace(self.model.first_stage, scale=np.float32(scale))
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, first_stage=stage),
            model_config={**self.model_config, "scale_factor": scale},
        )

    def check_rows(self, loader: Any) -> None:
        """A model of captions needs one at least that is not empty."""
        if self.condition is not None:
            self.condition.check()
        takes_captions = self.model.conditioner.field == "prompts"
        if not takes_captions or self.config.loss.caption_dropout >= 1:
            return
        source, captions = loader.source, loader.captions
        if getattr(source, "window", 0):  # streamed: its rows are not known
            return
        if captions is None or not any(captions(row).strip() for row in source.rows):
            columns = ", ".join(source.rows[0]) if len(source) else "none"
            raise DataError(
                f"{source.path}: every caption is empty: set data.text to the column of captions, "
                f"data.caption to a template over the columns {columns}, or "
                "model.conditioner.kind='none' to train without text"
            )

    def adopt(self, config: dict[str, Any], params: Any) -> tuple["DiffusionTask", Any]:
        """Takes the scale factor too: the UNet has learned latents of that scale."""
        scale = {k: config[k] for k in ("scale_factor",) if k in config}
        task = dataclasses.replace(self, model_config={**scale, **self.model_config})
        return task, {k: params[k] for k in ("unet", "conditioner", "logvar") if k in params}

    # -------------------------------------------------------------------------------- parameters

    @property
    def frozen(self) -> dict[str, Any]:
        """The first stage, the null condition of one row, and a frozen conditioner."""
        null = self.model.conditioner.null_row()
        frozen = {"first_stage": self.model.first_stage, "null": null}
        if self.conditioner_params is not None:
            frozen["conditioner"] = self.conditioner_params
        return frozen

    def init(self, key: jax.Array) -> Any:
        """Returns the parameters of UNet and conditioner, and "logvar" where it is learned."""
        params = init_params(self.model, key)
        if self.conditioner_params is not None:
            del params["conditioner"]
        if self.config.loss.learn_logvar:
            params["logvar"] = jnp.full(self.model.schedule.timesteps, self.config.loss.logvar_init)
        return params

    # ---------------------------------------------------------------------------------- the loss

    def loss(
        self, params: Any, frozen: Any, batch: Any, step: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss of one batch.

        Args:
          params: Of `init`.
          frozen: Of the property.
          batch: "image" uint8 [b, H, W, 3], or "moments" [b, h, w, c] of the latent cache;
            "encoded" conditions [b, ...], and "mask" uint8 [b, H, W, 1] for those of a masked
            picture; "row" int32 [b], each row's place in the global batch; maybe "weight" float32
            [b], the rows' weights in the loss.
          step: The training step.
          train: With dropout of conditions and of activations. An evaluation draws all timesteps
            alike.
        """
        model, config = self.model, self.config.loss
        first_stage = frozen["first_stage"].with_kernels(model.unet.kernels)
        schedule, seed = model.schedule, self.config.seed + (not train)
        keys = row_keys(seed, step, batch["row"])
        moments = jax.lax.stop_gradient(read_moments(first_stage, batch))
        shape = (*moments.shape[1:3], first_stage.channels)
        spread = normal_rows(keys, POSTERIOR, shape) if config.posterior == "sample" else None
        z = first_stage.latents(moments, spread)

        def uniform(purpose: int) -> jax.Array:
            return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, purpose)))(keys)

        u = uniform(TIMESTEP)
        if train and config.timesteps == "logit_normal":
            u = logit_normal(u, config.logit_mean, config.logit_std)
        t = draw_timesteps(u, schedule.timesteps, config.timestep_shift if train else 1.0)
        noise = normal_rows(keys, NOISE, shape)
        if config.offset_noise:
            offset = normal_rows(keys, OFFSET, (1, 1, first_stage.channels))
            noise = noise + config.offset_noise * offset
        encoded, rngs = batch["encoded"], None
        if train:
            rngs = {"dropout": jax.random.fold_in(jax.random.key(seed), step)}
            if config.caption_dropout:
                drop = uniform(CAPTION) < config.caption_dropout
                encoded = model.conditioner.drop(encoded, frozen["null"], drop)
        encoded = prepare_conditions(model, first_stage, {**batch, "encoded": encoded})
        conditioner = frozen["conditioner"] if "conditioner" in frozen else params["conditioner"]
        cond = model.conditioner(conditioner, encoded, train=train, rngs=rngs)
        if config.condition_levels > 1:
            levels = jnp.asarray(condition_timesteps(schedule.timesteps, config.condition_levels))
            cond = jax.tree.map(
                lambda c: q_sample(
                    schedule, c, levels[t], normal_rows(keys, CONDITION, c.shape[1:])
                ),
                cond,
            )
        out = model.apply(params, q_sample(schedule, z, t, noise), t, cond, train=train, rngs=rngs)
        target = obj.target(model.objective, schedule, z, noise, t)
        errors = obj.pointwise(config.kind, out, target, config.huber_c)
        if "weight" in batch:
            errors = errors * batch["weight"]
        logvar = jnp.full(schedule.timesteps, config.logvar_init)
        with jax.ensure_compile_time_eval():  # tables of the schedule: constants of the program
            elbo = obj.elbo_weights(model.objective, schedule)
            weights = timestep_weights(config, model.objective, schedule)
        loss, parts = obj.diffusion_loss(
            errors,
            t,
            elbo=elbo,
            simple_weight=config.simple_weight,
            elbo_weight=config.elbo_weight,
            weights=weights,
            logvar=params.get("logvar", logvar),
        )
        return loss, parts if train else parts | by_quarter(errors, t, schedule.timesteps)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Returns the means with the errors of each quarter of the timesteps."""
        return mean_of_quarters(means)

    def host_batch(self, raw: dict[str, Any], first_row: int = 0) -> dict[str, Any]:
        """Returns the arrays that `loss` takes."""
        kept = "moments" if "moments" in raw else "image"
        rows = first_row + np.arange(len(raw[kept]), dtype=np.int32)
        own = {name: raw[name] for name in (kept, "weight") if name in raw}
        return {**own, "row": rows, **self.model.conditioner.encode_rows(raw)}

    def example_batch(self, cached: bool = False) -> dict[str, Any]:
        """Returns a batch of one row; the null condition has the shapes of any other."""
        size = tuple(self.config.data.size)
        raw: dict[str, Any] = {"image": np.zeros((1, *size, 3), np.uint8)}
        raw |= self.model.conditioner.example_rows(size)
        if cached:
            pixels = jax.ShapeDtypeStruct(raw.pop("image").shape, jnp.float32)
            moments = jax.eval_shape(
                lambda stage, x: stage.moments(x), self.model.first_stage, pixels
            )
            raw["moments"] = np.zeros(moments.shape, np.float16)
        return self.host_batch(raw)

    # ----------------------------------------------------------------------------- latent caches

    def cache(self, dtype: str = "float16") -> Cache:
        """Returns what is kept: moments, with those of the mirror image, and tokens."""
        config, stage, conditioner = self.config, self.model.first_stage, self.model.conditioner
        if stage.module is None:
            raise ConfigError("model.first_stage is the identity: there is nothing to encode")
        if config.data.prior.path:
            raise ConfigError("data.prior is read from pictures: a latent cache holds none of it")
        check_cacheable(config, conditioner)

        def encode(first_stage: Any, image: jax.Array) -> jax.Array:
            sides = [image, image[:, :, ::-1]] if config.data.flip else [image]
            moments = [first_stage.moments(to_float(side)) for side in sides]
            return jnp.stack(moments, axis=1).astype(dtype)

        def host_arrays(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
            encoded = conditioner.encode_rows(batch) if "encoded" in fields else {}
            return {name: {**batch, **encoded}[name] for name in conditioner.cache_fields()}

        pixels = jax.ShapeDtypeStruct((1, *config.data.size, 3), jnp.uint8)
        moments = jax.eval_shape(encode, stage, pixels)
        fields = {"moments": {"dtype": dtype, "shape": moments.shape[1:]}}
        fields |= conditioner.cache_fields()
        return Cache(self.cache_key(), fields, encode, stage, host_arrays)

    def cache_key(self) -> dict[str, Any]:
        """Returns what the records depend on."""
        data = plain(self.config.data)
        if make_buckets(data) is None:
            data["buckets"] = None
        data = {k: v for k, v in data.items() if k not in UNCACHED_SETTINGS}
        data |= {"caption": self.config.data.caption, "path": Path(self.config.data.path).name}
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self.model.first_stage.params):
            array = np.asarray(leaf)
            name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
            digest.update(name.encode() + array.tobytes())
        key = {f"data.{name}": value for name, value in data.items()}
        return key | {
            "model.classes": self.model_config.get("classes"),
            "model.conditioner.kind": self.model_config["conditioner"]["kind"],
            "tokens per caption": None,  # unless the conditioner says otherwise
            "first stage sha256": digest.hexdigest(),
            **self.model.conditioner.cache_key(),
        }

    # ----------------------------------------------------------------------------------- results

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any], columns: int = 8) -> Any:
        """Returns samples of held-out conditions, or of ``preview_captions``.

        The rows, of eight pictures: drawn conditions, samples, the held-out pictures, and their
        reconstructions by the first stage. With a codebook follow the first samples again, with
        every predicted x0 quantised. Last are the predicted x0 of the first sample's steps.
        """
        sampling, params = self.model_config["sampling"], dict(weights)
        if self.conditioner_params is not None:
            params["conditioner"] = frozen["conditioner"]
        raw = {name: values[:16] for name, values in raw.items()}
        condition, conditioner = self.condition, self.model.conditioner
        captions = list(self.config.preview_captions) if condition is None else []
        wanted = {"caption": captions} if captions else raw
        conditions, n = conditioner.encode_rows(wanted), len(wanted["caption"])
        encoded, mask = conditions["encoded"], conditions.get("mask")
        null = jax.tree.map(
            lambda rows: np.broadcast_to(rows, (n, *rows.shape[1:])), conditioner.null_row(encoded)
        )
        image = None if mask is None else raw["image"]
        steps = min(25, self.model.schedule.timesteps)
        grid = step_grid("uniform", steps, self.model.schedule.timesteps)
        noise = {name: sampling[name] for name in ("eta", "temperature") if name in sampling}
        nodes = SAMPLERS["ddim"].nodes(self.model.schedule, grid, **noise)
        guidance = np.full(n, sampling["guidance"], np.float32)
        seeds = np.arange(n, dtype=np.uint32)
        inputs = Inputs(seeds, encoded, null, guidance, image=image, mask=mask)
        stage = frozen["first_stage"].with_kernels(self.model.unet.kernels)
        model = dataclasses.replace(self.model, params=params, first_stage=stage)
        shown = np.linspace(0, steps - 1, min(steps, columns)).round().astype(int).tolist()
        size = tuple(sampling["size"])
        if make_buckets(plain(self.config.data)) is not None and "image" in raw:
            size = raw["image"].shape[1:3]  # that of the conditions
        config = SamplingConfig(size, progress=tuple(shown), progress_rows=1)
        made = sample_preview(model, nodes, inputs, config)
        samples, kept = fetch(made.images), None
        if self.model.first_stage.module is not None:
            pixels = {name: raw[name] for name in ("image", "moments") if name in raw}
            kept = fetch(reconstruct(stage, pixels))
        drawn = None
        if condition is not None and "image" in raw:
            drawn = condition.draw(raw["image"], raw["condition"])
        sheet = (
            preview_rows(samples) + preview_rows(raw.get("image"), kept)
            if captions
            else preview_rows(drawn, samples, raw.get("image"), kept)
        )
        if isinstance(self.model.first_stage.module, VQModelInterface):
            first = jax.tree.map(lambda a: a[:columns], inputs)
            config = SamplingConfig(config.size, quantize=True)
            quantized = sample_preview(model, nodes, first, config)
            sheet.append(fetch(quantized.images))
        return png.sheet([*sheet, fetch(made.progress)[0]])

    def sampling_model(self) -> LatentDiffusion | None:
        """Returns the model."""
        return self.model

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """Exports the whole model, with its first stage and conditioner."""
        params = {**weights, "first_stage": self.model.first_stage.params}
        if self.conditioner_params is not None:
            params["conditioner"] = self.conditioner_params
        return self.model_config, params


def first_stage_shapes(fields: dict[str, Any], path: str | None) -> tuple[dict[str, Any], Any]:
    """Returns a first stage's config and the shapes of its parameters, without reading them.

    Args:
      fields: The config's "first_stage".
      path: Its model directory, whose config completes ``fields``.
    """
    if path:
        try:
            fields = {**read_config(find_model(path))["first_stage"], **fields}
        except CheckpointError as error:
            if "kind" not in fields:
                raise ConfigError(
                    f"{error}; or give the architecture in model.first_stage, to plan without it"
                ) from None
    module = build_first_stage({"first_stage": fields})
    if module is None:
        return fields, None
    return fields, jax.eval_shape(partial(init_autoencoder, module), jax.random.key(0))


def timestep_weights(loss: Any, objective: str, schedule: Any) -> np.ndarray | None:
    """Returns the weights [T] of a config's "loss"; None where all are 1."""
    if loss.min_snr_gamma:
        return obj.min_snr_weights(objective, schedule, loss.min_snr_gamma)
    if loss.p2_gamma:
        return obj.p2_weights(objective, schedule, loss.p2_gamma, loss.p2_k)
    return None


def by_quarter(errors: jax.Array, t: jax.Array, timesteps: int) -> dict[str, jax.Array]:
    """Returns sums over the batch, divided by its size, of each quarter of the timesteps.

    Args:
      errors: [b].
      t: Timesteps [b].
      timesteps: Their number.
    """
    quarter = jnp.minimum(4 * t // timesteps, 3)
    found = {}
    for i in range(4):
        inside = quarter == i
        found[f"quarter{i + 1}_share"] = inside.mean()
        found[f"quarter{i + 1}_error"] = jnp.where(inside, errors, 0.0).mean()
    return found


def mean_of_quarters(means: dict[str, float]) -> dict[str, float]:
    """Replaces the means of `by_quarter` by "loss_simple_q1" to "loss_simple_q4".

    The first quarter has the least noise. A quarter without a sample is left out.
    """
    kept = {name: value for name, value in means.items() if not name.startswith("quarter")}
    for i in range(1, 5):
        share = means.get(f"quarter{i}_share", 0.0)
        if share > 0:
            kept[f"loss_simple_q{i}"] = means[f"quarter{i}_error"] / share
    return kept


def logit_normal(u: jax.Array, mean: float, std: float) -> jax.Array:
    """Uniform numbers [b] -> numbers in (0, 1) with normal logits (arXiv:2403.03206, eq. 19)."""
    return jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1 - 1e-6)))


def draw_timesteps(u: jax.Array, timesteps: int, shift: float) -> jax.Array:
    """Returns timesteps int32 [b] from uniform numbers (arXiv:2403.03206, equation 23).

    Args:
      u: Uniform in [0, 1), [b].
      timesteps: Their number.
      shift: s; above 1 the higher timesteps are more frequent: s u / (1 + (s - 1) u) of all. Half
        of them lie above s / (1 + s).
    """
    at = shift * u / (1 + (shift - 1) * u)
    return jnp.minimum((at * timesteps).astype(jnp.int32), timesteps - 1)


def prepare_conditions(model: LatentDiffusion, first_stage: Any, batch: Any) -> Any:
    """Returns the batch's "encoded" conditions with the part that is made of its pictures."""
    image = to_float(batch["image"]) if "image" in batch else None
    return jax.lax.stop_gradient(
        model.conditioner.with_picture(batch["encoded"], first_stage, image, batch.get("mask"))
    )


def read_moments(first_stage: Any, batch: Any) -> jax.Array:
    """Returns a batch's "moments" of the latent cache, or those of its "image"."""
    if "moments" in batch:
        return batch["moments"].astype(jnp.float32)
    return first_stage.moments(to_float(batch["image"]))


def scale_factor(first_stage: Any, batches: list[dict[str, np.ndarray]], seed: int) -> float:
    """Returns 1 / standard deviation of the unscaled latents of all ``batches``.

    Rombach et al. 2022 (arXiv:2112.10752), section G, from several batches instead of the first.

    Args:
      first_stage: With scale 1.
      batches: Each has "image" or "moments".
      seed: Of the posterior samples.
    """

    @jax.jit
    def moments_of(first_stage: Any, batch: Any, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        moments = read_moments(first_stage, batch)
        b, h, w, _ = moments.shape
        keys = row_keys(seed, step, jnp.arange(b))
        z = first_stage.latents(moments, normal_rows(keys, POSTERIOR, (h, w, first_stage.channels)))
        return z.mean(), jnp.square(z).mean()

    arrays = [{k: batch[k] for k in ("image", "moments") if k in batch} for batch in batches]
    each = [moments_of(first_stage, batch, i) for i, batch in enumerate(arrays)]
    mean, square = np.array(each, np.float64).mean(0)
    return float(1.0 / np.sqrt(square - mean**2))


@jax.jit(static_argnums=3)
def sample_preview(model: Any, nodes: Any, inputs: Inputs, config: SamplingConfig) -> Pictures:
    """Samples with DDIM."""
    return generate(model, SAMPLERS["ddim"], Steps(nodes), inputs, config)


@jax.jit
def reconstruct(first_stage: Any, batch: Any) -> jax.Array:
    """Returns what the first stage keeps of a batch, uint8 [b, H, W, 3]."""
    return to_uint8(first_stage.decode(first_stage.latents(read_moments(first_stage, batch))))
