"""CLIP's two towers (Radford et al. 2021, arXiv:2103.00020). Fields carry the names and defaults of the published ViT-L/14."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.models.gpt import causal_mask
from ldm_jax.nn.attention import attention, merge_heads, split_heads
from ldm_jax.nn.layers import Array, Dtype, gelu, keep_rows, look_up


def quick_gelu(x: Array) -> Array:
    """X sigmoid(1.702 x): the approximation of GELU that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class CLIPLayer(nn.Module):
    """Self-attention and an MLP, each pre-normalised and residual. x [b, n, c], mask boolean [n, n] or None -> [b, n, c]."""

    heads: int
    intermediate_size: int
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        c = x.shape[-1]
        if c % self.heads:
            raise ValueError(f"CLIP: {c} channels do not divide into {self.heads} heads")

        def linear(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype, name=name
            )

        h = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="norm1")(x)
        q, k, v = (split_heads(linear(c, name)(h), self.heads) for name in ("q", "k", "v"))
        x = x + linear(c, "out")(merge_heads(attention(q, k, v, mask=mask)))
        h = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="norm2")(x)
        h = ACTIVATIONS[self.hidden_act](linear(self.intermediate_size, "fc1")(h))
        return x + linear(c, "fc2")(h)


class TextStates(NamedTuple):
    """What the text tower gives. last [b, n, c] after the final norm; pooled [b, c], or [b, projection_dim]: its place of the end token;

    hidden: [b, n, c] for the embeddings and after every layer, without the final norm.
    """

    last: Array
    pooled: Array
    hidden: tuple[Array, ...]


class CLIPText(nn.Module):
    """CLIP's text tower: tokens int [b, n] -> `TextStates`; n at most ``max_position_embeddings``.

    A position sees those before it and itself; padding is not masked, as in Stable Diffusion. The state at the first place of ``eos_token_id`` is
    pooled, or where that is None, of the highest token, which the end token is. ``projection_dim`` projects the pooled state.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int | None = None
    projection_dim: int | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> TextStates:
        n, normal = tokens.shape[1], nn.initializers.normal(0.02)
        if n > self.max_position_embeddings:
            raise ValueError(
                f"CLIPText: {n} tokens exceed max_position_embeddings {self.max_position_embeddings}"
            )
        embed = nn.Embed(
            self.vocab_size,
            self.hidden_size,
            embedding_init=normal,
            dtype=self.dtype,
            name="token_embedding",
        )
        positions = self.param(
            "position_embedding", normal, (self.max_position_embeddings, self.hidden_size)
        )
        x = keep_rows(look_up(embed, tokens) + positions[:n].astype(self.dtype))
        mask, hidden = causal_mask(n), [x]
        for i in range(self.num_hidden_layers):
            layer = CLIPLayer(
                self.num_attention_heads,
                self.intermediate_size,
                self.hidden_act,
                self.layer_norm_eps,
                self.dtype,
                name=f"layers_{i}",
            )
            x = keep_rows(layer(x, mask))
            hidden.append(x)
        last = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="final_norm")(x)
        end = (tokens if self.eos_token_id is None else tokens == self.eos_token_id).argmax(1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        if self.projection_dim is not None:
            pooled = nn.Dense(
                self.projection_dim, use_bias=False, dtype=self.dtype, name="projection"
            )(pooled)
        return TextStates(last, pooled, tuple(hidden))


class VisionStates(NamedTuple):
    """What the image tower gives. last [b, 1 + patches, c] without the final norm; pooled [b, c] or [b, projection_dim]."""

    last: Array
    pooled: Array


class CLIPVision(nn.Module):
    """CLIP's image tower, a vision transformer (Dosovitskiy et al. 2021): pixels [b, image_size, image_size, 3] -> `VisionStates`.

    Pixels are those of `clip_pixels`. ``projection_dim`` projects the class token's state into the space that texts share; its direction is what
    retrieval-augmented models are conditioned on.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = 768
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> VisionStates:
        b, h, w, _ = x.shape
        if (h, w) != (self.image_size, self.image_size):
            raise ValueError(
                f"CLIPVision: pictures of {h}x{w} pixels, expected {self.image_size}x{self.image_size}"
            )
        normal, p = nn.initializers.normal(0.02), self.patch_size
        patch = nn.Conv(
            self.hidden_size,
            (p, p),
            strides=p,
            padding="VALID",
            use_bias=False,
            kernel_init=normal,
            dtype=self.dtype,
            name="patch_embedding",
        )
        x = patch(x).reshape(b, -1, self.hidden_size)
        token = self.param("class_embedding", normal, (self.hidden_size,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, self.hidden_size)), x], axis=1)
        x = x + self.param("position_embedding", normal, (x.shape[1], self.hidden_size)).astype(
            self.dtype
        )
        x = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="pre_norm")(x)
        for i in range(self.num_hidden_layers):
            layer = CLIPLayer(
                self.num_attention_heads,
                self.intermediate_size,
                self.hidden_act,
                self.layer_norm_eps,
                self.dtype,
                name=f"layers_{i}",
            )
            x = layer(x)
        pooled = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="post_norm")(x[:, 0])
        if self.projection_dim is not None:
            pooled = nn.Dense(
                self.projection_dim, use_bias=False, dtype=self.dtype, name="projection"
            )(pooled)
        return VisionStates(x, pooled)


_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(x: Array) -> Array:
    """Pixels [..., 3] in [-1, 1] -> normalised as CLIP was trained."""
    return ((x + 1.0) / 2.0 - jnp.array(_MEAN)) / jnp.array(_STD)
