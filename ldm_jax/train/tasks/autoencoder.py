"""The first stage: an autoencoder, KL or VQ, with or without a discriminator."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_jax.data.buckets import batch_sizes, make_buckets
from ldm_jax.data.pixels import as_rgb, pixel_format
from ldm_jax.distributed.processes import fetch
from ldm_jax.errors import ConfigError
from ldm_jax.io import png
from ldm_jax.io.paths import local_copy
from ldm_jax.kernels import for_platform
from ldm_jax.models.autoencoder import (
    AutoencoderKL,
    init_autoencoder,
    init_variables,
    latent_shape,
)
from ldm_jax.models.build import DTYPES, build_first_stage
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.ldm import apply, to_float, to_uint8
from ldm_jax.models.perceptual import LPIPS, load_lpips
from ldm_jax.models.quantize import perplexity, share_of
from ldm_jax.models.vqgan import VQModelInterface
from ldm_jax.nn.layers import with_kernels
from ldm_jax.train.optim import make_optimizer
from ldm_jax.train.state import (
    TrainState,
    apply_gradients,
    averaged,
    extra_of,
    mean_over_devices,
    normal_rows,
    row_keys,
    scan_parts,
)
from ldm_jax.train.tasks.adversarial import (
    DISCRIMINATOR_LOSSES,
    Adversary,
    discriminator_gradients,
    generator_gradients,
    judge,
    make_nll,
    update_discriminator,
)
from ldm_jax.train.tasks.base import (
    Task,
    check_choices,
    not_finite,
    plain,
    preview_rows,
)
from ldm_jax.train.tasks.batch_resize import BatchResize, resized
from ldm_jax.train.tasks.codebook import (
    DEAD,
    candidate_count,
    candidate_places,
    restart_codes,
    update_usage,
)

LOG = logging.getLogger(__name__)

# Purposes of random numbers; a key is used once. The two passes of updates="parity" draw their own,
# as in the original.
GENERATOR, DISCRIMINATOR, CODES, PERCEPTUAL = range(4)
OF_BATCH = 2**31  # fold_in value for draws of the whole batch; larger than any row index
GUARD_DECAY = 0.99  # of the guard's average of the reconstruction loss


class Aux(NamedTuple):
    """What a forward pass returns beside its loss.

    Attributes:
      collections: Flax collections beside the parameters.
      share: The share of the batch that chose each code, [n]; VQ only.
      candidates: Encodings [b, k, c] that may become codes; VQ only.
    """

    collections: dict[str, Any]
    share: jax.Array | None = None
    candidates: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class AutoencoderTask(Task):
    """Trains a first stage.

    The state's ``extra`` has, as far as they apply: "discriminator" (variables and optimiser),
    "collections" (an averaged codebook), "usage" of codes, and "guard".

    Attributes:
      config: The config.
      module: The autoencoder.
      adversary: The discriminator, if there is one.
      disc_tx: Its optimiser.
      lpips: The perceptual distance; its parameters are ``frozen["perceptual"]``.
      lpips_params: Its parameters.
    """

    config: Any
    module: AutoencoderKL | VQModelInterface
    adversary: Adversary | None = None
    disc_tx: optax.GradientTransformation | None = None
    lpips: LPIPS | None = None
    lpips_params: Any = None

    watched: ClassVar[tuple[str, ...]] = (
        *("loss", "grad_norm", "disc_loss", "disc_grad_norm", "rise", "d_weight", "disc_factor"),
    )
    headline: ClassVar[tuple[str, ...]] = ("loss", "psnr")
    free_settings: ClassVar[tuple[str, ...]] = ("adversary.alarm",)
    exported_part: ClassVar[str] = "first_stage"
    any_size: ClassVar[bool] = True
    any_pixels: ClassVar[bool] = True

    # ------------------------------------------------------------------------------ construction

    @staticmethod
    def defaults() -> dict[str, Any]:
        """Returns the fields of a first stage."""
        return {
            # "fused": one forward pass serves both optimisers; "parity": one each, as the original.
            "updates": "fused",
            # Smallest and largest size in pixels of square batches, in steps of 16: each step draws
            # one. (): all batches have data.size.
            "batch_resize": (),
            "loss": {
                "kind": "l1",  # or "l2"
                "kl_weight": 1e-6,
                "logvar_init": 0.0,
                "learn_logvar": False,  # the original's logvar is never optimised
                "perceptual_weight": 0.0,
                "vgg16": "",  # VGG16's convolutions, as safetensors
                "lpips_heads": "",  # LPIPS's linear heads, as safetensors
                # Drops half of the features that LPIPS compares, as the original's training does.
                "perceptual_dropout": False,
                "codebook_weight": 1.0,
                "restart_codes": False,  # move unused codes onto encodings of the batch
                "temperature": 1.0,  # of the Gumbel quantiser, annealed from here ...
                "temperature_final": 1.0,  # ... to here ...
                "temperature_steps": 1,  # ... over this many steps
            },
            "adversary": {
                "weight": 0.0,  # disc_weight; 0: no discriminator
                "start": 50_001,  # disc_start: the step at which it enters the loss
                "factor": 1.0,  # disc_factor
                "loss": "hinge",  # or "vanilla"
                "layers": 3,
                "channels": 64,
                "actnorm": False,  # instead of batch normalisation
                "lr_factor": 1.0,  # the discriminator's learning rate in parts of optim.lr
                "ramp": 0,  # steps over which the generator's term grows; 0: at once
                "cap": 0.0,  # maximum d_weight; 0: the original's 1e4 * weight
                "alarm": 0.0,  # log a warning when d_weight exceeds this; 0: never
            },
            "guard": {
                "rollbacks": 0,  # how often a diverged run returns to its last checkpoint
                "lower": 0.5,  # factor on the adversary's weight at each rollback
                # A run has diverged when a value is not finite or, if `rise` > 0, when the average
                # rec_loss exceeds `rise` times its minimum. No checkpoint is saved above
                # sqrt(rise).
                "rise": 0.0,
            },
        }

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks the choices among names."""
        check_choices(
            config,
            {
                "loss.kind": ("l1", "l2"),
                "updates": ("fused", "parity"),
                "adversary.loss": DISCRIMINATOR_LOSSES,
            },
        )
        channels, stage = config.data.channels, config.model.first_stage
        if cls.any_pixels:
            for name in ("in_channels", "out_ch"):
                if stage.get(name, 3) != channels:
                    raise ConfigError(
                        f"model.first_stage.{name} is {stage.get(name, 3)}: the pictures have "
                        f"{channels} channels (data.channels)"
                    )
        if channels != 3 and config.loss.perceptual_weight:
            raise ConfigError(
                "loss.perceptual_weight: LPIPS compares RGB pictures, and data.channels is "
                f"{channels}: set it to 0"
            )
        if config.data.cache:
            raise ConfigError(
                "data.cache holds latents, and a first stage trains on pictures: leave it empty"
            )

    @classmethod
    def from_config(cls, config: Any, weights: bool = True) -> "AutoencoderTask":
        """Builds the autoencoder, its discriminator and its perceptual distance."""
        fields = {"first_stage": config.model["first_stage"]}
        module = build_first_stage(fields, config.dtype, config.remat)
        if module is None:
            raise ConfigError("model.first_stage: the identity has nothing to train")
        quantizer = getattr(module, "quantizer", "kl")
        if config.loss.restart_codes and quantizer not in ("vq", "ema"):
            raise ConfigError(
                f"loss.restart_codes is for codebooks (vq, ema), not for {quantizer}: switch it off"
            )
        if getattr(module, "remap", None) is not None:
            raise ConfigError(
                "model.first_stage.remap lists the used codes of a trained model: "
                "leave it out to train"
            )
        if config.batch_resize:
            check_batch_resize(config, module.downsampling)
        for size in batch_sizes(plain(config.data)):
            if size[0] % module.downsampling or size[1] % module.downsampling:
                raise ConfigError(
                    f"pictures of {size} do not divide over the levels of this first stage: "
                    f"their sides must be multiples of {module.downsampling} pixels"
                )
        adversary = make_adversary(config)
        lpips = params = None
        if config.loss.perceptual_weight and config.loss.vgg16:
            if weights:
                files = config.loss.vgg16, config.loss.lpips_heads
                vgg, heads = (file and local_copy(file) for file in files)
                lpips, params = load_lpips(vgg, heads)
            else:
                lpips, pixels = LPIPS(), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
                params = jax.eval_shape(lpips.init, jax.random.key(0), pixels, pixels)["params"]
        elif config.loss.perceptual_weight:
            LOG.warning("without loss.vgg16 and loss.lpips_heads there is no perceptual term")
        optim = config.optim.copy_and_resolve_references()
        optim.lr = optim.lr * config.adversary.lr_factor
        disc_tx = None if adversary is None else make_optimizer(optim, config.steps)
        task = cls(config, module, adversary, disc_tx, lpips, params)
        return with_kernels(task, for_platform(jax.default_backend()))

    def on_axis(self, axis_name: str | None) -> "AutoencoderTask":
        """Returns the task with statistics over the devices of a pmap."""
        module = self.module
        if not isinstance(module, AutoencoderKL):
            module = module.clone(axis_name=axis_name)
        adversary = self.adversary and self.adversary.on_axis(axis_name)
        return dataclasses.replace(self, module=module, adversary=adversary)

    # -------------------------------------------------------------------------------- parameters

    @property
    def max_rollbacks(self) -> int:
        """The config's ``guard.rollbacks``."""
        return self.config.guard.rollbacks

    @property
    def frozen(self) -> dict[str, Any]:
        """The parameters of the perceptual distance."""
        return {} if self.lpips is None else {"perceptual": self.lpips_params}

    def init(self, key: jax.Array) -> Any:
        """Returns the autoencoder's parameters, and "logvar" where it is learned."""
        params, loss = init_autoencoder(self.module, key), self.config.loss
        logvar = {"logvar": jnp.float32(loss.logvar_init)} if loss.learn_logvar else {}
        return {**params, **logvar}

    def extra(self, key: jax.Array) -> dict[str, Any]:
        """Returns what the class describes. New codes start on encodings of the first batch."""
        module, extra = self.module, {}
        if not isinstance(module, AutoencoderKL):
            variables = init_variables(module, key)
            if collections := {k: part for k, part in variables.items() if k != "params"}:
                extra["collections"] = collections
            start = jnp.zeros if self.config.loss.restart_codes else jnp.ones
            extra["usage"] = start(module.make_quantizer().re_embed)
        if self.adversary is not None:
            assert self.disc_tx is not None
            x = jnp.zeros((1, 64, 64, module.out_ch))  # no shape depends on the side
            disc: Any = self.adversary.module.init(jax.random.fold_in(key, 1), x)
            extra["discriminator"] = {**disc, "opt_state": self.disc_tx.init(disc["params"])}
        if self.max_rollbacks > 0 or self.config.guard.rise > 0:
            extra["guard"] = {
                "recent": jnp.zeros(()),
                # With a dtype: a weak type would make the second step compile again.
                "lowest": jnp.full((), jnp.inf, jnp.float32),
                "rollbacks": jnp.zeros((), jnp.int32),
            }
        return extra

    def adopt(self, config: dict[str, Any], params: Any) -> tuple[Task, Any]:
        """Takes the first stage of a model directory."""
        return self, params.get("first_stage", {})

    def weights(self, state: TrainState) -> Any:
        """Returns all collections of the module."""
        return {"params": averaged(state), **extra_of(state).get("collections", {})}

    def example_batch(self, cached: bool = False) -> dict[str, Any]:
        """Returns a batch of one row."""
        if cached:
            self.cache()
        pixels = pixel_format(plain(self.config.data))
        shape = (1, *self.config.data.size, pixels.channels)
        return self.host_batch(
            {"image": np.zeros(shape, np.uint8 if pixels.is_plain else np.float32)}
        )

    def batch_at(self, raw: dict[str, Any], step: int) -> dict[str, Any]:
        """Resizes the batch to the size of its step, where the config has a range of sizes."""
        if not self.config.batch_resize:
            return raw
        size = BatchResize(*self.config.batch_resize).size_at(step, seed=self.config.seed)
        return {**raw, "image": resized(raw["image"], size)}

    # ---------------------------------------------------------------------------------- forward

    def pixels(self, batch: Any) -> jax.Array:
        """Returns what is reconstructed of a batch, [b, H, W, c]."""
        return to_float(batch["image"])

    def forward(
        self, params: Any, collections: Any, batch: Any, step: jax.Array, purpose: int, train: bool
    ) -> tuple[tuple[jax.Array, jax.Array], Aux]:
        """Reconstructs a batch.

        Args:
          params: The autoencoder's parameters.
          collections: Its other collections.
          batch: "image" [b, H, W, c], uint8 or float32 from 0 to 255; "row" int32 [b].
          step: The training step.
          purpose: GENERATOR or DISCRIMINATOR, which draw different noise.
          train: Whether anything is drawn; else KL takes the mode and Gumbel the likeliest code.

        Returns:
          ((y [b, H, W, c], penalty []), aux). The penalty is the KL divergence, summed over a
          latent and averaged over the batch, or the quantiser's loss.
        """
        module, seed = self.module, self.config.seed
        x, keys, rngs = self.pixels(batch), row_keys(seed, step, batch["row"]), None
        if train:
            key = jax.random.fold_in(jax.random.key(seed), step)
            rngs = {"dropout": key}
            if purpose != GENERATOR:
                rngs = {"dropout": jax.random.fold_in(key, OF_BATCH + purpose)}
        h, w, c = latent_shape(module, *x.shape[1:3])
        if isinstance(module, AutoencoderKL):
            spread = normal_rows(keys, purpose, (h, w, c)) if train else None
            y, posterior = apply(module, params, x, spread, train=train, rngs=rngs)
            return (y, posterior.kl().mean()), Aux(collections)

        n = module.make_quantizer().re_embed
        noise: dict[str, Any] = {}
        if module.quantizer == "gumbel" and train:
            draw = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, purpose), (h, w, n)))
            noise = {"gumbels": draw(keys), "temperature": temperature(self.config.loss, step)}
        (y, code, z), written = module.apply(
            {"params": params, **collections},
            x,
            train,
            **noise,
            method="reconstruct",
            mutable=list(collections) if train else [],
            rngs=rngs,
        )
        _, count, c = candidates_shape(module, x)
        places = jax.vmap(lambda k: candidate_places(jax.random.fold_in(k, CODES), count, h * w))
        z = jax.lax.stop_gradient(z).reshape(len(x), -1, c)
        candidates = jax.vmap(lambda z, at: z[at])(z, places(keys))
        share = share_of(code.indices, n)
        return (y, code.loss), Aux({**collections, **written}, share, candidates)

    def nll(self, x: jax.Array, frozen: Any, key: jax.Array | None = None) -> Any:
        """Returns the reconstruction loss against pictures x; see `make_nll`.

        Features of the perceptual distance are dropped with ``key``, where the config says so.
        """
        lpips, loss = self.lpips, self.config.loss
        drop: dict[str, Any] = {}
        if loss.perceptual_dropout and key is not None:
            drop = {"train": True, "rngs": {"dropout": key}}
        distance = lpips and (lambda a, b: apply(lpips, frozen["perceptual"], a, b, **drop))
        kl = isinstance(self.module, AutoencoderKL)
        return make_nll(x, loss.kind, loss.perceptual_weight, distance, kl)

    @property
    def penalty(self) -> tuple[str, float]:
        """The penalty's name among the metrics, and its weight."""
        if isinstance(self.module, AutoencoderKL):
            return "kl_loss", self.config.loss.kl_weight
        return "quant_loss", self.config.loss.codebook_weight

    # ---------------------------------------------------------------------------------- the step

    def make_step(self, tx: Any, parts: int) -> Callable[..., tuple[TrainState, dict]]:
        """Makes the step, which updates both networks, each by its optimiser.

        The original updates the autoencoder first and runs it again, with new noise, for the
        discriminator (updates="parity"). With "fused" one run serves both updates.
        """

        def step(
            state: TrainState, frozen: Any, batch: Any, *, axis_name: str | None = None
        ) -> tuple[TrainState, dict]:
            return self.on_axis(axis_name)._step(state, frozen, batch, tx, parts, axis_name)

        return step

    def _step(
        self, state: TrainState, frozen: Any, batch: Any, tx: Any, parts: int, axis: str | None
    ) -> tuple[TrainState, dict]:
        extra, at, adversary = extra_of(state), state.step, self.adversary
        fused = self.config.updates == "fused"
        carry: dict[str, Any] = {"collections": extra.get("collections", {})}
        carry |= {"discriminator": None, "candidates": None}
        if adversary is not None:
            stored = extra["discriminator"]
            carry["discriminator"] = {k: stored[k] for k in ("params", "batch_stats")}
        if not isinstance(self.module, AutoencoderKL):
            piece = self.pixels(batch)[: len(batch["row"]) // parts]
            carry["candidates"] = jnp.zeros(candidates_shape(self.module, piece))

        # ------------------------------------------------------------------------- the generator
        def generator(carry: dict[str, Any], piece: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            x, (name, weight) = self.pixels(piece), self.penalty
            key = jax.random.fold_in(jax.random.key(self.config.seed), at)

            def run(params: Any) -> Any:
                args = params, carry["collections"], piece, at, GENERATOR, True
                (y, penalty), aux = self.forward(*args)
                return (y, penalty), (penalty, aux)

            made = generator_gradients(
                run,
                state.params,
                self.nll(x, frozen, jax.random.fold_in(key, OF_BATCH + PERCEPTUAL)),
                penalty_weight=weight,
                logvar=self.config.loss.logvar_init,
                last_layer=lambda grads: grads["decoder"]["conv_out"]["kernel"],
                adversary=adversary,
                variables=carry["discriminator"],
                step=at,
                rollbacks=extra["guard"]["rollbacks"] if "guard" in extra else 0,
                axis_name=axis,
            )
            penalty, aux = made.aux
            metrics = {name: penalty, **made.metrics}
            results = {"grads": made.grads, "metrics": metrics, "share": aux.share}
            carry = carry | {"collections": aux.collections, "candidates": aux.candidates}
            if adversary is not None and made.fake is not None:
                carry["discriminator"] = made.fake.variables
                if fused:
                    real = judge(adversary.module, made.fake.variables, x)
                    carry["discriminator"] = real.variables
                    results["disc"] = discriminator_gradients(adversary, real, made.fake, at)
            return carry, results

        carry, results = scan_parts(generator, carry, batch, parts)
        results = mean_over_devices(results, axis)
        grads, metrics = results["grads"], results["metrics"]
        ema = self.config.ema, self.config.ema_warmup
        state, metrics = apply_gradients(state, grads, metrics, tx, *ema)

        # --------------------------------------------------------------------- the discriminator
        def discriminator(carry: dict[str, Any], piece: Any) -> tuple[dict[str, Any], Any]:
            assert adversary is not None
            args = state.params, carry["collections"], piece, at, DISCRIMINATOR, True
            (y, _), aux = self.forward(*args)
            real = judge(adversary.module, carry["discriminator"], self.pixels(piece))
            fake = judge(adversary.module, real.variables, y)
            carry = carry | {"collections": aux.collections, "discriminator": fake.variables}
            return carry, discriminator_gradients(adversary, real, fake, at)

        if adversary is not None:
            assert self.disc_tx is not None
            if not fused:
                carry, judged = scan_parts(discriminator, carry, batch, parts)
                results["disc"] = mean_over_devices(judged, axis)
            grads, disc_metrics = results["disc"]
            variables = {**extra["discriminator"], **carry["discriminator"]}
            variables, norm = update_discriminator(variables, grads, self.disc_tx)
            extra, metrics = {**extra, "discriminator": variables}, metrics | disc_metrics | norm

        # ------------------------------------------------------------------- the codes, the guard
        if carry["collections"]:
            extra = {**extra, "collections": carry["collections"]}
        if "usage" in extra:
            usage = update_usage(extra["usage"], results["share"])
            extra = {**extra, "usage": usage}
            metrics |= code_metrics(results["share"]) | {"codebook_use": jnp.mean(usage > DEAD)}
            if self.config.loss.restart_codes:
                key = jax.random.fold_in(jax.random.key(self.config.seed), at)
                key = jax.random.fold_in(key, OF_BATCH + CODES)
                state, extra, metrics["restarted"] = restart_codes(
                    state, extra, carry["candidates"], key, axis
                )
        if "guard" in extra:
            guard = update_guard(extra["guard"], metrics["rec_loss"], at)
            extra, metrics["rise"] = {**extra, "guard": guard}, guard["recent"] / guard["lowest"]
        return (dataclasses.replace(state, extra=extra) if extra else state), metrics

    def evaluate(self, weights: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        """Returns the loss without an adversary, its parts, and PSNR in dB; nothing is drawn."""
        params, loss = weights["params"], self.config.loss
        collections = {name: part for name, part in weights.items() if name != "params"}
        args = params, collections, batch, jnp.int32(0), GENERATOR, False
        (y, penalty), aux = self.forward(*args)
        x, (name, weight) = self.pixels(batch), self.penalty
        logvar = jnp.asarray(params.get("logvar", loss.logvar_init), jnp.float32)
        nll, metrics = self.nll(x, frozen)(y, logvar)
        # Of pixels in [0, 1]: a range of 2 has 4 times the squared error.
        error = jnp.square(x - jnp.clip(y, -1, 1)).mean((1, 2, 3)) / 4
        psnr = -10 * jnp.log10(error + 1e-10).mean()
        metrics |= {name: penalty, "loss": nll + weight * penalty, "psnr": psnr}
        return metrics | self.code_metrics(aux)

    def code_metrics(self, aux: Aux) -> dict[str, jax.Array]:
        """Returns the metrics of the codes of a forward pass; {} without a codebook."""
        return {} if aux.share is None else code_metrics(aux.share)

    # ---------------------------------------------------------------------------------- watching

    def problem(self, metrics: Mapping[str, float]) -> str:
        """Either network is not finite, or the reconstruction loss has risen too far."""
        disc = not_finite(metrics, "disc_loss", "disc_grad_norm", "discriminator's ")
        return super().problem(metrics) or disc or self._risen(metrics, self.config.guard.rise)

    def is_suspect(self, metrics: Mapping[str, float]) -> bool:
        """The loss has risen by more than the square root of ``guard.rise``."""
        return bool(self._risen(metrics, self.config.guard.rise**0.5))

    def _risen(self, metrics: Mapping[str, float], most: float) -> str:
        rise = metrics.get("rise", 0.0)
        risen = most and rise > most
        return f"the reconstruction loss is {rise:.2f} times its lowest" if risen else ""

    def warning(self, metrics: Mapping[str, float]) -> str:
        """Returns a warning while d_weight is above ``adversary.alarm``."""
        alarm, d_weight = self.config.adversary.alarm, metrics.get("d_weight", 0.0)
        if not (alarm and metrics.get("disc_factor") and d_weight > alarm):
            return ""
        return (
            f"d_weight is {d_weight:.4g}, above adversary.alarm {alarm:g}: the adversary may ruin "
            "the reconstructions; adversary.cap bounds it, a lower adversary.weight weakens it"
        )

    def rollbacks(self, state: TrainState) -> int:
        """Returns the count that the guard keeps in the state."""
        return int(extra_of(state)["guard"]["rollbacks"]) if self.max_rollbacks else 0

    def recover(self, state: TrainState, rollbacks: int) -> TrainState:
        """Sets the number of rollbacks, which lowers the adversary's weight."""
        factor = self.config.guard.lower**rollbacks
        LOG.warning("the adversary's weight is multiplied by %.3g from here on", factor)
        guard = extra_of(state)["guard"]
        number = jax.device_put(np.int32(rollbacks), guard["rollbacks"].sharding)
        extra = extra_of(state) | {"guard": guard | {"rollbacks": number}}
        return dataclasses.replace(state, extra=extra)

    # ----------------------------------------------------------------------------------- results

    def preview(self, weights: Any, frozen: Any, raw: dict[str, Any]) -> np.ndarray:
        """Returns sixteen held-out pictures, and their reconstructions below; see `as_rgb`."""
        images = raw["image"][:16]
        made = reconstruct(self.module, weights, images / np.float32(127.5) - 1)
        return png.sheet(preview_rows(as_rgb(images), as_rgb(fetch(made))))

    def export(self, weights: Any) -> tuple[dict[str, Any], Any]:
        """Exports a first stage; an averaged codebook becomes a plain one."""
        fields = plain(self.config.model["first_stage"])
        params = {name: part for name, part in weights["params"].items() if name != "logvar"}
        if fields.get("quantizer") == "ema":
            fields["quantizer"] = "vq"
            params["quantize"] = {"embedding": weights["codebook"]["quantize"]["embedding"]}
        config = {"kind": "first_stage", "first_stage": fields}
        pixels = pixel_format(plain(self.config.data))
        if not pixels.is_plain:
            config["pixels"] = dataclasses.asdict(pixels)
        return config, {"first_stage": params}


def check_batch_resize(config: Any, factor: int) -> None:
    """Raises ConfigError where sizes of batches do not fit the autoencoder's ``factor``."""
    if make_buckets(plain(config.data)) is not None:
        raise ConfigError("batch_resize and data.buckets both choose sizes of batches: set one")
    if len(config.batch_resize) != 2:
        raise ConfigError("batch_resize: give two sizes in pixels, the smallest and the largest")
    sizes = BatchResize(*config.batch_resize)
    for size in (sizes.upper, *sizes.sizes):
        if size % factor:
            raise ConfigError(f"batch_resize: {size} pixels are no multiple of {factor}")


def make_adversary(config: Any) -> Adversary | None:
    """Builds the adversary of a config; None where its weight is 0."""
    sides = [side for size in batch_sizes(plain(config.data)) for side in size]
    fields, side = config.adversary, min(*sides, *config.batch_resize)
    if not fields.weight:
        return None
    module = PatchDiscriminator(
        ndf=fields.channels,
        n_layers=fields.layers,
        use_actnorm=fields.actnorm,
        dtype=DTYPES[config.dtype],
    )
    if module.patches(side) < 1:
        raise ConfigError(
            f"adversary.layers {fields.layers} is too many for pictures of {side} pixels"
        )
    static = {k: fields[k] for k in ("loss", "start", "factor", "weight", "ramp", "cap")}
    kl = config.model.first_stage.get("kind") == "kl"
    return Adversary(module, **static, lower=config.guard.lower, idle_weight=not kl)


def temperature(config: Any, step: jax.Array) -> jax.Array:
    """Returns the Gumbel temperature: half a cosine from first to last, as taming-transformers."""
    first, last = config.temperature, config.temperature_final
    at = jnp.minimum(step / max(config.temperature_steps, 1), 1.0)
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * at))


def candidates_shape(module: VQModelInterface, images: jax.Array) -> tuple[int, int, int]:
    """Returns [b, k, c] of the encodings of images [b, H, W, 3] that may become codes.

    Under pmap ``images`` is a device's part of the batch.
    """
    height, width, c = latent_shape(module, *images.shape[1:3])
    devices = 1 if module.axis_name is None else jax.lax.psum(1, module.axis_name)
    codes, rows = module.make_quantizer().re_embed, len(images) * devices
    return len(images), candidate_count(codes, height * width, rows), c


def code_metrics(share: jax.Array) -> dict[str, jax.Array]:
    """Returns the original's codebook metrics of one batch's ``share`` [n]."""
    usage = jnp.sum(share > 0).astype(jnp.float32)
    return {"perplexity": perplexity(share), "cluster_usage": usage}


def update_guard(
    guard: dict[str, jax.Array], loss: jax.Array, step: jax.Array
) -> dict[str, jax.Array]:
    """Updates the moving average of the reconstruction loss, and its lowest value.

    At first the average is the mean of a few batches, which may be low by chance: the lowest
    counts only once the average is a moving one.
    """
    count, slow = step + 1.0, 1 - GUARD_DECAY
    recent = guard["recent"] + jnp.maximum(slow, 1 / count) * (loss - guard["recent"])
    lowest = jnp.minimum(guard["lowest"], recent)
    lowest = jnp.where(count * slow > 0.99, lowest, guard["lowest"])
    return guard | {"recent": recent, "lowest": lowest}


@jax.jit(static_argnums=0)
def reconstruct(module: Any, variables: Any, x: jax.Array) -> jax.Array:
    """Returns uint8 reconstructions of pixels x [b, H, W, c] in [-1, 1]."""
    return to_uint8(module.apply(variables, x)[0])
