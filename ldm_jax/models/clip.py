"""CLIP's two towers (Radford et al. 2021, arXiv:2103.00020).

Fields carry the names of the published configs, and the defaults of ViT-L/14.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models.gpt import causal_mask
from ldm_jax.nn.attention import merge_heads, split_heads
from ldm_jax.nn.layers import Array, Conv, Dense, Embed, LayerNorm, Module

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
