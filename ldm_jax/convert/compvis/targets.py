"""From the original's YAML (a dotted ``target`` class and its ``params``) to modules.

Every parameter is used, known not to concern the network, or an error.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from ldm_jax.errors import TargetError, did_you_mean
from ldm_jax.models.autoencoder import AutoencoderKL, Decoder, Encoder
from ldm_jax.models.bert import TransformerEncoder
from ldm_jax.models.clip import CLIPText, CLIPVision
from ldm_jax.models.controlnet import ControlNet
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.embedders import ClassEmbedder, SpatialRescaler
from ldm_jax.models.encoder_unet import EncoderUNet
from ldm_jax.models.gpt import GPT
from ldm_jax.models.perceptual import LPIPS, VGG16_WIDTHS
from ldm_jax.models.quantize import EMAQuantizer, GumbelQuantizer, VectorQuantizer
from ldm_jax.models.rescale import (
    FirstStagePostProcessor,
    LatentRescaler,
    MergedRescaleDecoder,
    MergedRescaleEncoder,
)
from ldm_jax.models.unet import FIELDS, UNet
from ldm_jax.models.vqgan import VQModel, VQModelInterface
from ldm_jax.models.x_transformer import TransformerWrapper

_LDM, _TAMING = "ldm.modules", "taming.modules"


def pick_params(
    where: str,
    params: Mapping[str, Any],
    *,
    same: str,
    ignored: str = "",
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Selects parameters by name.

    Args:
      where: Opens the error message.
      params: The parameters of a class.
      same: Names, separated by spaces, of those to return, lists as tuples.
      ignored: Names of those to drop.
      fixed: {name: the only supported value}; the parameter may be absent.

    Raises:
      TargetError: There is another parameter, or another value of a fixed one.
    """
    fixed = fixed or {}
    known = {*same.split(), *ignored.split(), *fixed}
    if unknown := sorted(params.keys() - known):
        raise TargetError(
            f"{where}: unknown parameters {', '.join(unknown)} (known: {', '.join(sorted(known))})"
        )
    for name, value in fixed.items():
        if params.get(name, value) != value:
            raise TargetError(f"{where}: {name}={params[name]!r} is not supported, only {value!r}")
    return {
        name: tuple(params[name]) if isinstance(params[name], list) else params[name]
        for name in same.split()
        if name in params
    }


_UNET = """
    in_channels model_channels out_channels num_res_blocks attention_resolutions dropout
    channel_mult conv_resample num_classes adm_in_channels use_linear_in_transformer num_heads
    num_head_channels num_heads_upsample use_scale_shift_norm resblock_updown
    use_new_attention_order use_spatial_transformer transformer_depth context_dim n_embed legacy
    disable_self_attentions num_attention_blocks
"""
_ENCODER_UNET = """
    in_channels model_channels out_channels num_res_blocks attention_resolutions dropout
    channel_mult conv_resample num_heads num_head_channels num_heads_upsample use_scale_shift_norm
    resblock_updown use_new_attention_order image_size pool
"""
_DDCONFIG = """
    ch out_ch ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv in_channels
    resolution z_channels attn_type
"""
# Parameters of the first stages' constructors about the loss and the training; the second are those
# of latent-diffusion's VQ models alone.
_TRAINING = "lossconfig ckpt_path ignore_keys image_key colorize_nlabels monitor"
_VQ_TRAINING = f"{_TRAINING} batch_resize_range scheduler_config lr_g_factor use_ema"
# Options of x_transformer that change the network and that no published model sets.
_OFF = """
    cross_attend only_cross use_rmsnorm use_rezero position_infused_attn cross_residual_attn macaron
    gate_residual attn_on_attn attn_use_entmax15
"""


def unet_from_params(params: Mapping[str, Any]) -> UNet:
    """ldm.modules.diffusionmodules.openaimodel.UNetModel."""
    # image_size is never read; use_fp16 chose the arithmetic, as our dtype does.
    fields = pick_params(
        "UNetModel",
        params,
        same=_UNET,
        ignored="image_size use_fp16 use_checkpoint spatial_transformer_attn_type",
        fixed={"dims": 2, "disable_middle_self_attn": False},
    )
    contexts = fields.get("context_dim")
    if isinstance(contexts, tuple):  # of each block of a transformer
        if len(set(contexts)) != 1:
            raise TargetError(f"UNetModel: context_dim={list(contexts)} must be the same for all")
        fields["context_dim"] = contexts[0]
    return UNet(**fields, remat=bool(params.get("use_checkpoint", False)))


def controlnet_from_params(params: Mapping[str, Any]) -> ControlNet:
    """cldm.cldm.ControlNet, whose other parameters are those of UNetModel."""
    given = {name: value for name, value in params.items() if name != "hint_channels"}
    if "hint_channels" not in params or "out_channels" in params:
        raise TargetError("ControlNet: hint_channels is missing, or out_channels is given")
    unet = unet_from_params({**given, "out_channels": given.get("in_channels")})
    if unet.n_embed is not None:
        raise TargetError("ControlNet: n_embed is not supported")
    fields = {name: getattr(unet, name) for name in (*FIELDS, "remat")}
    return ControlNet(**fields, hint_channels=params["hint_channels"])


def sgm_unet_from_params(params: Mapping[str, Any]) -> UNet:
    """sgm.modules.diffusionmodules.openaimodel.UNetModel (SDXL), which has transformers only."""
    return unet_from_params({"legacy": False, **params, "use_spatial_transformer": True})


def encoder_unet_from_params(params: Mapping[str, Any]) -> EncoderUNet:
    """ldm.modules.diffusionmodules.openaimodel.EncoderUNetModel; num_heads defaults to 1."""
    ignored = "use_fp16 use_checkpoint"
    fields = pick_params(
        "EncoderUNetModel", params, same=_ENCODER_UNET, ignored=ignored, fixed={"dims": 2}
    )
    return EncoderUNet(
        **{"num_heads": 1, **fields}, remat=bool(params.get("use_checkpoint", False))
    )


def _coder_fields(
    where: str,
    params: Mapping[str, Any],
    *,
    same: str = "",
    ignored: str = "",
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    fields = pick_params(
        where, params, same=f"{_DDCONFIG} {same}", ignored=f"use_linear_attn {ignored}", fixed=fixed
    )
    return fields | {"attn_type": "linear"} if params.get("use_linear_attn") else fields


def encoder_from_params(params: Mapping[str, Any]) -> Encoder:
    """ldm.modules.diffusionmodules.model.Encoder."""
    return Encoder(
        **_coder_fields("Encoder", params, same="double_z", ignored="tanh_out give_pre_end")
    )


def decoder_from_params(params: Mapping[str, Any]) -> Decoder:
    """ldm.modules.diffusionmodules.model.Decoder."""
    return Decoder(
        **_coder_fields("Decoder", params, same="tanh_out give_pre_end", ignored="double_z")
    )


def autoencoder_kl_from_params(params: Mapping[str, Any]) -> AutoencoderKL:
    """ldm.models.autoencoder.AutoencoderKL."""
    outer = pick_params("AutoencoderKL", params, same="embed_dim", ignored=f"ddconfig {_TRAINING}")
    fixed = {"double_z": True, "give_pre_end": False}
    return AutoencoderKL(
        **outer,
        **_coder_fields("AutoencoderKL ddconfig", params["ddconfig"], same="tanh_out", fixed=fixed),
    )


def sgm_kl_from_params(params: Mapping[str, Any]) -> AutoencoderKL:
    """sgm.models.autoencoder.AutoencoderKL, whose attention may be that of xformers."""
    inner = dict(params["ddconfig"])
    if inner.get("attn_type") in ("vanilla-xformers", "memory-efficient-cross-attn"):
        inner["attn_type"] = "vanilla"
    return autoencoder_kl_from_params({**params, "ddconfig": inner})


def _remap(where: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the codes in use as a tuple; the original names a .npy file."""
    remap = params.get("remap")
    if remap is None:
        return {}
    if isinstance(remap, str):
        if not Path(remap).is_file():
            raise TargetError(
                f"{where}: remap={remap!r} is no file here; give the codes in use as a list instead"
            )
        remap = np.load(remap, allow_pickle=False)
    return {"remap": tuple(int(i) for i in np.asarray(remap).reshape(-1))}


_VQ = TypeVar("_VQ", VQModel, VQModelInterface)


def _vqmodel(
    cls: type[_VQ],
    params: Mapping[str, Any],
    quantizer: Literal["vq", "gumbel", "ema"] = "vq",
    training: str = _TRAINING,
    more: str = "",
) -> _VQ:
    """A VQ model; ``training`` and ``more`` name the arguments that its class has of its own."""
    where = cls.__name__
    known, ignored = (
        f"embed_dim n_embed sane_index_shape unknown_index {more}",
        f"ddconfig remap {training}",
    )
    outer = pick_params(where, params, same=known, ignored=ignored)
    fixed = {"double_z": False, "give_pre_end": False}
    inner = _coder_fields(f"{where} ddconfig", params["ddconfig"], same="tanh_out", fixed=fixed)
    return cls(**outer, **inner, **_remap(where, params), quantizer=quantizer)


def vqmodel_interface_from_params(params: Mapping[str, Any]) -> VQModelInterface:
    """ldm.models.autoencoder.VQModelInterface."""
    return _vqmodel(VQModelInterface, params, training=_VQ_TRAINING)


def vector_quantizer_from_params(params: Mapping[str, Any], second: bool = True) -> VectorQuantizer:
    """VectorQuantizer2 of taming.modules.vqvae.quantize; ``second`` False: VectorQuantizer."""
    more = "legacy sane_index_shape unknown_index" if second else ""
    fields = pick_params(
        "VectorQuantizer",
        params,
        same=f"beta {more}",
        ignored="n_e e_dim remap" if second else "n_e e_dim",
    )
    return VectorQuantizer(
        params["n_e"], params["e_dim"], **fields, **_remap("VectorQuantizer", params)
    )


def gumbel_from_params(params: Mapping[str, Any]) -> GumbelQuantizer:
    """taming.modules.vqvae.quantize.GumbelQuantize."""
    same = "n_embed num_hiddens straight_through kl_weight temp_init unknown_index"
    # use_vqinterface only changes the packing of results, train the mode.
    ignored = "embedding_dim remap use_vqinterface train"
    fields = pick_params("GumbelQuantize", params, same=same, ignored=ignored)
    return GumbelQuantizer(
        embed_dim=params["embedding_dim"], **fields, **_remap("GumbelQuantize", params)
    )


def ema_from_params(params: Mapping[str, Any]) -> EMAQuantizer:
    """taming.modules.vqvae.quantize.EMAVectorQuantizer."""
    fields = pick_params(
        "EMAVectorQuantizer",
        params,
        same="n_embed beta decay eps unknown_index",
        ignored="embedding_dim remap",
    )
    return EMAQuantizer(
        embed_dim=params["embedding_dim"], **fields, **_remap("EMAVectorQuantizer", params)
    )


def class_embedder_from_params(params: Mapping[str, Any]) -> ClassEmbedder:
    """ldm.modules.encoders.modules.ClassEmbedder."""
    return ClassEmbedder(
        **pick_params("ClassEmbedder", params, same="embed_dim n_classes", ignored="key")
    )


def rescaler_from_params(params: Mapping[str, Any]) -> SpatialRescaler:
    """ldm.modules.encoders.modules.SpatialRescaler."""
    same = "n_stages method multiplier in_channels out_channels bias"
    fields = pick_params("SpatialRescaler", params, same=same)
    if fields.get("method", "bilinear") not in ("nearest", "bilinear", "bicubic", "area"):
        raise TargetError(f"SpatialRescaler: method={fields['method']!r} does not resize pictures")
    return SpatialRescaler(**fields)


# Fields of transformers' CLIP configurations that do not concern the network.
_CLIP_OTHER = """
    model_type architectures torch_dtype dtype transformers_version initializer_factor
    initializer_range pad_token_id bos_token_id return_dict _name_or_path
"""
_CLIP = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps"
)


def clip_text_from_params(params: Mapping[str, Any]) -> CLIPText:
    """transformers.CLIPTextModel, from its configuration."""
    same = f"{_CLIP} vocab_size max_position_embeddings eos_token_id"
    ignored = f"projection_dim {_CLIP_OTHER}"
    fields = pick_params(
        "CLIPTextModel", params, same=same, ignored=ignored, fixed={"attention_dropout": 0.0}
    )
    if fields.get("eos_token_id") == 2:  # in the oldest configurations: the highest token
        del fields["eos_token_id"]
    return CLIPText(**fields)


def frozen_clip_from_params(params: Mapping[str, Any]) -> CLIPText:
    """ldm.modules.encoders.modules.FrozenCLIPEmbedder: ViT-L/14's text tower."""
    pick_params(
        "FrozenCLIPEmbedder",
        params,
        same="",
        ignored="device",
        fixed={"max_length": 77, "version": _VIT_L},
    )
    return CLIPText()


def clip_vision_from_params(params: Mapping[str, Any], projected: bool = True) -> CLIPVision:
    """transformers.CLIPVisionModelWithProjection; ``projected`` False: CLIPVisionModel."""
    same = f"{_CLIP} image_size patch_size projection_dim"
    fixed = {"attention_dropout": 0.0, "num_channels": 3}
    # transformers' defaults are of another model than ours.
    fields: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    fields |= {"image_size": 224, "patch_size": 32, "projection_dim": 512}
    fields |= pick_params("CLIPVisionModel", params, same=same, ignored=_CLIP_OTHER, fixed=fixed)
    if not projected:
        fields["projection_dim"] = None
    return CLIPVision(**fields)


_VIT_L = "openai/clip-vit-large-patch14"
OPEN_CLIP = f"{_LDM}.encoders.modules.FrozenOpenCLIPEmbedder"
_TOWER = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    max_position_embeddings
"""
VIT_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def open_clip_from_params(params: Mapping[str, Any]) -> CLIPText:
    """FrozenOpenCLIPEmbedder: ViT-H/14's text tower, of the layers that ``layer`` runs.

    Other sizes than ViT-H/14's are given by the fields of `CLIPText`.
    """
    fields: dict[str, Any] = VIT_H | pick_params(
        "FrozenOpenCLIPEmbedder",
        params,
        same=_TOWER,
        ignored="freeze device version layer",
        fixed={"arch": "ViT-H-14", "max_length": 77},
    )
    fields["num_hidden_layers"] -= unused_layers(params)
    return CLIPText(**fields, hidden_act="gelu")


def unused_layers(params: Mapping[str, Any]) -> int:
    """The layers of an open_clip tower that FrozenOpenCLIPEmbedder stores and does not run."""
    layers = {"last": 0, "penultimate": 1}
    layer = params.get("layer", "last")
    if layer not in layers:
        raise TargetError(f"FrozenOpenCLIPEmbedder: layer={layer!r}{did_you_mean(layer, layers)}")
    return layers[layer]


def lpips_from_params(params: Mapping[str, Any]) -> LPIPS:
    """taming.modules.losses.lpips.LPIPS; ``vgg_widths`` (tests) makes its VGG narrower."""
    fields = pick_params("LPIPS", params, same="vgg_widths use_dropout")
    return LPIPS(fields.pop("vgg_widths", VGG16_WIDTHS), **fields)


def bert_from_params(params: Mapping[str, Any]) -> TransformerEncoder:
    """BERTEmbedder and TransformerEmbedder of ldm.modules.encoders.modules, with the logits."""
    known = "vocab_size max_seq_len"
    ignored = "n_embed n_layer device use_tokenizer"
    fields = pick_params(
        "BERTEmbedder", params, same=known, ignored=ignored, fixed={"embedding_dropout": 0.0}
    )
    return TransformerEncoder(params["n_embed"], params["n_layer"], **fields, with_logits=True)


_ENCODER = "ldm.modules.x_transformer.Encoder"


def transformer_wrapper_from_params(params: Mapping[str, Any]) -> TransformerWrapper:
    """ldm.modules.x_transformer.TransformerWrapper around the Encoder of ``attn_layers``."""
    outer = pick_params(
        "TransformerWrapper",
        params,
        same="""
            num_tokens max_seq_len emb_dim max_mem_len emb_dropout num_memory_tokens tie_embedding
            use_pos_emb
        """,
        ignored="attn_layers",
    )
    layers = params["attn_layers"]
    if layers["target"] != _ENCODER:
        raise TargetError(
            f"TransformerWrapper: attn_layers={layers['target']} is not supported, only {_ENCODER}"
        )
    fixed = dict.fromkeys(_OFF.split(), False) | {"pre_norm": True, "causal": False}
    fixed |= dict.fromkeys(("custom_layers", "sandwich_coef", "par_ratio")) | {"attn_num_mem_kv": 0}
    inner = pick_params(
        "x_transformer Encoder",
        layers["params"],
        same="""
            dim depth heads attn_dim_head ff_mult ff_glu use_scalenorm residual_attn
            attn_talking_heads attn_sparse_topk attn_dropout ff_dropout
        """,
        ignored="rel_pos_num_buckets rel_pos_max_distance",  # of relative positions, always off
        fixed=fixed,
    )
    outer["num_memory_tokens"] = outer.get("num_memory_tokens") or 0
    outer["max_mem_len"] = int(outer.get("max_mem_len") or 0)
    return TransformerWrapper(**outer, **inner)


def latent_rescaler_from_params(params: Mapping[str, Any]) -> LatentRescaler:
    """ldm.modules.diffusionmodules.model.LatentRescaler."""
    same = "factor in_channels mid_channels out_channels depth"
    return LatentRescaler(**pick_params("LatentRescaler", params, same=same))


_MERGED = """
    ch resolution out_ch num_res_blocks attn_resolutions dropout resamp_with_conv ch_mult
    rescale_factor rescale_module_depth
"""


def rescale_encoder_from_params(params: Mapping[str, Any]) -> MergedRescaleEncoder:
    """ldm.modules.diffusionmodules.model.MergedRescaleEncoder."""
    fields = pick_params("MergedRescaleEncoder", params, same=f"in_channels {_MERGED}")
    return MergedRescaleEncoder(**fields)


def rescale_decoder_from_params(params: Mapping[str, Any]) -> MergedRescaleDecoder:
    """ldm.modules.diffusionmodules.model.MergedRescaleDecoder."""
    fields = pick_params("MergedRescaleDecoder", params, same=f"z_channels {_MERGED}")
    return MergedRescaleDecoder(**fields)


def post_processor_from_params(params: Mapping[str, Any]) -> FirstStagePostProcessor:
    """ldm.modules.diffusionmodules.model.FirstStagePostProcessor around ``pretrained_config``."""
    fields = pick_params(
        "FirstStagePostProcessor",
        params,
        same="ch_mult in_channels reshape n_channels dropout",
        ignored="pretrained_config",
        fixed={"pretrained_model": None},
    )
    config = params.get("pretrained_config")
    if config is None:
        raise TargetError("FirstStagePostProcessor: pretrained_config is missing")
    inner = module_from_config(config["target"], config.get("params"))
    return FirstStagePostProcessor(**fields, pretrained=inner)


def discriminator_from_params(params: Mapping[str, Any]) -> PatchDiscriminator:
    """taming.modules.discriminator.model.NLayerDiscriminator."""
    return PatchDiscriminator(
        **pick_params("NLayerDiscriminator", params, same="input_nc ndf n_layers use_actnorm")
    )


def gpt_from_params(params: Mapping[str, Any]) -> GPT:
    """taming.modules.transformer.mingpt.GPT."""
    same = (
        "vocab_size block_size n_layer n_head n_embd n_unmasked embd_pdrop resid_pdrop attn_pdrop"
    )
    return GPT(**pick_params("GPT", params, same=same))


TARGETS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    f"{_LDM}.diffusionmodules.openaimodel.UNetModel": unet_from_params,
    "cldm.cldm.ControlNet": controlnet_from_params,
    "cldm.cldm.ControlledUnetModel": unet_from_params,
    f"{_LDM}.diffusionmodules.openaimodel.EncoderUNetModel": encoder_unet_from_params,
    f"{_LDM}.diffusionmodules.model.Encoder": encoder_from_params,
    f"{_LDM}.diffusionmodules.model.Decoder": decoder_from_params,
    f"{_LDM}.diffusionmodules.model.LatentRescaler": latent_rescaler_from_params,
    f"{_LDM}.diffusionmodules.model.MergedRescaleEncoder": rescale_encoder_from_params,
    f"{_LDM}.diffusionmodules.model.MergedRescaleDecoder": rescale_decoder_from_params,
    f"{_LDM}.diffusionmodules.model.FirstStagePostProcessor": post_processor_from_params,
    f"{_LDM}.x_transformer.TransformerWrapper": transformer_wrapper_from_params,
    "ldm.models.autoencoder.AutoencoderKL": autoencoder_kl_from_params,
    "ldm.models.autoencoder.VQModel": partial(_vqmodel, VQModel, training=_VQ_TRAINING),
    "ldm.models.autoencoder.VQModelInterface": vqmodel_interface_from_params,
    "taming.models.vqgan.VQModel": partial(_vqmodel, VQModel),
    "taming.models.vqgan.VQSegmentationModel": partial(_vqmodel, VQModel, more="n_labels"),
    "taming.models.vqgan.VQNoDiscModel": partial(_vqmodel, VQModel),
    "taming.models.vqgan.GumbelVQ": partial(
        _vqmodel,
        VQModel,
        quantizer="gumbel",
        training=f"{_TRAINING} temperature_scheduler_config",
        more="kl_weight",
    ),
    "taming.models.vqgan.EMAVQ": partial(_vqmodel, VQModel, quantizer="ema", more="beta"),
    f"{_TAMING}.vqvae.quantize.VectorQuantizer": partial(
        vector_quantizer_from_params, second=False
    ),
    f"{_TAMING}.vqvae.quantize.VectorQuantizer2": vector_quantizer_from_params,
    f"{_TAMING}.vqvae.quantize.GumbelQuantize": gumbel_from_params,
    f"{_TAMING}.vqvae.quantize.EMAVectorQuantizer": ema_from_params,
    f"{_LDM}.encoders.modules.BERTEmbedder": bert_from_params,
    f"{_LDM}.encoders.modules.TransformerEmbedder": bert_from_params,
    f"{_LDM}.encoders.modules.ClassEmbedder": class_embedder_from_params,
    f"{_LDM}.encoders.modules.SpatialRescaler": rescaler_from_params,
    f"{_LDM}.encoders.modules.FrozenCLIPEmbedder": frozen_clip_from_params,
    OPEN_CLIP: open_clip_from_params,
    "sgm.modules.diffusionmodules.openaimodel.UNetModel": sgm_unet_from_params,
    "sgm.models.autoencoder.AutoencoderKL": sgm_kl_from_params,
    "sgm.models.autoencoder.AutoencoderKLInferenceWrapper": sgm_kl_from_params,
    f"{_LDM}.encoders.modules.TinyCLIP": clip_text_from_params,
    "transformers.CLIPTextModel": clip_text_from_params,
    "transformers.CLIPVisionModel": partial(clip_vision_from_params, projected=False),
    "transformers.CLIPVisionModelWithProjection": clip_vision_from_params,
    f"{_TAMING}.discriminator.model.NLayerDiscriminator": discriminator_from_params,
    f"{_TAMING}.losses.lpips.LPIPS": lpips_from_params,
    f"{_TAMING}.transformer.mingpt.GPT": gpt_from_params,
}


def module_from_config(target: str, params: Mapping[str, Any] | None = None) -> Any:
    """Returns the module of a ``target`` and its ``params``; TargetError if it is not supported."""
    if target not in TARGETS:
        raise TargetError(f"{target} is not supported{did_you_mean(target, TARGETS)}")
    return TARGETS[target](params or {})
