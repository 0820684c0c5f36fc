"""Configurations of diffusers' and transformers' components, and sections of a model config.

Every field is used, known not to concern the network, or an error. Fields that a file leaves out
have the default of their class.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.convert.compvis.targets import clip_text_from_params, pick_params
from ldm_jax.errors import TargetError
from ldm_jax.models.autoencoder import Autoencoder, Decoder, Encoder
from ldm_jax.models.bert import TransformerEncoder
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.vqgan import VQModelInterface

Config = dict[str, Any]

# Fields about the file itself.
ABOUT = """
    _class_name _diffusers_version _name_or_path architectures model_type torch_dtype dtype
    transformers_version return_dict use_cache format
"""


def one(where: str, name: str, values: Any) -> Any:
    """Returns the value of a field that may be given per level and must then be uniform."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return values
    if len(set(values)) != 1:
        raise TargetError(
            f"{where}: {name}={list(values)} differs between levels, which is not supported"
        )
    return values[0]


def mults_of(where: str, channels: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Returns (channels of the first level, multiples of them per level)."""
    first = channels[0]
    if any(c % first for c in channels):
        raise TargetError(
            f"{where}: block_out_channels={list(channels)} are no multiples of the first"
        )
    return first, tuple(c // first for c in channels)


def attention_levels(where: str, config: Config, plain: str, attending: str) -> tuple[bool, ...]:
    """Returns which levels have attention; the block types have {} for "Down" and "Up"."""
    levels = []
    for way, types in (("Down", config["down_block_types"]), ("Up", config["up_block_types"])):
        known = {plain.format(way): False, attending.format(way): True}
        if unknown := [kind for kind in types if kind not in known]:
            raise TargetError(
                f"{where}: the block {unknown[0]} is not supported (have {', '.join(known)})"
            )
        levels.append([known[kind] for kind in types])
    down, up = levels[0], levels[1][::-1]
    if down != up or len(down) != len(config["block_out_channels"]):
        raise TargetError(
            f"{where}: down_block_types and up_block_types do not mirror each other over the levels"
            " of block_out_channels"
        )
    return tuple(down)


def block_types(levels: Sequence[bool], plain: str, attending: str) -> Config:
    """The inverse of `attention_levels`."""
    names = (plain, attending)
    return {
        "down_block_types": [names[attends].format("Down") for attends in levels],
        "up_block_types": [names[attends].format("Up") for attends in reversed(levels)],
    }


def need(where: str, module: Any, **needed: Any) -> None:
    """Raises TargetError where a field has a value that the other side cannot hold."""
    for name, value in needed.items():
        if getattr(module, name) != value:
            raise TargetError(
                f"{where} cannot hold {name}={getattr(module, name)!r}, only {value!r}"
            )


def side(size: Any) -> int:
    """Returns a ``sample_size``, which may be [height, width], as one number."""
    return int(size[0] if isinstance(size, Sequence) else size)


# ------------------------------------------------------------------------------------- autoencoders

_CODER_SAME = """
    in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block
    latent_channels norm_num_groups sample_size mid_block_add_attention scaling_factor
"""
_CODER_DEFAULTS: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "sample_size": 32,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
_KL_FIXED = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
_VQ_FIXED = {"act_fn": "silu", "norm_type": "group", "lookup_from_codebook": False}
_CODERS = ("{}EncoderBlock2D", "Attn{}EncoderBlock2D")


def _coder_types(config: Config) -> Config:
    """Returns the config with the decoder's block types named like the encoder's."""
    return config | {
        "up_block_types": [kind.replace("Decoder", "Encoder") for kind in config["up_block_types"]]
    }


def _attends(model: Any) -> list[bool]:
    """Returns which levels of an autoencoder have attention; encoder and decoder must agree."""
    fields, levels = model.coder_fields(), range(len(model.ch_mult))
    down, up = (
        [coder.attends(level) for level in levels]
        for coder in (Encoder(**fields), Decoder(**fields))
    )
    if down != up:
        raise TargetError(
            f"resolution={model.resolution} does not halve evenly: encoder and decoder attend on"
            " different levels"
        )
    return down


def _coder_section(where: str, given: Config) -> Config:
    channels, mults = mults_of(where, given["block_out_channels"])
    levels, middle = (
        attention_levels(where, _coder_types(given), *_CODERS),
        given["mid_block_add_attention"],
    )
    if any(levels) and not middle:
        raise TargetError(f"{where}: attention on a level and none in the middle is not supported")
    size = side(given["sample_size"])
    if any(levels) and size % 2 ** (len(mults) - 1):
        raise TargetError(f"{where}: sample_size={size} must divide by {2 ** (len(mults) - 1)}")
    return {
        "embed_dim": given["latent_channels"],
        "z_channels": given["latent_channels"],
        "ch": channels,
        "ch_mult": mults,
        "num_res_blocks": given["layers_per_block"],
        "in_channels": given["in_channels"],
        "out_ch": given["out_channels"],
        "resolution": size,
        "attn_resolutions": tuple(
            size // 2**level for level, attends in enumerate(levels) if attends
        ),
        "attn_type": "vanilla" if middle else "none",
        "norm_groups": given["norm_num_groups"],
    }


def kl_from(config: Mapping[str, Any]) -> Config:
    """AutoencoderKL -> our "first_stage"."""
    picked = pick_params(
        "AutoencoderKL", config, same=_CODER_SAME, ignored=f"{ABOUT} force_upcast", fixed=_KL_FIXED
    )
    # The class's default is true, and only Stable Diffusion XL's pipelines read it.
    upcast = {"force_upcast": True} if config.get("force_upcast") else {}
    return {
        "kind": "kl",
        **_coder_section("AutoencoderKL", _CODER_DEFAULTS | {"latent_channels": 4} | picked),
        **upcast,
    }


def vq_from(config: Mapping[str, Any]) -> Config:
    """VQModel -> our "first_stage"."""
    same, ignored = f"{_CODER_SAME} num_vq_embeddings vq_embed_dim", f"{ABOUT} force_upcast"
    picked = pick_params("VQModel", config, same=same, ignored=ignored, fixed=_VQ_FIXED)
    given = _CODER_DEFAULTS | {"latent_channels": 3, "num_vq_embeddings": 256} | picked
    section = {
        "kind": "vq",
        **_coder_section("VQModel", given),
        "n_embed": given["num_vq_embeddings"],
    }
    return section | (
        {} if given.get("vq_embed_dim") is None else {"embed_dim": given["vq_embed_dim"]}
    )


def autoencoder_to(model: Autoencoder) -> Config:
    """Our first stage -> the config.json of AutoencoderKL or VQModel."""
    quantizes = isinstance(model, VQModelInterface)
    where = "VQModel" if quantizes else "AutoencoderKL"
    need(where, model, resamp_with_conv=True, tanh_out=False)
    if model.attn_type == "linear":
        raise TargetError(f"{where} cannot hold attn_type='linear', only 'vanilla' or 'none'")
    if model.ch_mult[0] != 1:
        raise TargetError(
            f"{where} cannot hold ch_mult={list(model.ch_mult)}: its first level has ch channels"
        )
    levels = _attends(model)
    if any(levels) and model.attn_type == "none":
        levels = [False] * len(levels)
    types = block_types(levels, *_CODERS)
    types["up_block_types"] = [
        kind.replace("Encoder", "Decoder") for kind in types["up_block_types"]
    ]
    config: Config = {"_class_name": where, **(_VQ_FIXED if quantizes else _KL_FIXED), **types}
    config |= {
        "in_channels": model.in_channels,
        "out_channels": model.out_ch,
        "block_out_channels": [m * model.ch for m in model.ch_mult],
        "layers_per_block": model.num_res_blocks,
        "latent_channels": model.z_channels,
        "norm_num_groups": model.norm_groups,
        "sample_size": model.resolution,
        "mid_block_add_attention": model.attn_type == "vanilla",
    }
    if isinstance(model, VQModelInterface):
        need(where, model, quantizer="vq", n_labels=None, remap=None)
        return config | {"num_vq_embeddings": model.n_embed, "vq_embed_dim": model.embed_dim}
    need(where, model, embed_dim=model.z_channels)
    return config


# ------------------------------------------------------------------------------------ text encoders

_BERT = {
    "d_model": "dim",
    "encoder_layers": "depth",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "encoder_attention_heads": "heads",
    "head_dim": "head_dim",
}
_BERT_DEFAULTS: Config = {
    "d_model": 1280,
    "encoder_layers": 32,
    "vocab_size": 30522,
    "max_position_embeddings": 77,
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "encoder_ffn_dim": 5120,
}
_CLIP_DEFAULTS: Config = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}


def bert_from(config: Mapping[str, Any]) -> Config:
    """LDMBertModel -> our "conditioner"."""
    ignored = f"""
        {ABOUT} dropout classifier_dropout activation_dropout encoder_layerdrop init_std
        pad_token_id num_hidden_layers scale_embedding
    """
    fixed = {"activation_function": "gelu", "attention_dropout": 0.0}
    same = f"{' '.join(_BERT)} encoder_ffn_dim"
    given = _BERT_DEFAULTS | pick_params(
        "LDMBertModel", config, same=same, ignored=ignored, fixed=fixed
    )
    if given["encoder_ffn_dim"] != 4 * given["d_model"]:
        raise TargetError(
            f"LDMBertModel: encoder_ffn_dim={given['encoder_ffn_dim']} must be 4 d_model"
        )
    return {"kind": "bert", **{ours: given[theirs] for theirs, ours in _BERT.items()}}


def bert_to(model: TransformerEncoder) -> Config:
    """Our text transformer -> the config.json of LDMBertModel."""
    need("LDMBertModel", model, ff_glu=False, ff_mult=4, with_logits=False)
    about = {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "activation_function": "gelu",
        "pad_token_id": 0,
    }
    fields = {theirs: getattr(model, ours) for theirs, ours in _BERT.items()}
    return about | fields | {"encoder_ffn_dim": 4 * model.dim, "dropout": model.dropout}


def clip_from(config: Mapping[str, Any]) -> Config:
    """CLIPTextModel -> our "conditioner"."""
    given = _CLIP_DEFAULTS | dict(config)
    if given.pop("dropout", 0.0):  # of older versions, always 0
        raise TargetError(
            f"CLIPTextModel: dropout={config['dropout']!r} is not supported, only 0.0"
        )
    module = clip_text_from_params({k: v for k, v in given.items() if k != "use_cache"})
    return {"kind": "clip", **{field: getattr(module, field) for field in _CLIP_DEFAULTS}}


def clip_projected_from(config: Mapping[str, Any]) -> Config:
    """CLIPTextModelWithProjection -> our "conditioner"."""
    return clip_from(config) | {"projection_dim": config.get("projection_dim", 512)}


def clip_to(model: CLIPText) -> Config:
    """Our text tower -> the config.json of CLIPTextModel, or of the one with a projection."""
    projected = model.projection_dim is not None
    about: Config = {
        "architectures": [f"CLIPTextModel{'WithProjection' if projected else ''}"],
        **({"projection_dim": model.projection_dim} if projected else {}),
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        "pad_token_id": 1,
    }
    fields = {field: getattr(model, field) for field in _CLIP_DEFAULTS}
    # The published files have 2, which transformers takes for the highest token.
    return (
        about | fields | {"eos_token_id": 2 if model.eos_token_id is None else model.eos_token_id}
    )
