"""A transformer over the codes of a VQ model (Esser et al. 2021, arXiv:2012.09841).

The original's Net2NetTransformer: a sequence is the condition's tokens and the codes of the
picture, in an order of `ldm_jax.models.permuter`. `build` makes one from the content of a model
directory's config.json::

    {"kind": "transformer", "transformer": {...}, "first_stage": {"kind": "vq", ...},
     "conditioner": {"kind": "label", ...}, "permuter": "Identity", "pkeep": 1.0}
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import Conditioner
from ldm_jax.errors import ConfigError, did_you_mean
from ldm_jax.kernels import Kernels
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.build import (
    DTYPES,
    build_conditioner,
    build_first_stage,
    check_shapes,
    construct,
    section,
)
from ldm_jax.models.gpt import GPT
from ldm_jax.models.ldm import FirstStage, apply
from ldm_jax.models.permuter import PERMUTERS, Order
from ldm_jax.models.vqgan import VQModel, VQModelInterface
from ldm_jax.nn.layers import with_kernels


@flax.struct.dataclass
class CodeTransformer:
    """The whole model; ``params`` has "transformer" and "conditioner".

    Attributes:
      params: Parameters.
      first_stage: The VQ model of pictures, which keeps its own parameters.
      gpt: The transformer.
      conditioner: The condition, which gives tokens.
      permuter: A name in `PERMUTERS`.
      pkeep: Below 1, training replaces codes of the input by random ones with probability
        1 - pkeep. At 0 all codes are chosen in one pass.
      config_json: The config that it was built from.
    """

    params: Any
    first_stage: FirstStage
    gpt: GPT = flax.struct.field(pytree_node=False)
    conditioner: Conditioner = flax.struct.field(pytree_node=False)
    permuter: str = flax.struct.field(pytree_node=False, default="Identity")
    pkeep: float = flax.struct.field(pytree_node=False, default=1.0)
    config_json: str = flax.struct.field(pytree_node=False, default="{}")

    # Parts that guide a UNet; a pipeline asks every model for them.
    controls: ClassVar[tuple[()]] = ()
    classifier: ClassVar[None] = None

    @property
    def config(self) -> dict[str, Any]:
        """The config that it was built from."""
        return json.loads(self.config_json)

    @property
    def multiple(self) -> int:
        """Sides in codes are multiples of this."""
        return 1

    def with_kernels(self, kernels: Kernels) -> "CodeTransformer":
        """A copy whose networks all compute with ``kernels``."""
        return with_kernels(self, kernels)

    @property
    def codes(self) -> int:
        """The number of codes, the first tokens of the vocabulary."""
        return cast(VQModel, self.first_stage.module).make_quantizer().re_embed

    def order(self, h: int, w: int) -> Order:
        """The order of the codes of a map [h, w], and its inverse."""
        return PERMUTERS[self.permuter](h, w)

    # -------------------------------------------------------------------------- pictures and codes

    def codes_of(self, x: jax.Array) -> jax.Array:
        """Pixels [b, H, W, c] in [-1, 1] -> codes int32 [b, h, w]."""
        module, params = self.first_stage.module, self.first_stage.params
        h = apply(module, params, x, method="prequant")
        return self.nearest(h)

    def nearest(self, h: jax.Array) -> jax.Array:
        """Encodings [b, h, w, c] before quantisation -> codes int32 [b, h, w]."""
        module = cast(VQModel, self.first_stage.module)
        variables = {"params": self.first_stage.params}
        # Only codes that a remapped model does not use any more can be drawn.
        rngs = {"remap": jax.random.key(0)}
        code: Any = module.apply(variables, h, method="quantized", rngs=rngs)
        return code.indices.reshape(h.shape[:3])

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes int32 [b, h, w] -> pixels [b, H, W, c], float32, about [-1, 1]."""
        return self.first_stage.decode(self.entries(codes), quantize=False)

    def entries(self, codes: jax.Array) -> jax.Array:
        """Codes int32 [b, h, w] -> entries of the codebook [b, h, w, c]."""
        module = cast(VQModel, self.first_stage.module)
        variables = {"params": self.first_stage.params}
        entries: Any = module.apply(variables, codes, method="codes")
        return entries.reshape(*codes.shape, -1)

    def sequence(self, codes: jax.Array) -> jax.Array:
        """Codes [b, h, w] -> [b, h * w] in the order of the transformer."""
        forward, _ = self.order(*codes.shape[1:])
        return codes.reshape(len(codes), -1)[:, forward]

    def grid(self, sequence: jax.Array, h: int, w: int) -> jax.Array:
        """The inverse of `sequence`."""
        _, back = self.order(h, w)
        return sequence[:, back].reshape(-1, h, w)

    # ------------------------------------------------------------------------------ the transformer

    def condition(self, params: Any, encoded: Any) -> jax.Array:
        """A host-encoded condition -> its tokens int32 [b, n] or [b, h, w]."""
        tokens = self.conditioner(params, encoded).tokens
        assert tokens is not None
        return tokens

    def logits(self, params: Any, condition: jax.Array, z: jax.Array, **options: Any) -> jax.Array:
        """The transformer's logits of the picture's tokens.

        Args:
          params: Of the transformer.
          condition: Tokens [b, n], or a grid of them.
          z: The picture's tokens [b, m]; the last is not read.
          **options: Those of `GPT` and of Flax (``rngs``).

        Returns:
          float32 [b, m, vocab_size].
        """
        condition = condition.reshape(len(condition), -1)
        tokens = jnp.concatenate([condition, z], axis=1)[:, :-1]
        logits = cast(jax.Array, self.gpt.apply({"params": params}, tokens, **options))
        return logits[:, condition.shape[1] - 1 :]


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Mean cross entropy in nats of tokens int [b, m] under logits [b, m, vocab]."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(logp, target[..., None], axis=-1).mean()


def keep_codes(z: jax.Array, random: jax.Array, u: jax.Array, pkeep: float) -> jax.Array:
    """Replaces tokens z [b, m] by ``random`` ones where uniform numbers u are not below pkeep."""
    return jnp.where(u < pkeep, z, random)


# -------------------------------------------------------------------------------------- building


def build(
    config: Mapping[str, Any], params: Any, dtype: str = "float32", first_stage_params: Any = None
) -> CodeTransformer:
    """A CodeTransformer of a config and its parameters.

    Args:
      config: See the module.
      params: {"transformer", "conditioner"}, their shapes, or None to fill in later.
      dtype: Of `DTYPES`, that of the products.
      first_stage_params: The same of the first stage.

    Raises:
      ConfigError: The config is incomplete, or a field has a wrong value.
    """
    gpt = construct(GPT, "transformer", section(config, "transformer"), dtype=DTYPES[dtype])
    module = build_first_stage(config, dtype)
    if not isinstance(module, VQModelInterface):
        raise ConfigError("first_stage: a transformer needs codes, of a first stage of kind 'vq'")
    permuter = config.get("permuter", "Identity")
    if permuter not in PERMUTERS:
        raise ConfigError(
            f"permuter {permuter!r} does not exist{did_you_mean(permuter, PERMUTERS)}"
        )
    codes = module.make_quantizer().re_embed
    if gpt.vocab_size < codes:
        raise ConfigError(
            f"transformer.vocab_size {gpt.vocab_size} is less than the {codes} codes of the first "
            "stage"
        )
    if gpt.n_embd % gpt.n_head:
        raise ConfigError(
            f"transformer.n_embd {gpt.n_embd} must be a multiple of n_head {gpt.n_head}"
        )
    return CodeTransformer(
        params=params,
        first_stage=FirstStage(first_stage_params, 1.0, module),
        gpt=gpt,
        conditioner=build_conditioner(config, dtype),
        permuter=permuter,
        pkeep=float(config.get("pkeep", 1.0)),
        config_json=json.dumps(config),
    )


def init_transformer(model: CodeTransformer, key: jax.Array) -> dict[str, Any]:
    """Initial float32 parameters of the transformer alone."""
    return dict(model.gpt.init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def check_params(model: CodeTransformer) -> None:
    """Compares the parameters of a model with its config.

    Raises:
      ConfigError: One is missing, or has another shape.
    """
    present = {**model.params, "first_stage": model.first_stage.params}
    check_shapes(_param_shapes(model.config_json), present)


@lru_cache(maxsize=4)
def _param_shapes(config_json: str) -> dict[str, Any]:
    model, key = build(json.loads(config_json), None), jax.random.key(0)
    module = cast(VQModelInterface, model.first_stage.module)
    return jax.eval_shape(
        lambda: {
            "transformer": init_transformer(model, key),
            "conditioner": model.conditioner.init(key),
            "first_stage": init_autoencoder(module, key),
        }
    )


def check_lengths(model: CodeTransformer, latent: tuple[int, int]) -> np.ndarray:
    """Returns the condition's tokens of an example, int32 [1, ...].

    Raises:
      ConfigError: The sequence of a picture with codes [h, w] does not fit the transformer, or a
        token is not in its vocabulary.
    """
    conditioner, gpt = model.conditioner, model.gpt
    tokens = jax.eval_shape(
        lambda: conditioner(conditioner.init(jax.random.key(0)), conditioner.encode_null(1))
    ).tokens
    if tokens is None:
        kind = model.config["conditioner"]["kind"]
        raise ConfigError(f"model.conditioner.kind {kind!r} gives no tokens for a transformer")
    count, n = int(np.prod(tokens.shape[1:])), latent[0] * latent[1]
    if count + n - 1 > gpt.block_size:
        raise ConfigError(
            f"model.transformer.block_size {gpt.block_size} is too small: {count} tokens of the "
            f"condition and {n} codes need {count + n - 1}"
        )
    if (most := conditioner.vocabulary) > gpt.vocab_size:
        raise ConfigError(
            f"model.transformer.vocab_size {gpt.vocab_size} is less than {most}, the number of "
            "tokens that the condition has"
        )
    return tokens
