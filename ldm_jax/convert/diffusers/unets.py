"""config.json of UNet2DConditionModel and UNet2DModel, and the fields of our UNet."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.convert.compvis.targets import pick_params
from ldm_jax.convert.diffusers.configs import (
    ABOUT,
    Config,
    attention_levels,
    block_types,
    mults_of,
    need,
    one,
)
from ldm_jax.errors import TargetError
from ldm_jax.models.unet import UNet, layout

_UNET_FIXED = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "class_embed_type": None,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
}
_UNET_SAME = """
    in_channels out_channels block_out_channels down_block_types up_block_types layers_per_block
    dropout norm_num_groups attention_head_dim num_class_embeds resnet_time_scale_shift
"""
_UNET2D_FIXED = _UNET_FIXED | {
    "mid_block_type": "UNetMidBlock2D",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attn_norm_num_groups": None,
    "add_attention": True,
    # With "scale_shift" its middle attention has no normalisation.
    "resnet_time_scale_shift": "default",
}
_UNET2D_DEFAULTS: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
_CONDITION_FIXED = _UNET_FIXED | {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    # diffusers refuses it too: attention_head_dim is the number of heads.
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
_CONDITION_DEFAULTS: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "projection_class_embeddings_input_dim": None,
}
_TRANSFORMERS = ("{}Block2D", "CrossAttn{}Block2D")
_PLAIN = ("{}Block2D", "Attn{}Block2D")


def _unet_section(where: str, given: Config, types: tuple[str, str]) -> Config:
    channels, mults = mults_of(where, given["block_out_channels"])
    levels = attention_levels(where, given, *types)
    return {
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"],
        "model_channels": channels,
        "channel_mult": mults,
        "num_res_blocks": one(where, "layers_per_block", given["layers_per_block"]),
        "attention_resolutions": tuple(2**level for level, attends in enumerate(levels) if attends),
        "dropout": given.get("dropout", 0.0),
        "norm_groups": given.get("norm_num_groups", 32),
        "num_classes": given.get("num_class_embeds"),
        "use_scale_shift_norm": given.get("resnet_time_scale_shift", "default") == "scale_shift",
    }


def unet_condition_from(config: Mapping[str, Any]) -> Config:
    """UNet2DConditionModel -> the fields of our UNet."""
    where = "UNet2DConditionModel"
    same = f"""
        {_UNET_SAME} cross_attention_dim transformer_layers_per_block use_linear_projection
        only_cross_attention addition_embed_type projection_class_embeddings_input_dim
    """
    # Projections are read in either form; attention scores are float32 in any case.
    # addition_time_embed_dim is of the pipeline's conditioner, which reads it.
    ignored = f"""
        {ABOUT} sample_size upcast_attention addition_embed_type_num_heads addition_time_embed_dim
    """
    given = _CONDITION_DEFAULTS | pick_params(
        where, config, same=same, ignored=ignored, fixed=_CONDITION_FIXED
    )
    if given.get("resnet_time_scale_shift", "default") not in ("default", "scale_shift"):
        raise TargetError(
            f"{where}: resnet_time_scale_shift={given['resnet_time_scale_shift']!r}"
            " is not supported"
        )
    section = _unet_section(where, given, _TRANSFORMERS)
    heads = given["attention_head_dim"]  # the number of heads, in spite of the name
    if isinstance(heads, int) or len(set(heads)) == 1:
        attention: Config = {"num_heads": one(where, "attention_head_dim", heads)}
    else:
        widths = {c / h for c, h in zip(given["block_out_channels"], heads, strict=True)}
        if len(widths) > 1 or not max(widths).is_integer():
            raise TargetError(
                f"{where}: attention_head_dim={list(heads)} gives heads of different widths"
            )
        attention = {"num_head_channels": int(max(widths))}
    return (
        section
        | attention
        | _vector(where, given)
        | _cross_attention(where, given)
        | {
            "legacy": False,
            "use_spatial_transformer": True,
            "transformer_depth": _depth(where, given["transformer_layers_per_block"]),
            "context_dim": one(where, "cross_attention_dim", given["cross_attention_dim"]),
            "use_linear_in_transformer": bool(given.get("use_linear_projection", False)),
        }
    )


def _vector(where: str, given: Config) -> Config:
    """Returns the fields of the vector condition that SDXL has."""
    kind, width = given.get("addition_embed_type"), given["projection_class_embeddings_input_dim"]
    if kind is None and width is None:
        return {}
    if kind != "text_time" or width is None or given.get("num_class_embeds") is not None:
        raise TargetError(
            f"{where}: addition_embed_type={kind!r} with"
            f" projection_class_embeddings_input_dim={width} is not supported, only 'text_time'"
        )
    return {"num_classes": "sequential", "adm_in_channels": width}


def _cross_attention(where: str, given: Config) -> Config:
    """Returns which levels' first attention reads the context."""
    only = given.get("only_cross_attention", False)
    if only is False or (isinstance(only, tuple) and not any(only)):
        return {}
    if not isinstance(only, tuple) or len(only) != len(given["block_out_channels"]):
        raise TargetError(
            f"{where}: only_cross_attention={only!r} is not supported, only one for each level"
        )
    return {"disable_self_attentions": only}


def _depth(where: str, layers: Any) -> int | tuple[int, ...]:
    """Returns the blocks of the transformers, one number or one for each level."""
    if isinstance(layers, int):
        return layers
    if not all(isinstance(n, int) for n in layers):
        raise TargetError(f"{where}: transformer_layers_per_block={layers} is not supported")
    return layers[0] if len(set(layers)) == 1 else tuple(layers)


def unet_2d_from(config: Mapping[str, Any]) -> Config:
    """UNet2DModel -> the fields of our UNet."""
    where = "UNet2DModel"
    ignored = f"{ABOUT} sample_size num_train_timesteps"
    given = _UNET2D_DEFAULTS | pick_params(
        where, config, same=_UNET_SAME, ignored=ignored, fixed=_UNET2D_FIXED
    )
    width = given["attention_head_dim"]
    return _unet_section(where, given, _PLAIN) | (
        {"num_heads": 1} if width is None else {"num_head_channels": width}
    )


def unet_to(unet: UNet) -> Config:
    """Our UNet -> the config.json of UNet2DConditionModel, or of UNet2DModel."""
    transformer = unet.use_spatial_transformer
    where = "UNet2DConditionModel" if transformer else "UNet2DModel"
    need(where, unet, conv_resample=True, resblock_updown=False, n_embed=None)
    if unet.channel_mult[0] != 1:
        raise TargetError(
            f"{where} cannot hold channel_mult={list(unet.channel_mult)}: its first level has"
            " model_channels channels"
        )
    blocks = [block for _, block in layout(unet).blocks() if block.kind in ("transformer", "attn")]
    if odd := [block for block in blocks if block.heads * block.head_dim != block.channels_in]:
        raise TargetError(
            f"{where} cannot hold heads of {odd[0].head_dim} channels in {odd[0].channels_in}"
        )
    levels = [2**level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
    fixed = _CONDITION_FIXED if transformer else _UNET2D_FIXED
    config = {
        "_class_name": where,
        **fixed,
        **block_types(levels, *(_TRANSFORMERS if transformer else _PLAIN)),
    }
    config |= {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": [m * unet.model_channels for m in unet.channel_mult],
        "layers_per_block": unet.num_res_blocks,
        "dropout": unet.dropout,
        "norm_num_groups": unet.norm_groups,
        "num_class_embeds": unet.num_classes if isinstance(unet.num_classes, int) else None,
    }
    if unet.num_classes not in (None, "sequential") and not isinstance(unet.num_classes, int):
        raise TargetError(f"{where} cannot hold num_classes={unet.num_classes!r}")
    if not transformer:
        need(where, unet, use_scale_shift_norm=False)
        widths, counts = {block.head_dim for block in blocks}, {block.heads for block in blocks}
        if counts != {1} and len(widths) > 1:
            raise TargetError(
                f"{where} cannot hold num_heads={unet.num_heads}: its heads have the same width on"
                " every level"
            )
        return config | {"attention_head_dim": None if counts == {1} else widths.pop()}
    if unet.context_dim is None:
        raise TargetError(
            f"{where} cannot hold context_dim=None: its transformers attend to a context"
        )
    heads = [block.heads for block in blocks]
    if len(set(heads)) > 1:  # counted for every level, also without attention
        heads = [m * unet.model_channels // unet.num_head_channels for m in unet.channel_mult]
    return config | {
        "cross_attention_dim": unet.context_dim,
        "transformer_layers_per_block": unet.transformer_depth,
        "only_cross_attention": list(unet.disable_self_attentions or ()) or False,
        "addition_embed_type": "text_time" if unet.num_classes == "sequential" else None,
        "projection_class_embeddings_input_dim": unet.adm_in_channels,
        "attention_head_dim": one(where, "heads", heads) if len(set(heads)) == 1 else heads,
        "use_linear_projection": unet.use_linear_in_transformer,
        "upcast_attention": False,
        "resnet_time_scale_shift": "scale_shift" if unet.use_scale_shift_norm else "default",
    }
