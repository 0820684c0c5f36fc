"""Sampling of transformers over codes: one compiled program for each batch and size."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import RequestError
from ldm_jax.kernels import Kernels
from ldm_jax.kernels.cores import platform_of
from ldm_jax.models import code_transformer
from ldm_jax.models.code_transformer import CodeTransformer
from ldm_jax.models.gpt import (
    Choice,
    Generated,
    Known,
    generate,
    generate_windows,
    one_pass,
    sliding_cells,
)
from ldm_jax.models.ldm import to_float, to_uint8
from ldm_jax.sampling.decoding import decode_part
from ldm_jax.sampling.inputs import Inputs
from ldm_jax.sampling.pipeline import Batch, Pipeline
from ldm_jax.sampling.program import Pictures, keys_of, whole_cells
from ldm_jax.sampling.request import Request

SAMPLER = "autoregressive"  # the name that a picture's settings have
HALF = 0.5  # the part of an image that is sampled where the request gives no strength


@dataclasses.dataclass(frozen=True)
class CodesConfig:
    """What is compiled in.

    Attributes:
      size: (H, W) in pixels.
      window: Codes (h, w) of the window that slides over larger pictures.
      top_k: See `Choice`.
      decode_batch: Pictures decoded at a time, a divisor of the batch; 0 is all.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    top_k: int | None = None
    decode_batch: int = 0
    progress: ClassVar[tuple[int, ...]] = ()  # codes come one by one: there are no predictions


class CodeSteps(NamedTuple):
    """The settings that are traced, the same for all pictures.

    Attributes:
      temperature: Divides the logits.
      top_p: See `Choice`; None is compiled out.
      first: The number of codes of an image that are kept, in the order of the transformer.
    """

    temperature: Any
    top_p: Any = None
    first: Any = None


def generate_codes(
    model: CodeTransformer, steps: CodeSteps, inputs: Inputs, config: CodesConfig
) -> tuple[Generated, tuple[int, int]]:
    """Chooses the codes of a batch of pictures.

    Returns:
      Codes int32 [b, h, w] as `Generated`, and (h, w).
    """
    f, params = model.first_stage.downsampling, model.params["transformer"]
    h, w = config.size[0] // f, config.size[1] // f
    condition = model.condition(model.params["conditioner"], inputs.encoded)
    b, n = len(condition), h * w
    choice = Choice(steps.temperature, config.top_k, steps.top_p, model.codes)
    slides = (h, w) != config.window
    sequence = (lambda grid: grid.reshape(b, -1)) if slides else model.sequence
    known, codes = None, jnp.zeros((b, h, w), jnp.int32)
    if inputs.image is not None:
        codes = model.codes_of(to_float(inputs.image))
        if inputs.mask is None:
            keep = jnp.broadcast_to(jnp.arange(n) < steps.first, (b, n))
        else:
            keep = sequence(whole_cells(inputs.mask, f)[..., 0]) == 0
        known = Known(sequence(codes), keep)

    def uniforms(count: int) -> jax.Array:
        return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys_of(inputs.seeds))

    if slides:
        if condition.ndim == 3 and condition.shape[1:] != (h, w):
            raise RequestError(
                f"the condition has {condition.shape[1]}x{condition.shape[2]} tokens and the "
                f"picture {h}x{w}: windows need one for each code"
            )
        cells = sliding_cells((h, w), config.window)
        made = generate_windows(
            model.gpt,
            params,
            condition,
            codes,
            config.window,
            cells,
            uniforms=uniforms(n),
            choice=choice,
            known=known,
        )
        return made, (h, w)
    condition = condition.reshape(b, -1)
    m = condition.shape[1]
    if model.pkeep <= 0 and m == n:
        start, u = jnp.zeros((b, 0), jnp.int32), uniforms(2 * n - 1)
        z = one_pass(model.gpt, params, condition, start, uniforms=u, choice=choice)
        return Generated(model.grid(z, h, w), jnp.ones(b, bool)), (h, w)
    made = generate(
        model.gpt, params, condition, n, uniforms=uniforms(n), choice=choice, known=known
    )
    return Generated(model.grid(made.tokens[:, m:], h, w), made.finite), (h, w)


def generate_pictures(
    model: CodeTransformer,
    steps: CodeSteps,
    inputs: Inputs,
    *,
    config: CodesConfig,
    kernels: Kernels,
) -> Pictures:
    """Samples a batch of pictures; a picture depends on its own row alone."""
    model = model.with_kernels(kernels)
    made, _ = generate_codes(model, steps, inputs, config)
    pixels = decode_codes(model, made.tokens, config.decode_batch)
    finite = made.finite & jnp.isfinite(pixels).all((1, 2, 3))
    if inputs.image is not None and inputs.mask is not None:  # the rest stays as it was
        pixels = jnp.where(inputs.mask > 0, pixels, to_float(inputs.image))
    return Pictures(to_uint8(pixels), None, made.tokens[..., None], finite)


def decode_codes(model: CodeTransformer, codes: jax.Array, batch: int = 0) -> jax.Array:
    """Decodes codes [b, h, w] to pixels, ``batch`` pictures at a time; 0 is all."""
    if not 0 < batch < len(codes):
        return model.decode(codes)
    parts = jnp.swapaxes(codes.reshape(batch, -1, *codes.shape[1:]), 0, 1)
    pixels = jnp.swapaxes(jax.lax.map(model.decode, parts), 0, 1)
    return pixels.reshape(-1, *pixels.shape[2:])


class CodePipeline(Pipeline):
    """A transformer over codes that samples pictures.

    The size, the batch and top_k are compiled in. Of an ``image`` the first codes are kept and the
    part ``strength`` of them is made, by default the second half; or those under a ``mask``. A
    picture larger than the model was trained for is made by a window that slides over it.
    """

    refused: ClassVar[tuple[str, ...]] = (
        *("steps", "guidance", "eta", "sampler", "grid", "guidance_rescale", "guidance_interval"),
        *("tile", "cache_interval", "cache_depth", "variation", "negative", "toward"),
        *("sampler_options", "noise_dropout", "renoise_null", "patch", "switch", "progress_every"),
        *("control_image", "control_scale", "control_edges", "classifier_scale", "noise"),
    )
    refused_parts: ClassVar[tuple[str, ...]] = (
        *("text_encoder", "clip", "refiner", "classifier", "lora", "embedding", "control"),
        *("prompt_weights", "clip_skip"),
    )

    @staticmethod
    def build(config: dict[str, Any], params: dict[str, Any], dtype: str) -> CodeTransformer:
        """Builds the model."""
        first_stage = params.pop("first_stage", None)
        return code_transformer.build(config, params, dtype, first_stage)

    check_params = staticmethod(code_transformer.check_params)

    def __init__(self, model: CodeTransformer, **options: Any):
        super().__init__(model, **options)
        h, w = self.codes
        self.defaults = dataclasses.replace(self.defaults, sampler=SAMPLER, steps=h * w)

    @property
    def codes(self) -> tuple[int, int]:
        """Codes (h, w) of the pictures that the model was trained on."""
        f, size = self.model.first_stage.downsampling, self.defaults.size
        assert size is not None
        return size[0] // f, size[1] // f

    def check(self, request: Request) -> Request:
        """Returns the request, with a strength where an image is given without a mask."""
        self.refuse(request)
        self.model.conditioner.check_request(request)
        for name in ("mask", "outpaint", "strength"):
            if getattr(request, name) is not None and request.image is None:
                raise RequestError(f"{name} needs an image: give one")
        masked = request.mask is not None or request.outpaint is not None
        if masked and request.strength is not None:
            raise RequestError("mask and outpaint say which codes are made: leave out strength")
        if request.image is None:
            return request
        if self.model.pkeep <= 0:
            raise RequestError("this model makes all codes in one pass and keeps none of an image")
        if masked or request.strength is not None:
            return request
        return dataclasses.replace(request, strength=HALF)

    def complete(self, request: Request) -> Request:
        """Returns the request with the model's own settings where it has None."""
        given = {name: v for name, v in request.settings().items() if v is not None}
        return dataclasses.replace(request, **{**self.defaults.settings(), **given})

    def check_size(self, size: Any) -> tuple[int, int]:
        """Returns (height, width) if the model can make it."""
        height, width = super().check_size(size)
        (h, w), f = self.codes, self.model.first_stage.downsampling
        if (height, width) == (h * f, w * f):
            return height, width
        if height < h * f or width < w * f:
            raise RequestError(
                f"size {height}x{width}: this model makes pictures of {h * f}x{w * f} or larger"
            )
        if self.model.permuter != "Identity":
            raise RequestError(
                f"size {height}x{width}: this model reads codes in the order "
                f"{self.model.permuter}, which has no larger windows: leave the size at "
                f"{h * f}x{w * f}"
            )
        return height, width

    def steps(self, own: Request) -> Any:
        """Returns the traced settings."""
        if not own.temperature:
            raise RequestError("temperature must be above 0; top_k=1 takes the likeliest codes")
        assert own.size is not None
        f = self.model.first_stage.downsampling
        count = (own.size[0] // f) * (own.size[1] // f)
        first = None
        if own.strength is not None:
            first = np.int32(count - max(round(own.strength * count), 1))
        top_p = None if own.top_p is None else np.float32(own.top_p)
        return CodeSteps(np.float32(own.temperature), top_p, first)

    def config(
        self, own: Request, size: tuple[int, int], rows: int, progress: tuple[int, ...] = ()
    ) -> Any:
        """Returns what is compiled in for batches of ``rows``."""
        devices = self.mesh.devices.size
        part = decode_part(platform_of(self.mesh), size, rows // devices, own.decode_batch)
        part *= devices if self.parallel == "jit" else 1
        return CodesConfig(size, self.codes, own.top_k, part)

    def step_of(self, sampler: str, config: Any) -> Callable[..., Pictures]:
        """Returns the pure function that is compiled."""
        return partial(generate_pictures, config=config)

    def watch(self, request: Request, every: int) -> Iterator[Batch]:
        """Like `batches`: codes come one by one, without predictions to show."""
        if every < 1:
            raise RequestError(f"every must be at least 1, not {every}")
        return self.batches(request)

    def _shown(self, own: Request, steps: Any) -> tuple[tuple[int, ...], list[int]]:
        """Returns no predictions: codes come one by one."""
        return (), []

    def _finite(
        self, images: np.ndarray, result: Pictures, own: Request, config: Any, inputs: Inputs
    ) -> np.ndarray:
        """Returns the pictures; raises RequestError where numbers are not finite."""
        if np.asarray(result.finite).all():
            return images
        model = cast(CodeTransformer, self.model)
        params = {**model.params, "first_stage": model.first_stage.params}
        for path, leaf in jax.tree.leaves_with_path(params):
            if not bool(jnp.isfinite(leaf).all()):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise RequestError(
                    f"the model's weights hold NaN or infinite numbers: {name}; get a sound file"
                )
        raise RequestError(
            f"the logits or pixels are NaN or infinite in {self.dtype}: try --dtype float32"
        )
