"""From the original's YAML (a dotted ``target`` class and its ``params``) to our modules.

Every parameter is either used, known to say nothing about the network, or an error: a configuration is never half
understood.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ldm_jax.models.autoencoder import AutoencoderKL, Decoder, Encoder
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.gpt import GPT
from ldm_jax.models.text import TransformerEncoder
from ldm_jax.models.unet import UNet


class TargetError(ValueError):
    """A configuration that names a class or parameter which is not supported here."""


def _params(
    where: str, params: Mapping[str, Any], *, same: str, ignored: str = "", fixed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The parameters in ``same`` (names apart by spaces), lists as tuples. ``ignored`` ones are dropped, ``fixed`` ones
    must have the given value.

    A ``fixed`` parameter may be left out. Raises TargetError on any other.
    """
    fixed = fixed or {}
    known = {*same.split(), *ignored.split(), *fixed}
    if unknown := sorted(params.keys() - known):
        raise TargetError(f"{where}: unknown parameters {', '.join(unknown)} (known: {', '.join(sorted(known))})")
    for name, value in fixed.items():
        if params.get(name, value) != value:
            raise TargetError(f"{where}: {name}={params[name]!r} is not supported, only {value!r}")
    return {
        name: tuple(params[name]) if isinstance(params[name], list) else params[name]
        for name in same.split()
        if name in params
    }


_UNET = """
    in_channels model_channels out_channels num_res_blocks attention_resolutions dropout channel_mult conv_resample
    num_classes num_heads num_head_channels num_heads_upsample use_scale_shift_norm resblock_updown
    use_new_attention_order use_spatial_transformer transformer_depth context_dim n_embed legacy
"""
_DDCONFIG = """
    ch out_ch ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv in_channels resolution z_channels
    attn_type
"""
# What the first stages' constructors take beside the network: the loss, and how their trainer is fed.
_TRAINING = """
    lossconfig ckpt_path ignore_keys image_key colorize_nlabels monitor batch_resize_range scheduler_config lr_g_factor
    use_ema
"""
# Options of x_transformer that change the network and that no published model sets.
_OFF = """
    cross_attend only_cross use_scalenorm use_rmsnorm use_rezero position_infused_attn residual_attn
    cross_residual_attn macaron gate_residual attn_talking_heads attn_on_attn attn_num_mem_kv attn_use_entmax15
"""


def unet_from_params(params: Mapping[str, Any]) -> UNet:
    """ldm.modules.diffusionmodules.openaimodel.UNetModel."""
    # image_size is stored and never read; use_fp16 only chose the arithmetic, as our dtype does.
    fields = _params("UNetModel", params, same=_UNET, ignored="image_size use_fp16 use_checkpoint", fixed={"dims": 2})
    return UNet(**fields, remat=bool(params.get("use_checkpoint", False)))


def _coder_fields(
    where: str, params: Mapping[str, Any], *, same: str = "", ignored: str = "", fixed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    fields = _params(where, params, same=f"{_DDCONFIG} {same}", ignored=f"use_linear_attn {ignored}", fixed=fixed)
    return fields | {"attn_type": "linear"} if params.get("use_linear_attn") else fields


def encoder_from_params(params: Mapping[str, Any]) -> Encoder:
    """ldm.modules.diffusionmodules.model.Encoder."""
    return Encoder(**_coder_fields("Encoder", params, same="double_z", ignored="tanh_out give_pre_end"))


def decoder_from_params(params: Mapping[str, Any]) -> Decoder:
    """ldm.modules.diffusionmodules.model.Decoder."""
    return Decoder(**_coder_fields("Decoder", params, same="tanh_out give_pre_end", ignored="double_z"))


def autoencoder_kl_from_params(params: Mapping[str, Any]) -> AutoencoderKL:
    """ldm.models.autoencoder.AutoencoderKL."""
    outer = _params("AutoencoderKL", params, same="embed_dim", ignored=f"ddconfig {_TRAINING}")
    fixed = {"double_z": True, "give_pre_end": False}
    return AutoencoderKL(
        **outer, **_coder_fields("AutoencoderKL ddconfig", params["ddconfig"], same="tanh_out", fixed=fixed)
    )


def bert_from_params(params: Mapping[str, Any]) -> TransformerEncoder:
    """ldm.modules.encoders.modules.BERTEmbedder and TransformerEmbedder, with the projection to logits that their
    checkpoints keep."""
    known = "vocab_size max_seq_len"
    ignored = "n_embed n_layer device use_tokenizer"
    fields = _params("BERTEmbedder", params, same=known, ignored=ignored, fixed={"embedding_dropout": 0.0})
    return TransformerEncoder(params["n_embed"], params["n_layer"], **fields, with_logits=True)


def transformer_wrapper_from_params(wrapper: Mapping[str, Any], encoder: Mapping[str, Any]) -> TransformerEncoder:
    """ldm.modules.x_transformer.TransformerWrapper around an Encoder, from the parameters of both."""
    fixed = {
        "emb_dropout": 0.0,
        "use_pos_emb": True,
        "tie_embedding": False,
        "emb_dim": encoder["dim"],
        "max_mem_len": 0.0,
        "num_memory_tokens": None,
    }
    outer = _params("TransformerWrapper", wrapper, same="num_tokens max_seq_len", fixed=fixed)
    fixed = dict.fromkeys(_OFF.split(), False) | {"pre_norm": True, "attn_dropout": 0.0, "ff_dropout": 0.0}
    fixed |= dict.fromkeys(("custom_layers", "sandwich_coef", "par_ratio", "attn_sparse_topk"))
    renamed = {"attn_dim_head": "head_dim"}
    inner = _params("x_transformer Encoder", encoder, same="dim depth heads attn_dim_head ff_mult ff_glu", fixed=fixed)
    inner = {renamed.get(name, name): value for name, value in inner.items()}
    return TransformerEncoder(
        vocab_size=outer["num_tokens"], max_seq_len=outer["max_seq_len"], **inner, with_logits=True
    )


def discriminator_from_params(params: Mapping[str, Any]) -> PatchDiscriminator:
    """taming.modules.discriminator.model.NLayerDiscriminator."""
    return PatchDiscriminator(**_params("NLayerDiscriminator", params, same="input_nc ndf n_layers use_actnorm"))


def gpt_from_params(params: Mapping[str, Any]) -> GPT:
    """taming.modules.transformer.mingpt.GPT."""
    same = "vocab_size block_size n_layer n_head n_embd n_unmasked embd_pdrop resid_pdrop"
    return GPT(**_params("GPT", params, same=same, fixed={"attn_pdrop": 0.0}))


TARGETS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": unet_from_params,
    "ldm.modules.diffusionmodules.model.Encoder": encoder_from_params,
    "ldm.modules.diffusionmodules.model.Decoder": decoder_from_params,
    "ldm.models.autoencoder.AutoencoderKL": autoencoder_kl_from_params,
    "ldm.modules.encoders.modules.BERTEmbedder": bert_from_params,
    "ldm.modules.encoders.modules.TransformerEmbedder": bert_from_params,
    "taming.modules.discriminator.model.NLayerDiscriminator": discriminator_from_params,
    "taming.modules.transformer.mingpt.GPT": gpt_from_params,
}


def module_from_config(target: str, params: Mapping[str, Any] | None = None) -> Any:
    """The Linen module that a ``target`` and its ``params`` describe; TargetError where either is not supported."""
    if target not in TARGETS:
        raise TargetError(f"{target} is not supported (have {', '.join(TARGETS)})")
    return TARGETS[target](params or {})
