"""diffusers folders, without diffusers: bit-exact round trips, configs both ways, one-line errors.

tests/peers holds the same code to diffusers itself.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ldm_jax.conditioning.tokenizers import bert_tokenizer
from ldm_jax.convert.diffusers import (
    configs,
    from_diffusers,
    hub,
    is_diffusers,
    schedulers,
    to_diffusers,
    unets,
)
from ldm_jax.convert.diffusers.components import MODULES
from ldm_jax.convert.diffusers.reading import latent_size
from ldm_jax.convert.diffusers.tables import join_qkv, split_qkv
from ldm_jax.convert.tables import flatten
from ldm_jax.errors import CheckpointError, ConversionError, TargetError
from ldm_jax.models.autoencoder import init_autoencoder
from ldm_jax.models.bert import TransformerEncoder
from ldm_jax.models.build import build, init_params
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.unet import UNet, layout
from ldm_jax.sampling.pipeline import load

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
}
KL = {
    "kind": "kl",
    "embed_dim": 4,
    "z_channels": 4,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "resolution": 16,
}
KL |= {"in_channels": 3, "out_ch": 3}
VQ = KL | {"kind": "vq", "z_channels": 3, "n_embed": 16, "attn_resolutions": [8]}
SECTIONS = {
    "transformers": (
        "unet",
        UNET
        | {
            "attention_resolutions": [1],
            "num_heads": 4,
            "use_spatial_transformer": True,
            "context_dim": 8,
        },
    ),
    "plain attention": (
        "unet",
        UNET | {"attention_resolutions": [2], "num_head_channels": 16, "num_classes": 3},
    ),
    "kl": ("first_stage", KL),
    "kl without attention": ("first_stage", KL | {"attn_type": "none", "norm_groups": 8}),
    "vq": ("first_stage", VQ),
    "bert": (
        "conditioner",
        {
            "kind": "bert",
            "dim": 8,
            "depth": 1,
            "vocab_size": 20,
            "max_seq_len": 5,
            "heads": 2,
            "head_dim": 4,
        },
    ),
    "clip": (
        "conditioner",
        {
            "kind": "clip",
            "vocab_size": 20,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    ),
}
MODEL = {
    "kind": "latent_diffusion",
    "objective": "v",
    "scale_factor": 0.5,
    "schedule": {
        "beta_schedule": "linear",
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 100,
    },
    "first_stage": KL,
    "conditioner": {
        "kind": "bert",
        "dim": 8,
        "depth": 1,
        "max_seq_len": 5,
        "heads": 2,
        "head_dim": 4,
    },
    "unet": SECTIONS["transformers"][1],
    "sampling": {"size": [16, 16], "sampler": "ddim_x0", "grid": "leading"},
}


def filled(shapes: Any) -> Any:
    """Random arrays of these shapes; every second one in half precision."""
    rng, leaves = np.random.default_rng(0), jax.tree.leaves(shapes)
    arrays = [
        rng.normal(size=leaf.shape).astype((np.float32, np.float16)[i % 2])
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def part_params(part: str, section: dict[str, Any]) -> Any:
    """Random parameters of one part."""
    module, key = MODULES[part]({part: section}), jax.random.key(0)
    if part == "first_stage":
        return filled(jax.eval_shape(partial(init_autoencoder, module), key))
    example: tuple = (np.zeros((1, 2), np.int32),)
    if part == "unet":
        y = None if module.num_classes is None else np.zeros(1, np.int32)
        example = (
            np.zeros((1, 2, 2, 4)),
            np.zeros(1),
            None if module.context_dim is None else np.zeros((1, 1, 8)),
            y,
        )
    return filled(jax.eval_shape(lambda: module.init(key, *example)["params"]))


@pytest.fixture(scope="module")
def model() -> dict[str, Any]:
    """Random parameters of MODEL, all parts."""
    built = build(MODEL, None, None)
    shapes = jax.eval_shape(partial(init_params, built), jax.random.key(0))
    return {**filled(shapes), "first_stage": part_params("first_stage", KL)}


@pytest.fixture(scope="module")
def written(model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL as a pipeline folder; tests that modify it make a copy."""
    out = tmp_path_factory.mktemp("diffusers") / "pipeline"
    to_diffusers(MODEL, model, out)
    return out


def digests(params: Any) -> dict[tuple[str, ...], str]:
    """{path: hash of dtype, shape and bytes}."""
    return {
        path: hashlib.sha256(
            f"{a.dtype} {a.shape}".encode() + np.ascontiguousarray(a).tobytes()
        ).hexdigest()
        for path, a in flatten(params).items()
    }


@pytest.mark.parametrize("name", SECTIONS)
def test_a_component_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    part, section = SECTIONS[name]
    params = part_params(part, section)
    to_diffusers({"kind": part, part: section}, {part: params}, tmp_path / "out")
    assert is_diffusers(tmp_path / "out")
    read = from_diffusers(tmp_path / "out")
    assert read.config["kind"] == part
    assert digests(read.params[part]) == digests(params)
    before, after = MODULES[part]({part: section}), MODULES[part](read.config)
    if part == "unet":
        assert layout(after) == layout(before)
    else:
        assert type(after) is type(before)
    # The report lists every array of the file with its hash.
    (file,) = (tmp_path / "out").glob("*.safetensors")
    stored = {f"out/{name}": array for name, array in load_file(file).items()}
    assert {row["source"] for row in (*read.entries, *read.left_out)} == stored.keys()
    for row in read.entries:
        array = stored[row["source"]]
        assert (row["shape"], row["dtype"]) == (list(array.shape), str(array.dtype))
        assert row["sha256"] == hashlib.sha256(array.tobytes()).hexdigest()
        assert row["path"].startswith(f"{part}/")


def test_a_pipeline_comes_back_to_the_bit(model: dict[str, Any], written: Path) -> None:
    read = from_diffusers(written)
    config, params, entries = read.config, read.params, read.entries
    assert digests(params) == digests(model)
    assert not read.assumed
    assert {key: config[key] for key in ("objective", "scale_factor", "schedule")} == {
        key: MODEL[key] for key in ("objective", "scale_factor", "schedule")
    }
    assert config["sampling"] == MODEL["sampling"] | {"guidance": 5.0}
    assert len({row["source"] for row in entries}) == len(entries) == len(jax.tree.leaves(model))
    half = from_diffusers(written, dtype="bfloat16").params
    assert {str(a.dtype) for a in jax.tree.leaves(half)} == {"bfloat16"}
    # Written once more, the files are the same.
    to_diffusers(config, params, written.parent / "again")
    for file in written.rglob("*.safetensors"):
        assert (
            file.read_bytes() == (written.parent / "again" / file.relative_to(written)).read_bytes()
        )


def test_an_inpainting_pipeline_comes_back_to_the_bit(tmp_path: Path) -> None:
    text = {
        "kind": "clip",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    joined = {"channels": 5, "of": "masked_sd", "size": [8, 8]}
    config = MODEL | {"conditioner": {"kind": "hybrid", "text": text, "joined": joined}}
    config["unet"] = MODEL["unet"] | {"in_channels": 9}
    shapes = jax.eval_shape(partial(init_params, build(config, None, None)), jax.random.key(0))
    params = {**filled(shapes), "first_stage": part_params("first_stage", KL)}
    to_diffusers(config, params, tmp_path / "pipeline")
    read = from_diffusers(tmp_path / "pipeline")
    assert digests(read.params) == digests(params)
    assert read.config["conditioner"]["joined"] == joined
    assert build(read.config, None, None).conditioner == build(config, None, None).conditioner
    assert read.config["sampling"]["guidance"] == 7.5
    for section, message in [
        ({"text": MODEL["conditioner"], "joined": joined}, "reads 'clip' and joins 'masked_sd'"),
        ({"text": text, "joined": joined | {"of": "masked"}}, "reads 'clip' and joins 'masked_sd'"),
    ]:
        with pytest.raises(TargetError, match=message):
            to_diffusers(
                config | {"conditioner": {"kind": "hybrid", **section}}, params, tmp_path / "other"
            )
    change(tmp_path / "pipeline" / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(
        TargetError,
        match="takes 5 channels beside the latent's, which StableDiffusionPipeline does not",
    ):
        from_diffusers(tmp_path / "pipeline")


def test_a_pipeline_is_loaded_and_makes_pictures(written: Path) -> None:
    pipe = load(written, dtype="float32", devices=1)
    assert pipe.defaults.sampler == "ddim_x0"
    assert pipe("red apple", steps=1).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("new_order", [False, True])
def test_qkv_is_taken_apart_by_heads(new_order: bool) -> None:
    section = SECTIONS["plain attention"][1] | {"use_new_attention_order": new_order}
    unet, params = MODULES["unet"]({"unet": section}), part_params("unet", section)
    name = next(name for name, block in layout(unet).blocks() if block.kind == "attn")
    split = split_qkv(unet, params)
    fused, c = params[name]["qkv"]["bias"], 64
    heads = fused.reshape(3, 4, 16).swapaxes(0, 1) if new_order else fused.reshape(4, 3, 16)
    for i, x in enumerate("qkv"):
        assert split[name]["qkv"][x]["kernel"].shape == (c, c)
        assert np.array_equal(split[name]["qkv"][x]["bias"], heads[:, i].reshape(c))
    assert digests(join_qkv(unet, split)) == digests(params)


def test_older_names_and_shapes_are_read(tmp_path: Path) -> None:
    part, section = SECTIONS["vq"]
    params = part_params(part, section)
    to_diffusers({"kind": part, part: section}, {part: params}, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    arrays = {renamed(name): array for name, array in load_file(file).items()}
    # Very old ones stored these linear layers as 1x1 convolutions.
    arrays = {n: a[:, :, None, None] if ".query.weight" in n else a for n, a in arrays.items()}
    assert sum(".query." in name for name in arrays) == 10
    save_file(arrays, file)
    assert digests(from_diffusers(tmp_path).params[part]) == digests(params)
    save_file(
        arrays
        | {
            "encoder.mid_block.attentions.0.to_q.bias": arrays[
                "encoder.mid_block.attentions.0.query.bias"
            ]
        },
        file,
    )
    with pytest.raises(ConversionError) as raised:
        from_diffusers(tmp_path)
    assert raised.value.duplicate == ["encoder.mid_block.attentions.0.to_q.bias"]


def test_misfits_are_listed(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "vqvae", tmp_path / "vqvae")
    file = tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors"
    arrays = load_file(file)
    del arrays["decoder.conv_out.bias"]
    arrays |= {
        "extra": np.zeros(1),
        "encoder.conv_in.weight": arrays["encoder.conv_in.weight"][:, :2].copy(),
    }
    save_file(arrays, file)
    with pytest.raises(ConversionError) as raised:
        from_diffusers(tmp_path / "vqvae")
    assert raised.value.missing == ["decoder.conv_out.bias"]
    assert raised.value.unexpected == ["extra"]
    assert raised.value.misshapen == [("encoder.conv_in.weight", (32, 2, 3, 3), (32, 3, 3, 3))]


# ------------------------------------------------------------------------------------------ configs


@pytest.mark.fast
@pytest.mark.parametrize(
    ("size", "expected"), [(48, (48, 48)), ([64, 96], (64, 96)), (None, (64, 64))], ids=str
)
def test_the_size_of_a_pipeline_may_be_height_and_width(tmp_path, size, expected):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps({"sample_size": size}))
    assert latent_size(tmp_path) == expected


PUBLISHED = {
    # Stable Diffusion v1: 4 levels, 8 heads everywhere.
    "sd_v1": (
        unets.unet_condition_from,
        {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        {
            "model_channels": 320,
            "channel_mult": (1, 2, 4, 4),
            "attention_resolutions": (1, 2, 4),
            "num_heads": 8,
            "context_dim": 768,
        },
    ),
    # Stable Diffusion v2: heads of 64 channels, linear projections.
    "sd_v2": (
        unets.unet_condition_from,
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        {"num_head_channels": 64, "context_dim": 1024},
    ),
    # ldm-celebahq-256.
    "celebahq": (
        unets.unet_2d_from,
        {
            "attention_head_dim": 32,
            "block_out_channels": [224, 448, 672, 896],
            "down_block_types": [
                "DownBlock2D",
                "AttnDownBlock2D",
                "AttnDownBlock2D",
                "AttnDownBlock2D",
            ],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        },
        {
            "model_channels": 224,
            "channel_mult": (1, 2, 3, 4),
            "attention_resolutions": (2, 4, 8),
            "num_head_channels": 32,
        },
    ),
    "kl_f16": (
        configs.kl_from,
        {
            "block_out_channels": [128, 128, 256, 256, 512],
            "down_block_types": [*["DownEncoderBlock2D"] * 4, "AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4],
            "sample_size": 256,
            "latent_channels": 16,
            "force_upcast": True,
        },
        {
            "ch": 128,
            "ch_mult": (1, 1, 2, 2, 4),
            "attn_resolutions": (16,),
            "z_channels": 16,
            "resolution": 256,
        },
    ),
    "clip": (
        configs.clip_from,
        {
            "architectures": ["CLIPTextModel"],
            "hidden_size": 768,
            "eos_token_id": 2,
            "dropout": 0.0,
            "torch_dtype": "float32",
        },
        {"hidden_size": 768, "eos_token_id": None, "num_hidden_layers": 12},
    ),
    "bert": (
        configs.bert_from,
        {"model_type": "ldmbert", "scale_embedding": False},
        {"dim": 1280, "depth": 32, "vocab_size": 30522},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_understood(name: str) -> None:
    reads, theirs, expected = PUBLISHED[name]
    assert expected.items() <= reads(theirs).items()


CONTEXT = {"use_spatial_transformer": True, "context_dim": 8}
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (unets.unet_condition_from, {"brand_new": 1}, "unknown parameters brand_new"),
    (
        unets.unet_condition_from,
        {"time_cond_proj_dim": 256},
        "time_cond_proj_dim=256 is not supported, only None",
    ),
    (
        unets.unet_condition_from,
        {"layers_per_block": [2, 2, 2, 3]},
        "layers_per_block=.* differs between levels",
    ),
    (
        unets.unet_condition_from,
        {"attention_head_dim": [5, 10, 20, 30]},
        "attention_head_dim=.5, 10, 20, 30. gives heads of different widths",
    ),
    (
        unets.unet_condition_from,
        {"block_out_channels": [320, 480, 640, 640]},
        "no multiples of the first",
    ),
    (unets.unet_condition_from, {"down_block_types": ["K"] * 4}, "the block K is not supported"),
    (unets.unet_condition_from, {"up_block_types": ["UpBlock2D"] * 4}, "do not mirror each other"),
    (unets.unet_2d_from, {"flip_sin_to_cos": False}, "flip_sin_to_cos=False"),
    (configs.kl_from, {"use_quant_conv": False}, "use_quant_conv=False"),
    (configs.vq_from, {"norm_type": "spatial"}, "norm_type='spatial'"),
    (configs.bert_from, {"encoder_ffn_dim": 100}, "must be 4 d_model"),
    (configs.clip_from, {"dropout": 0.5}, "dropout=0.5"),
    (
        schedulers.schedule_from,
        {"_class_name": "DDIMScheduler", "thresholding": True},
        "thresholding=True",
    ),
    (
        schedulers.schedule_from,
        {"_class_name": "DDIMScheduler"},
        "clip_sample=True would clip latents",
    ),
    (
        schedulers.schedule_from,
        {"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1]},
        "trained_betas",
    ),
    (
        schedulers.schedule_from,
        {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "s"},
        "beta_schedule='s'",
    ),
    (unets.unet_to, {"channel_mult": (2, 4)}, "its first level has model_channels channels"),
    (unets.unet_to, {"resblock_updown": True}, "cannot hold resblock_updown=True"),
    (
        unets.unet_to,
        CONTEXT | {"num_head_channels": 24, "legacy": False},
        "cannot hold heads of 24 channels",
    ),
    (unets.unet_to, {"num_heads": 2}, "the same width on every level"),
    (
        unets.unet_to,
        {"num_heads": 1, "use_spatial_transformer": True},
        "cannot hold context_dim=None",
    ),
]


@pytest.mark.parametrize(
    ("function", "fields", "message"),
    REFUSED,
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:40],
)
def test_options_without_a_counterpart_are_refused(
    function: Any, fields: dict[str, Any], message: str
) -> None:
    given: Any = fields
    if function is unets.unet_to:
        given = UNet(
            **{"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1}
            | fields,
            attention_resolutions=(1, 2),
        )
    with pytest.raises(TargetError, match=message) as raised:
        function(given)
    assert "\n" not in str(raised.value)


def test_text_encoders_that_have_no_word_there_are_refused() -> None:
    with pytest.raises(TargetError, match="ff_glu=True"):
        configs.bert_to(TransformerEncoder(8, 1, ff_glu=True))


def test_a_projection_makes_it_another_class() -> None:
    written = configs.clip_to(CLIPText(projection_dim=4))
    assert written["architectures"] == ["CLIPTextModelWithProjection"]
    assert configs.clip_projected_from(written)["projection_dim"] == 4


@pytest.mark.parametrize(
    ("fields", "sampling", "lines"),
    [
        (
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1},
            ("plms", "uniform"),
            0,
        ),
        ({"_class_name": "DDIMScheduler", "clip_sample": False}, ("ddim_x0", "leading"), 0),
        (
            {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
            ("ddim", "leading"),
            0,
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
            ("euler", "karras"),
            0,
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"},
            ("dpmpp_2m", "trailing"),
            0,
        ),
        ({"_class_name": "LMSDiscreteScheduler"}, ("lms", "uniform"), 1),
        ({"_class_name": "KarrasVeScheduler"}, ("ddim", "uniform"), 2),
        ({"_class_name": "PNDMScheduler", "steps_offset": 1}, ("plms", "uniform"), 1),
        (
            {"_class_name": "EulerAncestralDiscreteScheduler", "skip_prk_steps": True}
            | {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": True},
            ("euler_ancestral", "uniform"),
            0,
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
            | {"timestep_spacing": "trailing", "solver_order": 3},
            ("dpmpp_2m_sde", "trailing"),
            1,
        ),
    ],
)
def test_schedulers(fields: dict[str, Any], sampling: tuple[str, str], lines: int) -> None:
    config, assumed = schedulers.schedule_from(
        fields | {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    )
    assert config["schedule"]["beta_schedule"] == "linear"
    assert config["objective"] == "v"
    assert tuple(config["sampling"].values()) == sampling
    assert len(assumed) == lines
    if sampling[0].startswith("ddim"):
        assert schedulers.schedule_from(schedulers.schedule_to(config))[0] == config


# ------------------------------------------------------------------------------ folders and the Hub


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline folder, to damage."""
    return shutil.copytree(written, tmp_path / "pipeline")


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def spoil_vocabulary(folder: Path) -> None:
    entries = sorted(bert_tokenizer().get_vocab().items(), key=lambda item: item[1])
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.txt").write_text(
        "\n".join(entry for entry, _ in entries[:-1]), encoding="utf-8"
    )


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipeline": (
        lambda p: change(p / "model_index.json", _class_name="FluxPipeline"),
        "the pipeline FluxPipeline is not supported",
    ),
    "component": (
        lambda p: change(p / "model_index.json", unet_2=["diffusers", "X"]),
        "with the component unet_2 is not supported",
    ),
    "missing": (
        lambda p: change(p / "model_index.json", bert=[None, None]),
        "model_index.json lacks the component bert",
    ),
    "class": (
        lambda p: change(p / "unet" / "config.json", _class_name="AutoencoderKL"),
        "AutoencoderKL is not supported",
    ),
    "channels": (
        lambda p: change(p / "unet" / "config.json", in_channels=9),
        "found .32, 4, 3, 3., expected .32, 9, 3, 3.",
    ),
    "no config": (
        lambda p: (p / "unet" / "config.json").unlink(),
        "config.json is missing; copy the folder whole",
    ),
    "no list": (
        lambda p: change(p / "unet" / "config.json", block_out_channels=5),
        "unet/config.json is not understood: 'int' object",
    ),
    "no levels": (
        lambda p: change(p / "vqvae" / "config.json", block_out_channels=[]),
        "vqvae/config.json is not understood: .* index out of range",
    ),
    "no number": (
        lambda p: change(p / "vqvae" / "config.json", scaling_factor="x"),
        "is not understood: could not convert string",
    ),
    "no weights": (
        lambda p: (p / "bert" / "model.safetensors").unlink(),
        "a folder without a checkpoint",
    ),
    "no JSON": (lambda p: (p / "model_index.json").write_text("{"), "cannot be read"),
    "nested": (lambda p: (p / "unet" / "config.json").write_text("[" * 10**5), "nested too deeply"),
    "vocabulary": (
        spoil_vocabulary,
        "its vocabulary is not the one that ldm_jax ships .30522 entries. but has 30521 entries",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_folder_is_a_one_line_error(name: str, folder: Path) -> None:
    spoil, message = SPOILT[name]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_folders_that_are_not_diffusers_are_refused(tmp_path: Path) -> None:
    assert not is_diffusers(tmp_path)
    for text in (
        "{",
        "[1]",
        '{"kind": "latent_diffusion"}',
        '{"architectures": 5}',
        '{"architectures": []}',
        "[" * 10**5,
    ):
        (tmp_path / "config.json").write_text(text)
        assert not is_diffusers(tmp_path)
    assert not is_diffusers(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TargetError, match="None is not supported"):
        from_diffusers(tmp_path)


def test_models_without_a_diffusers_pipeline_are_refused(
    model: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="no pipeline for conditioner 'class'"):
        to_diffusers(
            MODEL | {"conditioner": {"kind": "class", "embed_dim": 8}}, model, tmp_path / "a"
        )
    assert not any(tmp_path.iterdir())  # nothing half-written
    with pytest.raises(TargetError, match="is not empty"):
        to_diffusers(MODEL, model, written)


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched = []
    monkeypatch.setattr(hub, "_download", lambda name: fetched.append(name) or tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for local in ("emoji", "runs/missing", "pkg:assets/emoji", "./a/b", "a/b/c", tmp_path):
        assert hub.fetched(local) is local
    assert hub.fetched("CompVis/stable-diffusion-v1-4") == tmp_path
    assert fetched == ["CompVis/stable-diffusion-v1-4"]

    def offline(name: str) -> Path:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(hub, "_download", offline)
    with pytest.raises(
        CheckpointError, match=r"no folder 'org/name', and its download failed: no route to host$"
    ):
        hub.fetched("org/name")


FILES = """
    unet/config.json unet/diffusion_pytorch_model.safetensors
    vae/config.json vae/diffusion_pytorch_model.bin
    text_encoder/model-00001-of-00002.safetensors text_encoder/model-00002-of-00002.safetensors
    text_encoder/model.safetensors.index.json tokenizer/vocab.json tokenizer/merges.txt
    model_index.json
"""
NOT_WANTED = """
    README.md v1-4.ckpt
    unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.safetensors
    unet/diffusion_pytorch_model.non_ema.safetensors unet/flax_model.msgpack
    safety_checker/model.safetensors
"""


def test_of_a_hub_repository_one_set_of_weights_is_fetched() -> None:
    assert hub.wanted(f"{FILES} {NOT_WANTED}".split()) == sorted(FILES.split())
