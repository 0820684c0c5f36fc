"""Infers the original's configuration from the names, shapes and buffers of a checkpoint.

The result is what the YAML beside a released checkpoint holds. What neither names nor shapes decide
(the number of attention heads, the scale of the latents, the size of the pictures) is filled in by
convention and listed as assumed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.convert.compvis import others
from ldm_jax.convert.compvis.names import CONDITIONER, FIRST_STAGE, UNET
from ldm_jax.convert.compvis.schedules import schedule_params
from ldm_jax.convert.compvis.targets import OPEN_CLIP, VIT_H
from ldm_jax.convert.compvis.whole import IDENTITIES, INNER, IS_FIRST_STAGE, UNCONDITIONAL
from ldm_jax.errors import ReaderError, TargetError
from ldm_jax.models.clip import CLIPText

LATENT_DIFFUSION, INPAINTING, DEPTH, UPSCALE = (
    f"ldm.models.diffusion.ddpm.{name}"
    for name in (
        "LatentDiffusion",
        "LatentInpaintDiffusion",
        "LatentDepth2ImageDiffusion",
        "LatentUpscaleDiffusion",
    )
)
_NOISE_LEVELS = 350  # of the upscaler
_EMBEDDERS, _VQ = (
    "ldm.modules.encoders.modules",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
)
_KL = "ldm.modules.losses.LPIPSWithDiscriminator"
_PIXELS = 256  # the side in pixels that nearly all published models were trained at
_UNKNOWN = "the architecture is not recognised"


class Original(NamedTuple):
    """A model as the original's YAML describes it; ``assumed`` has a line for each guess."""

    target: str
    params: dict[str, Any]
    assumed: tuple[str, ...] = ()


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes by name; a missing name raises a TargetError with it."""

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise TargetError(f"{_UNKNOWN}: {name} is missing; give the original's YAML with --config")

    def under(self, prefix: str) -> "Shapes":
        """The names that begin with ``prefix``, without it."""
        return Shapes(
            {
                name.removeprefix(prefix): shape
                for name, shape in self.items()
                if name.startswith(prefix)
            }
        )

    def count(self, pattern: str) -> int:
        """Returns 1 + the highest number that ``pattern`` matches; 0 without a match."""
        n = 1 + max(
            (int(match[1]) for name in self if (match := re.match(pattern, name))), default=-1
        )
        if n > len(self):  # each has a name in an honest file
            raise TargetError(f"{_UNKNOWN}: its names skip numbers")
        return n

    def any(self, prefix: str) -> bool:
        """Whether a name begins with ``prefix``."""
        return any(name.startswith(prefix) for name in self)


def infer(tensors: Mapping[str, Any], family: Callable[..., Original] | None = None) -> Original:
    """Returns the configuration of a state dict.

    Args:
      tensors: {name: array}. Of lazy arrays, only the schedule and lists of codes are read.
      family: (shapes, tensors) -> the configuration; None: that of latent-diffusion.

    Raises:
      TargetError: It is of no known family.
    """
    try:
        shapes = Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return (family or _infer)(shapes, tensors)
    except (TargetError, ReaderError):
        raise
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
    ):  # too few axes, none of a size ...
        raise TargetError(
            f"{_UNKNOWN}: its shapes fit no known network; give the original's YAML with --config"
        ) from None


def _infer(names: Shapes, tensors: Mapping[str, Any]) -> Original:
    if (own := others.of_names(names)) is not None:
        return own.infer(names, tensors)
    if names.any(UNET):
        return _latent_diffusion(names, tensors)
    if names.any("encoder.") and names.any("decoder."):
        stage = first_stage(names, tensors)
        if stage.target.endswith("Interface"):  # alone, it was trained as the plain model
            stage = stage._replace(target=stage.target.removesuffix("Interface"))
        return stage
    raise TargetError(
        "its names are those of neither a latent diffusion model nor a first stage of the original"
    )


# --------------------------------------------------------------------------------- latent diffusion


def _latent_diffusion(names: Shapes, tensors: Mapping[str, Any]) -> Original:
    unet, assumed = unet_params(names.under(UNET))
    params: dict[str, Any] = {
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": unet,
        }
    }
    if names.any(FIRST_STAGE):
        stage = first_stage(
            names.under(FIRST_STAGE), {n.removeprefix(FIRST_STAGE): t for n, t in tensors.items()}
        )
        ddconfig = stage.params["ddconfig"]
        factor, assumed = 2 ** (len(ddconfig["ch_mult"]) - 1), [*assumed, *stage.assumed]
        params["first_stage_config"] = {"target": stage.target, "params": stage.params}
    else:
        factor = 1 if unet["out_channels"] in (1, 3) else 8  # a latent model whose VAE is elsewhere
        params["first_stage_config"] = {"target": IDENTITIES[-1]}
    channels, in_channels = unet["out_channels"], unet["in_channels"]
    outer = unet["model_channels"] * unet["channel_mult"][-1]
    params["channels"] = channels

    config, guessed = _conditioner(names.under(CONDITIONER), names.under(FIRST_STAGE), factor)
    key = "adm" if "num_classes" in unet else None
    if config == IS_FIRST_STAGE or (in_channels > channels and not isinstance(config, dict)):
        config, key = (
            config if config != UNCONDITIONAL else {"target": "torch.nn.Identity"},
            "concat",
        )
    elif config == UNCONDITIONAL and unet.get("context_dim", outer) != outer:
        config, key = {"target": "torch.nn.Identity"}, "crossattn"  # embeddings are given
    elif isinstance(config, dict):
        in_concat = config["target"].endswith("SpatialRescaler")
        key = "concat" if in_concat else "hybrid" if in_channels > channels else "crossattn"
    params |= {"cond_stage_config": config, "conditioning_key": key}
    assumed += guessed

    clip = isinstance(config, dict) and "CLIP" in config["target"]
    params["image_size"] = (2 * _PIXELS if clip else _PIXELS) // factor
    assumed.append(f"size {params['image_size'] * factor}: the side of the pictures in pixels")
    schedule, guessed = schedule_params(tensors)
    params |= schedule
    assumed += guessed
    if "scale_factor" in names:
        params["scale_by_std"] = True
    else:
        stage_params = params["first_stage_config"].get("params", {})
        published = (
            stage_params.get("embed_dim", channels) == 4
            and "n_embed" not in stage_params
            and factor == 8
        )
        params["scale_factor"] = 0.18215 if published else 1.0
        assumed.append(f"scale_factor {params['scale_factor']}: of the latents")
    if "logvar" in names:
        params["learn_logvar"] = True
    if "v_pred" in names:
        params["parameterization"] = "v"
        assumed.append("parameterization v: the file has the marker v_pred")
    else:
        assumed.append(
            "parameterization eps: what the network predicts"
            + (
                "; Stable Diffusion 2.x of 768 pixels predicts v: give its YAML with --config"
                if isinstance(config, dict) and config["target"] == OPEN_CLIP
                else ""
            )
        )
    target = INPAINTING if clip and key == "hybrid" else LATENT_DIFFUSION
    if clip and in_channels == channels + 1:
        target = DEPTH
    elif clip and "num_classes" in unet:
        target = UPSCALE
        params |= upscaler_params(factor)
        assumed = [line for line in assumed if not line.startswith(("parameterization", "scale_"))]
        assumed += ["parameterization v, scale_factor 0.08333: as in the x4 upscaler"]
        assumed += [f"max_noise_level {_NOISE_LEVELS}: of the small picture"]
    return Original(target, params, tuple(assumed))


def upscaler_params(factor: int) -> dict[str, Any]:
    """Returns what a LatentUpscaleDiffusion has beside a LatentDiffusion."""
    return {
        "parameterization": "v",
        "scale_factor": 0.08333,
        "conditioning_key": "hybrid-adm",
        "image_size": 512 // factor,
        "low_scale_key": "lr",
        "low_scale_config": {
            "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
            "params": {
                "noise_schedule_config": {"linear_start": 1e-4, "linear_end": 2e-2},
                "max_noise_level": _NOISE_LEVELS,
            },
        },
    }


# Attention heads of the published models, by (model_channels, channel_mult, context_dim).
_HEADS: dict[tuple[int, tuple[int, ...], int | None], dict[str, Any]] = {
    (320, (1, 2, 4, 4), 768): {"num_heads": 8, "legacy": False},  # Stable Diffusion v1
    (320, (1, 2, 4, 4), 1024): {"num_head_channels": 64, "legacy": False},  # Stable Diffusion 2.x
    (320, (1, 2, 4, 4), 1280): {"num_heads": 8, "legacy": False},  # txt2img-1p4B
    (256, (1, 2, 2, 4), 1024): {"num_heads": 8, "legacy": False},  # Stable Diffusion x4 upscaler
    (320, (1, 2, 4), 2048): {"num_head_channels": 64},  # Stable Diffusion XL
    (384, (1, 2, 4, 4), 1280): {"num_head_channels": 64},  # its refiner
    (192, (1, 2, 3, 5), 512): {"num_heads": 1},  # cin256-v2
    (192, (1, 2, 2, 4, 4), None): {"num_heads": 8},  # LSUN churches
    (256, (1, 2, 3, 4), None): {"num_heads": 8},  # inpainting
    (128, (1, 4, 8), None): {"num_heads": 8},  # semantic synthesis
}


def unet_params(names: Shapes) -> tuple[dict[str, Any], list[str]]:
    """Returns (parameters of a UNetModel, what was assumed) from its names and shapes."""
    channels, in_channels = names["input_blocks.0.0.weight"][:2]
    rows = names.count(r"output_blocks\.(\d+)\.")
    ends = [f"output_blocks.{i}.{j}." for i in range(rows) for j in (1, 2)]
    resblocks, convs = (
        sum(end + part in names for end in ends) for part in ("in_layers.0.weight", "conv.weight")
    )
    # Resampling without a layer has no names: its rows of the downward half are missing.
    bare = 0 if resblocks + convs else sum(not names.any(f"input_blocks.{i}.") for i in range(rows))
    levels = 1 + resblocks + convs + bare
    if rows % levels:
        raise TargetError(f"{_UNKNOWN}: {rows} rows of blocks on {levels} levels")
    first = range(1, rows, rows // levels)  # the first row of each level
    outs = [names[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first]
    params: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": names["out.2.weight"][0],
        "model_channels": channels,
        "num_res_blocks": rows // levels - 1,
        "channel_mult": [out // channels for out in outs],
        "attention_resolutions": [
            2**level for level, i in enumerate(first) if names.any(f"input_blocks.{i}.1.")
        ],
        "use_scale_shift_norm": names["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * outs[0],
        "resblock_updown": resblocks > 0,
        "conv_resample": bare == 0,
    }
    if names.any("middle_block.1.transformer_blocks."):
        context = names["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
        params |= {
            "use_spatial_transformer": True,
            "transformer_depth": _depths(names, first),
            "context_dim": context,
        }
        own = [
            names.get(f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_k.weight", (0, out))[1]
            for i, out in zip(first, outs, strict=True)
        ]
        if own != outs:
            params["disable_self_attentions"] = [n != out for n, out in zip(own, outs, strict=True)]
    if len(names.get("middle_block.1.proj_in.weight", ())) == 2:
        params["use_linear_in_transformer"] = True
    if "label_emb.0.0.weight" in names:
        params |= {
            "num_classes": "sequential",
            "adm_in_channels": names["label_emb.0.0.weight"][1],
        }
    if "label_emb.weight" in names:
        params["num_classes"] = names["label_emb.weight"][0]
    if "id_predictor.1.weight" in names:
        params["n_embed"] = names["id_predictor.1.weight"][0]
    heads = _HEADS.get(
        (channels, tuple(params["channel_mult"]), params.get("context_dim")),
        {"num_head_channels": 32},
    )
    text = ", ".join(f"{name} {value}" for name, value in heads.items())
    return params | heads, [
        f"{text}: the heads of the UNet's attention",
        "use_new_attention_order False",
    ]


def _depths(names: Shapes, first: Sequence[int]) -> int | list[int]:
    """Returns the transformer blocks of the levels, which begin at the rows ``first``."""
    middle = names.count(r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    depths = [names.count(rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in first]
    if set(depths) <= {0, middle}:
        return middle
    return [depth or 1 for depth in depths]  # a level without attention has any depth


def _conditioner(names: Shapes, stage: Shapes, factor: int) -> tuple[Any, list[str]]:
    """Returns (cond_stage_config, what was assumed); the first ``stage`` may be stored twice."""
    if not names:
        return UNCONDITIONAL, []
    if names == stage:
        return IS_FIRST_STAGE, []
    if "embedding.weight" in names:
        classes, dim = names["embedding.weight"]
        return {
            "target": f"{_EMBEDDERS}.ClassEmbedder",
            "params": {"n_classes": classes, "embed_dim": dim},
        }, []
    if "channel_mapper.weight" in names:
        out, channels = names["channel_mapper.weight"][:2]
        params = {"n_stages": factor.bit_length() - 1, "in_channels": channels, "out_channels": out}
        params["bias"] = "channel_mapper.bias" in names
        stages = (
            f"n_stages {params['n_stages']}, multiplier 0.5, method bilinear: the resizing of maps"
        )
        return {"target": f"{_EMBEDDERS}.SpatialRescaler", "params": params}, [stages]
    if "transformer.token_emb.weight" in names:
        vocabulary, dim = names["transformer.token_emb.weight"]
        params = {
            "n_embed": dim,
            "n_layer": names.count(r"transformer\.attn_layers\.layers\.(\d+)\.") // 2,
        }
        params |= {
            "vocab_size": vocabulary,
            "max_seq_len": names["transformer.pos_emb.emb.weight"][0],
        }
        guessed = []
        if vocabulary != 30522:
            params["use_tokenizer"] = False
            guessed = ["use_tokenizer False: the vocabulary is not BERT's"]
        return {"target": f"{_EMBEDDERS}.BERTEmbedder", "params": params}, guessed
    if names.any("model.transformer.resblocks."):
        return _open_clip(names.under("model."))
    if names.any("transformer.text_model."):
        return _clip(names.under("transformer.text_model."))
    raise TargetError(
        f"its conditioner is of no known kind ({min(names)}); give the original's"
        " YAML with --config"
    )


def _open_clip(names: Shapes) -> tuple[dict[str, Any], list[str]]:
    vocabulary, width = names["token_embedding.weight"]
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": names["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": names.count(r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": names["positional_embedding"][0],
    }
    usual = VIT_H | {"vocab_size": 49408, "max_position_embeddings": 77}
    params = {name: value for name, value in fields.items() if usual[name] != value}
    return {
        "target": OPEN_CLIP,
        "params": {"freeze": True, "layer": "penultimate", **params},
    }, ["layer penultimate: of the text encoder, as in Stable Diffusion 2.x"]


def clip_fields(names: Shapes) -> dict[str, Any]:
    """Returns the fields of the `CLIPText` with these names of transformers."""
    vocabulary, width = names["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": names["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": names.count(r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": names["embeddings.position_embedding.weight"][0],
    }


def _clip(names: Shapes) -> tuple[dict[str, Any], list[str]]:
    fields = clip_fields(names)
    if CLIPText(**fields) == CLIPText():
        return {"target": f"{_EMBEDDERS}.FrozenCLIPEmbedder"}, []
    target = next(target for target in INNER if target.endswith("TinyCLIP"))
    heads = f"num_attention_heads {fields['num_attention_heads']}"
    return {"target": target, "params": fields}, [f"{heads}, hidden_act quick_gelu: text encoder"]


# ------------------------------------------------------------------------------------- first stages


def first_stage(names: Shapes, tensors: Mapping[str, Any]) -> Original:
    """Returns a first stage from names without prefix."""
    channels, in_channels = names["encoder.conv_in.weight"][:2]
    levels, z = names.count(r"encoder\.down\.(\d+)\."), names["decoder.conv_in.weight"][1]
    outs = [names[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
    ddconfig: dict[str, Any] = {
        "double_z": names["encoder.conv_out.weight"][0] == 2 * z,
        "z_channels": z,
        "resolution": _PIXELS,  # only decides the levels with attention
        "in_channels": in_channels,
        "out_ch": names["decoder.conv_out.weight"][0],
        "ch": channels,
        "ch_mult": [out // channels for out in outs],
        "num_res_blocks": names.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "attn_resolutions": [
            _PIXELS // 2**n for n in range(levels) if names.any(f"encoder.down.{n}.attn.")
        ],
        "resamp_with_conv": levels == 1 or names.any("encoder.down.0.downsample."),
        "attn_type": "none",
    }
    if names.any("encoder.mid.attn_1."):
        ddconfig["attn_type"] = (
            "linear" if "encoder.mid.attn_1.to_qkv.weight" in names else "vanilla"
        )
    params: dict[str, Any] = {"embed_dim": names["post_quant_conv.weight"][1], "ddconfig": ddconfig}
    loss, _ = loss_config(names)
    params["lossconfig"] = loss or {"target": "torch.nn.Identity"}
    if "quantize.used" in names:
        params["remap"] = [int(i) for i in np.asarray(tensors["quantize.used"])]
    if not names.any("quantize."):
        return Original("ldm.models.autoencoder.AutoencoderKL", params)
    if "quantize.embed.weight" in names:
        params["n_embed"] = names["quantize.embed.weight"][0]
        return Original("taming.models.vqgan.GumbelVQ", params)
    params["n_embed"] = names["quantize.embedding.weight"][0]
    if "quantize.embedding.cluster_size" in names:
        return Original("taming.models.vqgan.EMAVQ", params)
    if "colorize" in names:
        return Original(
            "taming.models.vqgan.VQSegmentationModel", params | {"n_labels": names["colorize"][1]}
        )
    return Original("ldm.models.autoencoder.VQModelInterface", params)


def loss_config(
    names: Shapes, prefix: str = "loss."
) -> tuple[dict[str, Any] | None, tuple[int, ...]]:
    """Returns (lossconfig, widths of LPIPS' VGG) of a first stage's loss, or (None, ())."""
    names = names.under(prefix)
    if not names.any("discriminator.main."):
        return None, ()
    ndf, channels = names["discriminator.main.0.weight"][:2]
    convs = sum(
        len(shape) == 4 and name.endswith(".weight")
        for name, shape in names.under("discriminator.").items()
    )
    params = {"disc_num_layers": convs - 2, "disc_in_channels": channels, "disc_ndf": ndf}
    params |= {"disc_start": 0, "use_actnorm": any(name.endswith(".loc") for name in names)}
    widths = tuple(names[f"perceptual_loss.lin{i}.model.1.weight"][1] for i in range(5))
    return {"target": _KL if "logvar" in names else _VQ, "params": params}, widths
