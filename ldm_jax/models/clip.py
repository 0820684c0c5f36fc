"""CLIP and its two towers (Radford et al. 2021, arXiv:2103.00020).

Fields carry the names of the published configs, and the defaults of ViT-L/14. The image tower of
the "RN" models is in `ldm_jax.models.clip_resnet`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.errors import ConfigError, did_you_mean
from ldm_jax.kernels import Kernels
from ldm_jax.models.clip_resnet import CLIPResNet
from ldm_jax.models.gpt import causal_mask
from ldm_jax.nn.attention import merge_heads, split_heads
from ldm_jax.nn.layers import Array, Conv, Dense, Embed, LayerNorm, Module
from ldm_jax.nn.resize import resize_corners

NORMAL = nn.initializers.normal(0.02)
Activation = Literal["quick_gelu", "gelu"]


def quick_gelu(x: Array) -> Array:
    """``x`` sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


class CLIPLayer(Module):
    """Self-attention and an MLP, each pre-normalised and residual.

    x [b, n, c], mask boolean [n, n] or None -> [b, n, c].
    """

    heads: int
    intermediate_size: int
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        c, norm = x.shape[-1], self.layer(LayerNorm)
        if c % self.heads:
            raise ValueError(f"CLIP: {c} channels do not divide into {self.heads} heads")

        def dense(features: int, name: str) -> Dense:
            zeros = nn.initializers.zeros
            return self.layer(Dense)(features, kernel_init=NORMAL, bias_init=zeros, name=name)

        gelu = quick_gelu if self.hidden_act == "quick_gelu" else self.kernels.gelu
        h = norm(self.layer_norm_eps, name="norm1")(x)
        q, k, v = (split_heads(dense(c, name)(h), self.heads) for name in ("q", "k", "v"))
        y = self.kernels.attention(q, k, v, q.shape[-1] ** -0.5, mask)
        x = x + dense(c, "out")(merge_heads(y))
        h = norm(self.layer_norm_eps, name="norm2")(x)
        return x + dense(c, "fc2")(gelu(dense(self.intermediate_size, "fc1")(h)))


class Tower(Module):
    """What the text and the image tower share."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = None

    def make_layer(self, i: int) -> CLIPLayer:
        """Layer ``i``; called inside ``__call__``."""
        args = self.num_attention_heads, self.intermediate_size, self.hidden_act
        return self.layer(CLIPLayer)(*args, self.layer_norm_eps, name=f"layers_{i}")

    def norm(self, name: str) -> LayerNorm:
        """A layer normalisation; called inside ``__call__``."""
        return self.layer(LayerNorm)(self.layer_norm_eps, name=name)

    def project(self, pooled: Array) -> Array:
        """The pooled state [b, c], or its projection; called inside ``__call__``."""
        if self.projection_dim is None:
            return pooled
        init: Callable = nn.initializers.lecun_normal()
        dense = self.layer(Dense)
        return dense(self.projection_dim, use_bias=False, kernel_init=init, name="projection")(
            pooled
        )


class TextStates(NamedTuple):
    """The results of the text tower.

    last: [b, n, c] after the final norm.
    penultimate: [b, n, c] without the last layer, after the final norm (SD 2.x).
    pooled: [b, c], or [b, projection_dim], of the end token.
    hidden: [b, n, c] each, of the embeddings and of every layer, without the final norm.
    """

    last: Array
    penultimate: Array
    pooled: Array
    hidden: tuple[Array, ...]


class CLIPText(Tower, kw_only=True):
    """CLIP's text tower: tokens int [b, n] -> `TextStates`; n at most ``max_position_embeddings``.

    A position sees itself and those before it; padding is not masked, as in Stable Diffusion. The
    state at the first ``eos_token_id`` is pooled, or where that is None, at the highest token,
    which the end token is. ``projection_dim`` projects the pooled state.
    OpenCLIP's towers (SD 2.x, SDXL) are the same with ``hidden_act`` "gelu".
    """

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int | None = None

    @nn.compact
    def __call__(self, tokens: Array) -> TextStates:
        n, width, keep_rows = tokens.shape[1], self.hidden_size, self.kernels.keep_rows
        if n > self.max_position_embeddings:
            raise ValueError(
                f"CLIPText: {n} tokens exceed max_position_embeddings "
                f"{self.max_position_embeddings}"
            )
        embed = self.layer(Embed)(
            self.vocab_size, width, embedding_init=NORMAL, name="token_embedding"
        )
        shape = self.max_position_embeddings, width
        positions = self.param("position_embedding", NORMAL, shape)
        x = keep_rows(embed(tokens) + positions[:n].astype(self.dtype))
        mask, hidden = causal_mask(n), [x]
        for i in range(self.num_hidden_layers):
            x = keep_rows(self.make_layer(i)(x, mask))
            hidden.append(x)
        norm = self.norm("final_norm")
        last, penultimate = norm(x), norm(hidden[-2])
        end = (tokens if self.eos_token_id is None else tokens == self.eos_token_id).argmax(1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        return TextStates(last, penultimate, self.project(pooled), tuple(hidden))


class VisionStates(NamedTuple):
    """The results of the image tower.

    last: [b, 1 + patches, c] without the final norm.
    pooled: [b, c], or [b, projection_dim].
    """

    last: Array
    pooled: Array


class CLIPVision(Tower, kw_only=True):
    """CLIP's image tower, a vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Pixels [b, image_size, image_size, 3] of `clip_pixels` -> `VisionStates`. ``projection_dim``
    projects the class token's state into the space that texts share; its direction is what
    retrieval-augmented models are conditioned on.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int | None = 768

    @nn.compact
    def __call__(self, x: Array) -> VisionStates:
        b, h, w, _ = x.shape
        if (h, w) != (self.image_size, self.image_size):
            raise ValueError(
                f"CLIPVision: pictures of {h}x{w} pixels, expected "
                f"{self.image_size}x{self.image_size}"
            )
        width, p = self.hidden_size, self.patch_size
        patch = self.layer(Conv)(
            width, p, p, 0, use_bias=False, kernel_init=NORMAL, name="patch_embedding"
        )
        x = patch(x).reshape(b, -1, width)
        token = self.param("class_embedding", NORMAL, (width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, width)), x], axis=1)
        positions = self.param("position_embedding", NORMAL, (x.shape[1], width))
        x = self.norm("pre_norm")(x + positions.astype(self.dtype))
        for i in range(self.num_hidden_layers):
            x = self.make_layer(i)(x)
        return VisionStates(x, self.project(self.norm("post_norm")(x[:, 0])))


_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(x: Array) -> Array:
    """Pixels [..., 3] in [-1, 1], normalised as in CLIP's training."""
    return ((x + 1.0) / 2.0 - jnp.array(_MEAN)) / jnp.array(_STD)


# A CLIP model config's "vision.kind" -> the image tower.
VISION: dict[str, type[CLIPVision | CLIPResNet]] = {"vit": CLIPVision, "resnet": CLIPResNet}


@dataclasses.dataclass(frozen=True)
class CLIP:
    """Both towers. Static and hashable; parameters are passed in.

    Its parameters are {"conditioner", "vision", "logit_scale"}: the text tower's are under the name
    that they have in a model of text, which can take its text encoder from a CLIP model directory.
    """

    text: CLIPText
    vision: CLIPVision | CLIPResNet

    def with_kernels(self, kernels: Kernels) -> "CLIP":
        """Returns the towers with their operations in the forms of ``kernels``."""
        return CLIP(self.text.clone(kernels=kernels), self.vision.clone(kernels=kernels))

    def init(self, key: Array) -> dict[str, Any]:
        """Returns fresh parameters."""
        keys, side = jax.random.split(key), self.vision.image_size
        return {
            "conditioner": self.text.init(keys[0], jnp.zeros((1, 1), jnp.int32))["params"],
            "vision": self.vision.init(keys[1], jnp.zeros((1, side, side, 3)))["params"],
            "logit_scale": jnp.float32(jnp.log(1 / 0.07)),
        }

    def encode_text(self, params: Any, tokens: Array) -> Array:
        """Tokens int [b, n] -> features float32 [b, d], not normalised."""
        states: Any = self.text.apply({"params": params["conditioner"]}, tokens)
        return states.pooled.astype(jnp.float32)

    def encode_pixels(self, params: Any, pixels: Array) -> Array:
        """Pixels of `clip_pixels` [b, image_size, image_size, 3] -> float32 [b, d]."""
        states: Any = self.vision.apply({"params": params["vision"]}, pixels)
        return states.pooled.astype(jnp.float32)

    def encode_image(self, params: Any, images: Array, antialias: bool = False) -> Array:
        """Pictures [b, H, W, 3] in [-1, 1] -> features float32 [b, d], not normalised.

        They are resized as the original's image embedder does; see `fit_pixels`.
        """
        return self.encode_pixels(params, fit_pixels(images, self.vision.image_size, antialias))

    def logits(self, params: Any, pixels: Array, tokens: Array) -> Array:
        """Scaled cosine similarities [b, m] of b pictures and m texts."""
        image, text = self.encode_pixels(params, pixels), self.encode_text(params, tokens)
        product = jnp.matmul(normalized(image), normalized(text).T, precision="highest")
        return jnp.exp(params["logit_scale"]) * product


def normalized(x: Array) -> Array:
    """``x`` [..., d] divided by its norm."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def fit_pixels(images: Array, size: int, antialias: bool = False) -> Array:
    """Pictures [b, H, W, 3] in [-1, 1] -> the pixels of an image tower [b, size, size, 3].

    Bicubic with corners aligned and without keeping the aspect ratio, as retrieval-augmented
    models embed their database (Blattmann et al. 2022, arXiv:2204.11824).
    """
    return clip_pixels(resize_corners(images, (size, size), antialias))


def clip_from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> CLIP:
    """Builds the towers of a CLIP model directory's config.

    Args:
      config: With "conditioner" (kind "clip", the text tower) and "vision" (a kind of `VISION`).
      dtype: Of the products.

    Raises:
      ConfigError: The config is of another kind, or a field does not fit.
    """
    if config.get("kind") != "clip":
        raise ConfigError(f"a {config.get('kind')} is no CLIP model: convert one with ldm-convert")
    sections = {name: dict(config[name]) for name in ("conditioner", "vision")}
    kind = sections["vision"].pop("kind", None)
    if kind not in VISION:
        raise ConfigError(f"vision: kind {kind!r} does not exist{did_you_mean(kind, VISION)}")
    if sections["conditioner"].pop("kind", None) != "clip":
        raise ConfigError("conditioner: a CLIP model has one of the kind 'clip'")
    towers: list[Any] = []
    for cls, (name, fields) in zip((CLIPText, VISION[kind]), sections.items(), strict=True):
        known = inspect.signature(cls).parameters
        for field in fields:
            if field not in known:
                raise ConfigError(
                    f"{name}: field {field!r} does not exist{did_you_mean(field, known)}"
                )
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        towers.append(cls(**values, dtype=dtype))
    return CLIP(*towers)
