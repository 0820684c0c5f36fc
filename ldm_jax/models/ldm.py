"""LatentDiffusion: first stage + conditioner + UNet + schedule, one pytree with static modules, built from a plain config.

A model config is what ``config.json`` of a model directory holds::

    {"kind": "latent_diffusion", "unet": {...}, "first_stage": {"kind": "kl", ...}, "scale_factor": 0.18,
     "conditioner": {"kind": "bert", ...}, "schedule": {...}, "objective": "eps"}

A first stage alone has {"kind": "first_stage", "first_stage": {...}}.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ldm_jax.conditioning import Cond, Conditioner, make_conditioner
from ldm_jax.diffusion.feature_cache import FeatureCache
from ldm_jax.diffusion.guidance import Denoiser, classifier_free, unguided
from ldm_jax.diffusion.objective import get_objective
from ldm_jax.diffusion.schedule import Schedule, lift, make_schedule
from ldm_jax.distributed.parallel import target
from ldm_jax.errors import ConfigError, did_you_mean
from ldm_jax.kernels.cores import over_rows
from ldm_jax.kernels.vjp import is_forward_only
from ldm_jax.models.autoencoder import AutoencoderKL, DiagonalGaussian, init_autoencoder
from ldm_jax.models.unet import UNet
from ldm_jax.models.vqgan import VQModelInterface
from ldm_jax.nn.layers import init, kept_rows, shapes_of


def apply(module: Any, params: Any, *args: Any, **options: Any) -> Any:
    """``module.apply`` on bare parameters. ``options`` that are a bool, int or str are compiled in. Where cores of a CPU
    divide the rows (`Target.cores`), all others and the result have them.

    Traced once for a module and shapes, however many programs and however many places in one (both calls of a Heun step) it is part of: tracing a
    network in Python takes as long as compiling a small one.
    """
    fixed = {name: value for name, value in options.items() if isinstance(value, bool | int | str)}
    given = {name: value for name, value in options.items() if name not in fixed}
    told = target()

    def call(params: Any, rows: tuple[Any, Any]) -> Any:
        beside = told, kept_rows(), is_forward_only()
        return _apply(module, tuple(fixed.items()), beside, params, *rows[0], **rows[1])

    if told is None or told.cores is None:
        return call(params, (args, given))
    return over_rows(call, told.cores, params, (args, given))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _apply(
    module: Any, fixed: tuple[tuple[str, Any], ...], _: Any, params: Any, *args: Any, **given: Any
) -> Any:
    """The third is what tracing reads beside its arguments."""
    return module.apply({"params": params}, *args, **dict(fixed), **given)


@flax.struct.dataclass
class FirstStage:
    """An autoencoder with its parameters and the factor that brings its latents to unit variance.

    ``module`` None is the identity: diffusion on pixels.
    """

    params: Any
    scale: jax.Array | float
    module: AutoencoderKL | VQModelInterface | None = flax.struct.field(pytree_node=False)

    @property
    def downsampling(self) -> int:
        return 1 if self.module is None else self.module.downsampling

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return 3 if self.module is None else self.module.embed_dim

    def moments(self, x: jax.Array) -> jax.Array:
        """Pixels [b, H, W, 3] in [-1, 1] -> what `latents` needs of them: a KL model's mean and log variance [b, h, w, 2c], else codes."""
        if self.module is None:
            return x
        code = apply(self.module, self.params, x, method="encode")
        if isinstance(self.module, VQModelInterface):
            return code
        return jnp.concatenate([code.mean, code.logvar], axis=-1)

    def latents(self, moments: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """`moments` -> scaled latents [b, h, w, c]: the posterior's mode, or its sample with standard normal ``noise``."""
        if self.module is None:
            return moments
        if isinstance(self.module, VQModelInterface):
            return self.scale * moments
        posterior = DiagonalGaussian.from_moments(moments)
        return self.scale * (posterior.mode() if noise is None else posterior.sample(noise))

    def encode(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Pixels [b, H, W, 3] in [-1, 1] -> scaled latents [b, h, w, c]: the posterior's mode, or its sample with standard normal ``noise``.

        A VQ model's latents are those before quantisation, without any noise.
        """
        return self.latents(self.moments(x), noise)

    def decode(self, z: jax.Array, quantize: bool = True) -> jax.Array:
        """Scaled latents [b, h, w, c] -> pixels [b, H, W, 3], float32, about [-1, 1].

        A VQ model quantises them first, unless ``quantize`` is off.
        """
        if self.module is None:
            return z
        options = {"quantize": quantize} if isinstance(self.module, VQModelInterface) else {}
        return apply(self.module, self.params, z / self.scale, method="decode", **options)

    def quantized(self, z: jax.Array) -> jax.Array:
        """The codes nearest to latents [b, h, w, c], as a quantising sampler takes them; themselves where there is no codebook.

        Like the original, which compares scaled latents with unscaled codes, this leaves the scale alone.
        """
        if not isinstance(self.module, VQModelInterface):
            return z
        codes: Any = self.module.apply({"params": self.params}, z, method="quantized")
        return codes.z


@flax.struct.dataclass
class LatentDiffusion:
    """The whole model. ``params`` has "unet" and "conditioner"; the first stage keeps its own, since it is trained apart."""

    params: Any
    first_stage: FirstStage
    schedule: Schedule
    unet: UNet = flax.struct.field(pytree_node=False)
    conditioner: Conditioner = flax.struct.field(pytree_node=False)
    objective: str = flax.struct.field(pytree_node=False)
    config_json: str = flax.struct.field(pytree_node=False, default="{}")

    @property
    def config(self) -> dict:
        """The config that this was built from."""
        return json.loads(self.config_json)

    def apply(self, params: Any, x: jax.Array, t: jax.Array, cond: Cond, **options: Any) -> Any:
        """The UNet's output [b, h, w, c] at latents ``x`` and timesteps ``t`` [b]; ``options`` are those of `UNet` and of Flax (``rngs``)."""
        if cond.concat is not None:
            x = jnp.concatenate([x, cond.concat], axis=-1)
        return apply(self.unet, params["unet"], x, t, cond.crossattn, cond.vector, **options)

    def denoiser(
        self,
        encoded: Any,
        null: Any = None,
        guidance: Any = None,
        *,
        toward: Any = None,
        cache: FeatureCache | None = None,
        cache_depth: int = 1,
        **options: Any,
    ) -> Denoiser:
        """The network under host-encoded conditions, guided away from ``null`` by ``guidance`` ([] or [b]) where that is given.

        ``toward`` (encoded, mix [b]) goes part of the way to other conditions; ``cache`` keeps what enters the last ``cache_depth`` rows of the UNet;
        ``options`` are those of `classifier_free`.
        """

        def model(x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
            if cache is None:
                return self.apply(self.params, x, t, cond)
            return cache.call(
                lambda *args: self.apply(self.params, *args[:3], depth=cache_depth, deep=args[3]),
                x,
                t,
                cond,
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
        repeat = not self.attends_alone(cond)
        return classifier_free(model, cond, condition(null), guidance, repeat=repeat, **options)

    def attends_alone(self, cond: Cond) -> bool:
        """Whether the UNet may be given two conditions of a picture at once: where only its cross-attention reads them, and the program that is
        being traced divides no rows among devices, which would have to exchange what the first layers made.
        """
        told = target()
        divided = told is not None and (told.mesh is not None or told.cores is not None)
        return (
            cond.crossattn is not None
            and cond.concat is None
            and cond.vector is None
            and not divided
        )


# --------------------------------------------------------------------------------------------------------------------- from a config

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
REMATS = {
    "none": False,
    "blocks": True,
}  # what the backward pass computes again instead of keeping: the inside of each block


def construct(
    factory: Callable[..., Any], what: str, fields: Mapping[str, Any], **extra: Any
) -> Any:
    """``factory(**fields, **extra)``, with lists as tuples; ConfigError names a field that does not exist or is missing."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    signature = inspect.signature(factory)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        known = [p for p in signature.parameters if p not in ("parent", "name", *extra)]
        for field in fields:
            if field not in known:
                raise ConfigError(
                    f"{what}: field {field!r} does not exist{did_you_mean(field, known)}"
                )
    try:
        return factory(**fields, **extra)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from None


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name not in config:
        raise ConfigError(f"model config: the section {name!r} is missing")
    try:
        return dict(config[name])
    except (TypeError, ValueError):  # by use: a ConfigDict is no Mapping
        raise ConfigError(
            f"model config: {name!r} is {config[name]!r}, not a section of fields"
        ) from None


def _by_kind(
    registry: Mapping[str, Any], what: str, fields: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    kind = fields.pop("kind", None)
    if kind not in registry:
        raise ConfigError(
            f"{what}: kind {kind!r} does not exist{did_you_mean(str(kind), registry)}"
        )
    return registry[kind], fields


FIRST_STAGES: dict[str, Callable[..., AutoencoderKL | VQModelInterface | None]] = {
    "kl": AutoencoderKL,
    "vq": VQModelInterface,
    "identity": lambda dtype, remat: None,
}


def build_first_stage(
    config: Mapping[str, Any], dtype: str = "float32", remat: str = "none"
) -> AutoencoderKL | VQModelInterface | None:
    """The autoencoder of a config's "first_stage"; None is the identity. ``remat`` as in `REMATS`."""
    factory, fields = _by_kind(FIRST_STAGES, "first_stage", _section(config, "first_stage"))
    return construct(factory, "first_stage", fields, dtype=DTYPES[dtype], remat=REMATS[remat])


def build_conditioner(config: Mapping[str, Any], dtype: str = "float32") -> Conditioner:
    """What a config's "conditioner" says."""
    return make_conditioner(_section(config, "conditioner"), DTYPES[dtype])


def build(
    config: Mapping[str, Any],
    params: Any,
    first_stage_params: Any,
    dtype: str = "float32",
    remat: str = "none",
) -> LatentDiffusion:
    """A LatentDiffusion from a config and its parameters (or their shapes, or None to fill in later). ``remat`` is of the UNet."""
    conditioner = build_conditioner(config, dtype)
    if "objective" not in config:
        raise ConfigError("model config: 'objective' is missing")
    get_objective(config["objective"])
    return LatentDiffusion(
        params=params,
        first_stage=FirstStage(
            first_stage_params, config.get("scale_factor", 1.0), build_first_stage(config, dtype)
        ),
        schedule=construct(make_schedule, "schedule", _section(config, "schedule")),
        unet=construct(
            UNet, "unet", _section(config, "unet"), dtype=DTYPES[dtype], remat=REMATS[remat]
        ),
        conditioner=conditioner,
        objective=config["objective"],
        config_json=json.dumps(config),
    )


def init_params(model: LatentDiffusion, key: jax.Array) -> dict:
    """Fresh float32 parameters {"unet", "conditioner"}; jit it, or take its `jax.eval_shape`."""
    key_unet, key_conditioner = jax.random.split(key)
    conditioner = model.conditioner.init(key_conditioner)
    cond = jax.eval_shape(model.conditioner, conditioner, model.conditioner.encode_null(1))
    side = 2 ** (len(model.unet.channel_mult) - 1)
    x = jnp.zeros((1, side, side, model.unet.in_channels))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), cond)
    unet = init(model.unet, key_unet, x, jnp.zeros(1), zeros.crossattn, zeros.vector)["params"]
    return {"unet": unet, "conditioner": conditioner}


def check_params(model: LatentDiffusion) -> None:
    """ConfigError where the parameters are not those of the config: one is missing, or has another shape."""
    there = dict(model.params)
    if model.first_stage.module is not None:
        there["first_stage"] = model.first_stage.params
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(there)
    }
    for path, leaf in jax.tree.leaves_with_path(_param_shapes(model.config_json)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if shapes.get(name) != leaf.shape:
            found = (
                f"has the shape {shapes[name]}, not {leaf.shape}"
                if name in shapes
                else "is missing"
            )
            raise ConfigError(f"the parameters do not fit this config: {name} {found}")


@lru_cache(maxsize=4)
def _param_shapes(config_json: str) -> dict[str, Any]:
    """Shapes of the parameters of a config; finding them takes a second, and the same model is often loaded more than once."""
    model, key = build(json.loads(config_json), None, None), jax.random.key(0)
    expected, module = shapes_of(lambda: init_params(model, key)), model.first_stage.module
    if module is not None:
        expected["first_stage"] = shapes_of(lambda: init_autoencoder(module, key))
    return expected


def to_uint8(x: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> uint8, rounded and clipped."""
    return jnp.round(jnp.clip((x + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


def to_float(image: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0
