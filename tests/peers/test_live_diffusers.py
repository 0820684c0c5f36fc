"""Converted networks of diffusers and transformers compute what their originals compute.

Runs where the extra "parity" is installed; all weights are small and random.
"""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from ldm_jax.conditioning.hybrid import Hybrid
from ldm_jax.conditioning.masked import masked_condition
from ldm_jax.conditioning.tokenizers import bert_tokenizer, clip_tokenizer
from ldm_jax.convert.diffusers import from_diffusers, to_diffusers
from ldm_jax.convert.diffusers.components import MODULES
from ldm_jax.diffusion.guidance import predictor
from ldm_jax.diffusion.samplers import SAMPLERS, initial_noise, sample, time_grid
from ldm_jax.errors import CheckpointError
from ldm_jax.sampling.pipeline import Pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (  # noqa: E402
    LDMBertConfig,
    LDMBertModel,
)

pytestmark = pytest.mark.compile

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
}
SD_UNET = UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}
LDM_UNET = UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "num_class_embeds": None,
}
PLAIN_UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
}
CODER = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16}
KL = CODER | {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "scaling_factor": 0.3,
}
VQ = CODER | {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "num_vq_embeddings": 32,
    "latent_channels": 3,
    "vq_embed_dim": 5,
}
BERT = {"max_position_embeddings": 77, "encoder_layers": 2, "d_model": 24, "encoder_ffn_dim": 96}
BERT |= {"encoder_attention_heads": 2, "head_dim": 8}
CLIP = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


def random(module: Any, seed: int = 0) -> Any:
    """The module with random weights, biases and gains too, scaled to keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.1 if parameter.ndim == 1 else min(1.0, parameter[0].numel() ** -0.5)
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return module.eval()


def nchw(a: np.ndarray) -> Any:
    return torch.from_numpy(a).permute(0, 3, 1, 2)


def nhwc(a: Any) -> np.ndarray:
    return a.detach().permute(0, 2, 3, 1).numpy()


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same(ours: Any, theirs: np.ndarray) -> None:
    """Equal to 1e-4 of the largest value."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.05
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def converted(model: Any, folder: Path) -> tuple[Any, dict[str, Any], Any]:
    """(module, params, what was read) of a saved model."""
    model.save_pretrained(folder)
    read = from_diffusers(folder)
    part = read.config["kind"]
    return MODULES[part](read.config), read.params[part], read


def back(read: Any, cls: Any, folder: Path) -> Any:
    """The model diffusers or transformers loads from our files; no missing or unexpected keys."""
    to_diffusers(read.config, read.params, folder)
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("config", [SD_UNET, LDM_UNET], ids=["sd_v1", "ldm"])
def test_unet_with_text(config: dict[str, Any], tmp_path: Path) -> None:
    theirs = random(diffusers.UNet2DConditionModel(**config))
    x, t, context = normal(2, 8, 8, 4), np.array([3, 741]), normal(2, 5, 24, seed=2)
    module, params, read = converted(theirs, tmp_path / "a")
    expected = nhwc(theirs(nchw(x), torch.from_numpy(t), torch.from_numpy(context)).sample)
    same(jax.jit(module.apply)({"params": params}, x, t, context), expected)
    again = back(read, type(theirs), tmp_path / "b")
    same(nhwc(again(nchw(x), torch.from_numpy(t), torch.from_numpy(context)).sample), expected)


@pytest.mark.parametrize("classes", [None, 5])
def test_unet_with_plain_attention(classes: int | None, tmp_path: Path) -> None:
    theirs = random(diffusers.UNet2DModel(**PLAIN_UNET, num_class_embeds=classes))
    x, t, y = normal(2, 8, 8, 3), np.array([3, 741]), None if classes is None else np.array([1, 4])
    module, params, read = converted(theirs, tmp_path / "a")
    labels = None if y is None else torch.from_numpy(y)
    expected = nhwc(theirs(nchw(x), torch.from_numpy(t), labels).sample)
    same(jax.jit(module.apply)({"params": params}, x, t, None, y), expected)
    again = back(read, type(theirs), tmp_path / "b")
    same(nhwc(again(nchw(x), torch.from_numpy(t), labels).sample), expected)


@pytest.mark.parametrize("middle", [True, False])
def test_autoencoder_kl(middle: bool, tmp_path: Path) -> None:
    theirs = random(diffusers.AutoencoderKL(**KL, mid_block_add_attention=middle))
    x = np.tanh(normal(2, 16, 16, 3))
    module, params, read = converted(theirs, tmp_path / "a")
    posterior = theirs.encode(nchw(x)).latent_dist
    z = nhwc(posterior.mode())
    expected = nhwc(theirs.decode(nchw(z)).sample)
    both = jax.jit(
        lambda v, x, z: (module.apply(v, x, method="encode"), module.apply(v, z, method="decode"))
    )
    ours, pixels = both({"params": params}, x, z)
    same(ours.mode(), z)
    same(ours.logvar, nhwc(posterior.logvar))
    same(pixels, expected)
    same(nhwc(back(read, type(theirs), tmp_path / "b").decode(nchw(z)).sample), expected)


def test_vq_model(tmp_path: Path) -> None:
    theirs = random(diffusers.VQModel(**VQ))
    x = np.tanh(normal(2, 16, 16, 3))
    module, params, read = converted(theirs, tmp_path / "a")
    z = nhwc(theirs.encode(nchw(x)).latents)
    expected = nhwc(theirs.decode(nchw(z)).sample)
    both = jax.jit(
        lambda v, x, z: (module.apply(v, x, method="encode"), module.apply(v, z, method="decode"))
    )
    latents, pixels = both({"params": params}, x, z)
    same(latents, z)
    same(pixels, expected)
    same(nhwc(back(read, type(theirs), tmp_path / "b").decode(nchw(z)).sample), expected)


def test_text_encoders(tmp_path: Path) -> None:
    bert = random(LDMBertModel(LDMBertConfig(vocab_size=100, **BERT)))
    clip = random(transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=100, **CLIP)))
    tokens = np.random.default_rng(0).integers(0, 100, (2, 77))
    for name, theirs in {"bert": bert, "clip": clip}.items():
        module, params, read = converted(theirs, tmp_path / name)
        expected = theirs(torch.from_numpy(tokens))[0].detach().numpy()
        states = jax.jit(module.apply)({"params": params}, tokens)
        same(states if name == "bert" else states.last, expected)
        again = back(read, type(theirs), tmp_path / f"{name}_back")
        same(again(torch.from_numpy(tokens))[0].detach().numpy(), expected)


# ---------------------------------------------------------------------------------- whole pipelines

PROMPTS = ["a red apple", "the quick brown fox, oil on canvas"]
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def of_length_77(tokenizer: Any) -> Any:
    """An own copy that cuts and pads to 77 tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 77
    return tokenizer


def text_to_image(scheduler: Any) -> Any:
    """A LDMTextToImagePipeline, which divides sizes by 8 whatever its first stage does."""
    coder = KL | {"block_out_channels": (32, 32, 32, 32)}
    coder |= {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return diffusers.LDMTextToImagePipeline(
        vqvae=random(diffusers.AutoencoderKL(**coder)),
        bert=random(LDMBertModel(LDMBertConfig(**BERT))),
        tokenizer=of_length_77(bert_tokenizer()),
        unet=random(diffusers.UNet2DConditionModel(**LDM_UNET)),
        scheduler=scheduler,
    )


def stable_diffusion(scheduler: Any) -> Any:
    """A StableDiffusionPipeline."""
    return diffusers.StableDiffusionPipeline(
        vae=random(diffusers.AutoencoderKL(**KL)),
        text_encoder=random(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))),
        tokenizer=of_length_77(clip_tokenizer()),
        unet=random(diffusers.UNet2DConditionModel(**SD_UNET)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unconditional(scheduler: Any) -> Any:
    """A LDMPipeline on VQ codes."""
    unet = diffusers.UNet2DModel(**PLAIN_UNET | {"in_channels": 5, "out_channels": 5})
    return diffusers.LDMPipeline(
        vqvae=random(diffusers.VQModel(**VQ)), unet=random(unet), scheduler=scheduler
    )


def ours(
    pipe: Pipeline, noise: np.ndarray, prompts: Any, guidance: float, steps: int = 10
) -> np.ndarray:
    """Pixels in [0, 1], by the model's own sampler and grid, from handed-in noise."""
    conditioner = pipe.model.conditioner
    return run(
        pipe,
        noise,
        conditioner.encode(prompts),
        conditioner.encode_null(len(prompts)),
        guidance,
        steps,
    )


def run(
    pipe: Pipeline, noise: np.ndarray, encoded: Any, null: Any, guidance: float, steps: int = 10
) -> np.ndarray:
    """`ours`, of conditions as the conditioner encodes them."""
    model, chosen = pipe.model, pipe.defaults
    sampler = SAMPLERS[chosen.sampler]
    schedule = jax.device_get(model.schedule)
    nodes = sampler.nodes(schedule, time_grid(chosen.grid, steps, schedule))

    @jax.jit
    def made(model: Any, x: jax.Array, encoded: Any, null: Any) -> jax.Array:
        predict = predictor(
            model.denoiser(encoded, null, guidance), model.schedule, model.objective
        )
        z, _ = sample(
            sampler,
            predict,
            x,
            nodes,
            noise=jnp.zeros((nodes.t.shape[0], 1, *x.shape)) if sampler.draws else None,
        )
        return jnp.clip(model.first_stage.decode(z) / 2 + 0.5, 0, 1)

    return np.asarray(made(model, noise, encoded, null))


# Step grid and last alpha of the original's samplers.
ORIGINAL = {"set_alpha_to_one": False, "steps_offset": 1}
PNDM = (
    {k: v for k, v in SCHEDULE.items() if k != "clip_sample"} | ORIGINAL | {"skip_prk_steps": True}
)
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(**SCHEDULE, **ORIGINAL),
    "ddim_x0": lambda: diffusers.DDIMScheduler(**SCHEDULE),  # diffusers' own defaults
    "plms": lambda: diffusers.PNDMScheduler(**PNDM),  # as Stable Diffusion v1 is published
}


@pytest.mark.parametrize(
    ("build", "sampler"),
    [
        (stable_diffusion, "ddim"),
        (stable_diffusion, "ddim_x0"),
        (stable_diffusion, "plms"),
        (text_to_image, "ddim"),
        (text_to_image, "ddim_x0"),
    ],
)
def test_pipelines_with_text(build: Any, sampler: str, tmp_path: Path) -> None:
    theirs = build(SCHEDULERS[sampler]())
    theirs.set_progress_bar_config(disable=True)
    noise = normal(2, 8, 8, 4)
    options = {
        "num_inference_steps": 10,
        "guidance_scale": 3.0,
        "latents": nchw(noise),
        "output_type": "np",
    }
    expected = theirs(PROMPTS, **options).images
    theirs.save_pretrained(tmp_path / "pipeline")
    pipe = ldm_jax.load(tmp_path / "pipeline", dtype="float32", devices=1)
    assert pipe.defaults.sampler == sampler
    assert expected.std() > 0.01
    assert np.abs(ours(pipe, noise, PROMPTS, 3.0) - expected).max() <= 1e-4
    assert pipe(PROMPTS[:1], steps=2).shape == (1, *expected.shape[1:])

    # And back: what we write, diffusers loads whole, and computes the same with.
    config, params, *_ = from_diffusers(tmp_path / "pipeline")
    to_diffusers(config, params, tmp_path / "back")
    again = type(theirs).from_pretrained(tmp_path / "back")
    again.set_progress_bar_config(disable=True)
    if sampler == "plms":  # our writer always names DDIM
        again.scheduler = theirs.scheduler
    np.testing.assert_allclose(again(PROMPTS, **options).images, expected, atol=1e-5)


def test_unconditional_pipeline(tmp_path: Path) -> None:
    theirs = unconditional(diffusers.DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"))
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        2, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np"
    ).images
    noise = nhwc(torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0)))
    theirs.save_pretrained(tmp_path / "pipeline")
    pipe = ldm_jax.load(tmp_path / "pipeline", dtype="float32", devices=1)
    assert np.abs(ours(pipe, noise, ["", ""], 1.0) - expected).max() <= 1e-4


def test_super_resolution_pipeline(tmp_path: Path) -> None:
    unet = diffusers.UNet2DModel(**PLAIN_UNET | {"in_channels": 6})
    coder = diffusers.VQModel(**VQ | {"vq_embed_dim": 3})
    ends = {"set_alpha_to_one": False, "steps_offset": 1}
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, **ends)
    theirs = diffusers.LDMSuperResolutionPipeline(
        vqvae=random(coder), unet=random(unet), scheduler=scheduler
    )
    theirs.set_progress_bar_config(disable=True)
    small = np.tanh(normal(2, 8, 8, 3))
    options = {"num_inference_steps": 10, "output_type": "np"}
    expected = theirs(nchw(small), generator=torch.Generator().manual_seed(0), **options).images
    noise = nhwc(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    theirs.save_pretrained(tmp_path / "pipeline")
    pipe = ldm_jax.load(tmp_path / "pipeline", dtype="float32", devices=1)
    assert expected.std() > 0.01
    assert np.abs(ours(pipe, noise, small, 1.0) - expected).max() <= 1e-4
    config, params, *_ = from_diffusers(tmp_path / "pipeline")
    to_diffusers(config, params, tmp_path / "back")
    again = type(theirs).from_pretrained(tmp_path / "back")
    again.set_progress_bar_config(disable=True)
    images = again(nchw(small), generator=torch.Generator().manual_seed(0), **options).images
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_inpainting_pipeline(tmp_path: Path) -> None:
    """A UNet of nine channels: latents, mask, latents of the masked picture."""
    parts = stable_diffusion(SCHEDULERS["ddim"]()).components
    parts["unet"] = random(diffusers.UNet2DConditionModel(**SD_UNET | {"in_channels": 9}))
    # diffusers samples the masked image's latents, ldm_jax takes the mode: the variance is tiny.
    with torch.no_grad():
        parts["vae"].quant_conv.weight[4:] = 0
        parts["vae"].quant_conv.bias[4:] = -30
    theirs = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    noise, picture = normal(2, 8, 8, 4), np.tanh(normal(2, 16, 16, 3, seed=3))
    mask = np.zeros((2, 16, 16, 1), np.float32)
    mask[0, :, 8:] = mask[1, 3:9, 2:13] = 1
    options = {
        "num_inference_steps": 10,
        "guidance_scale": 3.0,
        "strength": 1.0,
        "output_type": "np",
    }
    options |= {"height": 16, "width": 16, "latents": nchw(noise)}
    expected = theirs(PROMPTS, image=nchw(picture), mask_image=nchw(mask), **options).images
    without = theirs(
        PROMPTS, image=nchw(picture), mask_image=nchw(np.ones_like(mask)), **options
    ).images
    assert np.abs(without - expected).max() > 0.01
    theirs.save_pretrained(tmp_path / "pipeline")
    pipe = ldm_jax.load(tmp_path / "pipeline", dtype="float32", devices=1)
    model, conditioner = pipe.model, pipe.model.conditioner
    assert isinstance(conditioner, Hybrid)
    joined = masked_condition(model.first_stage, picture, mask, conditioner.joined.of)
    encoded, null = conditioner.text.encode(PROMPTS), conditioner.text.encode_null(2)
    made = run(
        pipe, noise, {"text": encoded, "joined": joined}, {"text": null, "joined": joined}, 3.0
    )
    assert np.abs(made - expected).max() <= 1e-4

    # The pipeline, from its own noise: the compiled program gives the same pixels.
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    hole = np.zeros((16, 16), np.uint8)
    hole[:, 8:] = 255
    images = pipe(PROMPTS[:1], image=pixels, mask=hole, steps=10, guidance=3.0, seeds=[7])
    options["latents"] = nchw(np.asarray(initial_noise(jax.random.key(7)[None], (8, 8, 4))))
    image, mask_image = (
        torch.from_numpy(pixels / 127.5 - 1).float(),
        torch.from_numpy(hole / 255).float(),
    )
    (whole,) = theirs(
        PROMPTS[:1],
        image=image.permute(2, 0, 1)[None],
        mask_image=mask_image[None, None],
        **options,
    ).images
    assert np.abs(images[0, :, 8:] - 255 * whole[:, 8:]).max() <= 1
    assert (images[0, :, :8] == pixels[:, :8]).all()

    config, params, *_ = from_diffusers(tmp_path / "pipeline")
    to_diffusers(config, params, tmp_path / "back")
    again = type(theirs).from_pretrained(tmp_path / "back")
    again.set_progress_bar_config(disable=True)
    options["latents"] = nchw(noise)
    images = again(PROMPTS, image=nchw(picture), mask_image=nchw(mask), **options).images
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    theirs = text_to_image(diffusers.DDIMScheduler(**SCHEDULE))
    theirs.save_pretrained(tmp_path)
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"apple":', '"appel":'))
    with pytest.raises(CheckpointError, match="its vocabulary is not the one that ldm_jax ships"):
        ldm_jax.load(tmp_path)
