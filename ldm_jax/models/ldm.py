"""A latent diffusion model: a pytree of weights and schedule, with static modules.

Rombach et al. 2022, arXiv:2112.10752. `ldm_jax.models.build` makes one from a config.
"""

import dataclasses
import json
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ldm_jax.conditioning import Cond, Conditioner
from ldm_jax.diffusion.feature_cache import FeatureCache
from ldm_jax.diffusion.guidance import Denoiser, classifier_free, unguided
from ldm_jax.diffusion.schedule import Schedule, lift
from ldm_jax.kernels import Kernels
from ldm_jax.kernels.cores import divide_rows
from ldm_jax.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm_jax.models.classifier import Classifier
from ldm_jax.models.controlnet import ControlNet
from ldm_jax.models.patches import PatchPlan, patchwise
from ldm_jax.models.unet import UNet
from ldm_jax.models.vqgan import VQModelInterface
from ldm_jax.nn.layers import repeat_batch, with_kernels

FirstStageModule = AutoencoderKL | VQModelInterface


def apply(module: Any, params: Any, *args: Any, **options: Any) -> Any:
    """``module.apply`` on bare parameters, traced once for a module and shapes.

    That holds however many programs, and however many places in one (both calls of a Heun step),
    call it: tracing a network in Python takes as long as compiling a small one. ``options`` that
    are a bool, int or str are compiled in. CPU cores of the module's kernels divide the rows.
    """
    fixed = {name: value for name, value in options.items() if isinstance(value, bool | int | str)}
    traced = {name: value for name, value in options.items() if name not in fixed}

    def call(params: Any, rows: tuple[Any, Any]) -> Any:
        return _apply(module, tuple(fixed.items()), params, *rows[0], **rows[1])

    cores = module.kernels.cores
    if cores is None:
        return call(params, (args, traced))
    return divide_rows(call, cores, params, (args, traced))


@partial(jax.jit, static_argnums=(0, 1))
def _apply(
    module: Any, fixed: tuple[tuple[str, Any], ...], params: Any, *args: Any, **traced: Any
) -> Any:
    return module.apply({"params": params}, *args, **dict(fixed), **traced)


@flax.struct.dataclass
class FirstStage:
    """An autoencoder with its parameters and the factor that scales its latents to unit variance.

    ``module`` None is the identity: diffusion on pixels.
    """

    params: Any
    scale: jax.Array | float
    module: FirstStageModule | None = flax.struct.field(pytree_node=False)

    def with_kernels(self, kernels: Kernels) -> "FirstStage":
        """A copy that computes with ``kernels``."""
        return with_kernels(self, kernels)

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side."""
        return 1 if self.module is None else self.module.downsampling

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return 3 if self.module is None else self.module.embed_dim

    def moments(self, x: jax.Array) -> jax.Array:
        """Pixels [b, H, W, 3] in [-1, 1] -> the argument of `latents`.

        Mean and log variance [b, h, w, 2c] of a KL model, unscaled latents [b, h, w, c] of others.
        """
        if self.module is None:
            return x
        code = apply(self.module, self.params, x, method="encode")
        if isinstance(self.module, VQModelInterface):
            return code
        return jnp.concatenate([code.mean, code.logvar], axis=-1)

    def latents(self, moments: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """`moments` -> scaled latents [b, h, w, c]: the mode, or a sample with ``noise``."""
        if self.module is None:
            return moments
        if isinstance(self.module, VQModelInterface):
            return self.scale * moments
        posterior = DiagonalGaussian.from_moments(moments)
        return self.scale * (posterior.mode() if noise is None else posterior.sample(noise))

    def encode(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Pixels [b, H, W, 3] in [-1, 1] -> scaled latents [b, h, w, c].

        They are the posterior's mode, or its sample with standard normal ``noise``; those of a VQ
        model are not quantised, and have no noise.
        """
        return self.latents(self.moments(x), noise)

    def decode(self, z: jax.Array, quantize: bool = True) -> jax.Array:
        """Scaled latents [b, h, w, c] -> pixels [b, H, W, 3], float32, about [-1, 1].

        A VQ model quantises them first if ``quantize``.
        """
        if self.module is None:
            return z
        options = {"quantize": quantize} if isinstance(self.module, VQModelInterface) else {}
        return apply(self.module, self.params, z / self.scale, method="decode", **options)

    def quantized(self, z: jax.Array) -> jax.Array:
        """The codes nearest to latents [b, h, w, c]; the latents themselves without a codebook.

        As in the original's quantising sampler, scaled latents are compared with unscaled codes.
        """
        if not isinstance(self.module, VQModelInterface):
            return z
        codes: Any = self.module.apply({"params": self.params}, z, method="quantized")
        return codes.z


@flax.struct.dataclass
class LatentDiffusion:
    """The whole model.

    ``params`` has "unet" and "conditioner"; the first stage, trained on its own, keeps its own.
    Those of ``controls`` are at "controls", by number.
    A ``classifier`` of another model directory may guide it.
    """

    params: Any
    first_stage: FirstStage
    schedule: Schedule
    unet: UNet = flax.struct.field(pytree_node=False)
    conditioner: Conditioner = flax.struct.field(pytree_node=False)
    objective: str = flax.struct.field(pytree_node=False)
    classifier: Classifier | None = None
    config_json: str = flax.struct.field(pytree_node=False, default="{}")
    controls: tuple[ControlNet, ...] = flax.struct.field(pytree_node=False, default=())

    def with_kernels(self, kernels: Kernels) -> "LatentDiffusion":
        """A copy whose networks all compute with ``kernels``."""
        controls = tuple(net.clone(kernels=kernels) for net in self.controls)
        return with_kernels(dataclasses.replace(self, controls=controls), kernels)

    @property
    def config(self) -> dict:
        """The config that it was built from."""
        return json.loads(self.config_json)

    @property
    def multiple(self) -> int:
        """Sides of latents are multiples of this, so that every level of the UNet halves them."""
        return 2 ** (len(self.unet.channel_mult) - 1)

    def apply(self, params: Any, x: jax.Array, t: jax.Array, cond: Cond, **options: Any) -> Any:
        """The UNet's output [b, h, w, c] at latents ``x`` [b, h, w, c] and timesteps ``t`` [b].

        ``options`` are those of `UNet` and of Flax (``rngs``).
        """
        if cond.concat is not None:
            x = jnp.concatenate([x, cond.concat], axis=-1)
        return apply(self.unet, params["unet"], x, t, cond.crossattn, cond.vector, **options)

    def control_features(
        self, x: jax.Array, t: jax.Array, cond: Cond, control: Any
    ) -> tuple[jax.Array, ...]:
        """The sum of the ControlNets' features, for `UNet`.

        Args:
          x: Latents [r b, h, w, c].
          t: Timesteps [r b].
          cond: The conditions.
          control: (hints [b, 8 h, 8 w, 3] in [0, 1] of each, scales [b, n]).
        """
        total: list[jax.Array] = []
        for i, net in enumerate(self.controls):
            z = x
            if cond.concat is not None and net.in_channels > x.shape[-1]:
                z = jnp.concatenate([x, cond.concat], axis=-1)
            hint, scale = (repeat_batch(a, x) for a in (control[0][i], control[1][:, i]))
            params = self.params["controls"][str(i)]
            found = apply(net, params, z, hint, t, cond.crossattn, cond.vector)
            found = [lift(scale, f).astype(f.dtype) * f for f in found]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return tuple(total)

    def apply_patchwise(self, x: jax.Array, t: jax.Array, cond: Cond, side: int) -> jax.Array:
        """`apply` on overlapping patches of ``side`` latents; channels of the condition are cut."""
        arrays = (x,) if cond.concat is None else (x, cond.concat)

        def run(_: jax.Array, x: jax.Array, *concat: jax.Array) -> jax.Array:
            own = dataclasses.replace(cond, concat=concat[0]) if concat else cond
            return self.apply(self.params, x, t, own)

        return patchwise(run, arrays, PatchPlan((side, side), (side // 2, side // 2)))

    def denoiser(
        self,
        encoded: Any,
        null: Any = None,
        guidance: Any = None,
        *,
        toward: Any = None,
        control: Any = None,
        cache: FeatureCache | None = None,
        cache_depth: int = 1,
        patch: int = 0,
        **options: Any,
    ) -> Denoiser:
        """The network under host-encoded conditions, as the samplers call it.

        Args:
          encoded: Conditions of the rows, encoded by the conditioner on the host.
          null: The null condition, for classifier-free guidance.
          guidance: The guidance scale, [] or [b]; None for none.
          toward: (encoded, mix [b]), interpolates to other conditions.
          control: The hints of `control_features`.
          cache: Keeps the feature that enters the last ``cache_depth`` rows of the UNet.
          cache_depth: See ``cache``.
          patch: Side in latents of the patches that the UNet runs on where a picture is larger,
            half overlapping and blended; 0 is the whole picture.
          options: Those of `classifier_free`.
        """

        def unet(x: jax.Array, t: jax.Array, cond: Cond, **options: Any) -> Any:
            if control is not None:
                options["controls"] = self.control_features(x, t, cond, control)
            return self.apply(self.params, x, t, cond, **options)

        def model(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
            if patch and max(x.shape[1:3]) > patch:
                return self.apply_patchwise(x, t, cond, patch)
            if cache is None:
                return unet(x, t, cond)
            return cache.call(
                lambda *args: unet(*args[:3], depth=cache_depth, deep=args[3]), x, t, cond
            )

        condition = partial(self.conditioner, self.params["conditioner"])
        cond = condition(encoded)
        if toward is not None:
            other, mix = toward
            cond = jax.tree.map(
                lambda a, b: (1 - lift(mix, a)) * a + lift(mix, a) * b, cond, condition(other)
            )
        if null is None or guidance is None:
            return unguided(model, cond)
        repeat = control is not None or not self.shares_rows(cond)
        return classifier_free(model, cond, condition(null), guidance, repeat=repeat, **options)

    def shares_rows(self, cond: Cond) -> bool:
        """Whether the UNet may get two conditions for one row, and compute the first layers once.

        That holds where cross-attention alone reads the condition, and no devices divide the rows:
        they would have to exchange the results of the first layers.
        """
        kernels = self.unet.kernels
        return (
            cond.crossattn is not None
            and cond.concat is None
            and cond.vector is None
            and kernels.mesh is None
            and kernels.cores is None
        )


def to_uint8(x: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> uint8, rounded and clipped."""
    return jnp.round(jnp.clip((x + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def to_float(image: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0
