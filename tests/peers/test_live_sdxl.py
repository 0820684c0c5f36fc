"""Pipelines of Stable Diffusion 2 and XL, saved by diffusers, make the same pictures here.

Runs where diffusers and PyTorch are installed; all weights are small and random.
"""

import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.conditioning.tokenizers import clip_tokenizer
from ldm_jax.diffusion.samplers import initial_noise

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.compile

TEXT = {
    "vocab_size": 49408,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
EULER = {**BETAS, "timestep_spacing": "trailing"}
PROMPT, NEGATIVE, STEPS = "a red apple on a table", "blurry", 4


def random(module: Any, seed: int = 0) -> Any:
    """The module with random weights, scaled to keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.1 if parameter.ndim == 1 else min(1.0, parameter[0].numel() ** -0.5)
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return module.eval()


def text(width: int, projected: bool = False, act: str = "gelu") -> Any:
    fields = {**TEXT, "hidden_size": width, "hidden_act": act}
    config = transformers.CLIPTextConfig(**fields, **({"projection_dim": 20} if projected else {}))
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return random(getattr(transformers, name)(config), width)


def tokenizer(pad: str | None = None) -> Any:
    found = copy.deepcopy(clip_tokenizer())
    found.model_max_length = 77
    if pad is not None:
        found.pad_token = pad
    return found


def vae(levels: int = 2) -> Any:
    return random(
        diffusers.AutoencoderKL(
            block_out_channels=(32,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=4,
            sample_size=16,
            scaling_factor=0.4,
        ),
        5,
    )


def unet(context: int, **more: Any) -> Any:
    fields: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": context,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    }
    return random(diffusers.UNet2DConditionModel(**{**fields, **more}), 7)


def xl_unet(context: int, numbers: int, depth: Any) -> Any:
    return unet(
        context,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 8 * numbers,
        transformer_layers_per_block=depth,
    )


def save(pipe: Any, folder: Path) -> Any:
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model and a refiner of Stable Diffusion XL."""
    root = tmp_path_factory.mktemp("sdxl")
    euler = diffusers.EulerDiscreteScheduler(**EULER)
    base = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text(16, act="quick_gelu"),
        text_encoder_2=text(24, projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        unet=xl_unet(40, 6, (1, 2)),
        scheduler=euler,
        add_watermarker=False,
    )
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=text(24, projected=True),
        tokenizer=None,
        tokenizer_2=tokenizer("!"),
        unet=xl_unet(24, 5, 1),
        scheduler=euler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    for name, pipe in (("base", base), ("refiner", refiner)):
        save(pipe, root / name)
    return {"base": root / "base", "refiner": root / "refiner"}


def noise(seed: int, shape: tuple[int, int, int] = (8, 8, 4)) -> Any:
    """The noise of our seed in PyTorch's layout."""
    drawn = initial_noise(jax.vmap(jax.random.key)(np.asarray([seed], np.uint32)), shape)
    return torch.from_numpy(np.array(drawn)).permute(0, 3, 1, 2)


def same(ours: np.ndarray, theirs: Any) -> None:
    """Equal to a grey level and a half, of pictures with contrast."""
    expected = 255 * np.asarray(theirs)
    assert ours.shape == expected.shape
    assert expected.std() > 5
    assert np.abs(ours - expected).max() <= 1.5


def loaded(cls: str, folder: Path) -> Any:
    pipe = getattr(diffusers, cls).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_sdxl(folders: dict[str, Path], negative: str | None) -> None:
    theirs = loaded("StableDiffusionXLPipeline", folders["base"])
    sizes: dict[str, Any] = {"original_size": (32, 24), "target_size": (16, 20)}
    expected = theirs(
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=noise(1),
        crops_coords_top_left=(2, 3),
        negative_original_size=(32, 24),
        negative_crops_coords_top_left=(2, 3),
        negative_target_size=(16, 20),
        output_type="np",
        **sizes,
    ).images
    ours = ldm_jax.load(folders["base"], dtype="float32")
    assert ours.defaults.sampler == "euler"
    settings: dict[str, Any] = {"negative": negative, "steps": STEPS, "guidance": 3.0, **sizes}
    same(ours(PROMPT, seeds=1, crop=(2, 3), **settings), expected)


def test_sdxl_from_an_image(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    module = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *a, **k: noise(4))
    gaussian = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{gaussian}.sample", lambda self, generator=None: self.mode())
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    for name, more in (("base", {}), ("refiner", {"aesthetic_score": 7.0})):
        theirs = loaded("StableDiffusionXLImg2ImgPipeline", folders[name])
        expected = theirs(
            PROMPT,
            image=torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1)[None].float(),
            strength=0.5,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            output_type="np",
            **more,
        ).images
        ours = ldm_jax.load(folders[name], dtype="float32")
        options: dict[str, Any] = {"image": picture, "strength": 0.5, "size": (16, 16), **more}
        same(ours(PROMPT, seeds=4, steps=STEPS, guidance=3.0, **options), expected)


def test_a_refiner_takes_over(folders: dict[str, Path]) -> None:
    steps = 10
    base = loaded("StableDiffusionXLPipeline", folders["base"])
    refiner = loaded("StableDiffusionXLImg2ImgPipeline", folders["refiner"])
    common = {"num_inference_steps": steps, "guidance_scale": 3.0, "negative_prompt": NEGATIVE}
    latents = base(PROMPT, denoising_end=0.7, latents=noise(2), output_type="latent", **common)
    expected = refiner(
        PROMPT, image=latents.images, denoising_start=0.7, output_type="np", **common
    ).images
    ours = ldm_jax.load(folders["base"], refiner=folders["refiner"], dtype="float32")
    options: dict[str, Any] = {"steps": steps, "guidance": 3.0, "negative": NEGATIVE}
    # The refiner takes the latents' size in pixels for the size of its picture.
    same(ours(PROMPT, seeds=2, switch=0.7, **options), expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_2(prediction: str, tmp_path: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text(24),
        tokenizer=tokenizer("!"),
        unet=unet(24),
        scheduler=diffusers.DDIMScheduler(**DDIM, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(pipe, tmp_path / "a")
    expected = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=noise(3),
        output_type="np",
    ).images
    ours = ldm_jax.load(tmp_path / "a", dtype="float32")
    same(ours(PROMPT, negative=NEGATIVE, seeds=3, steps=STEPS, guidance=3.0), expected)


def test_upscaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=vae(3),
        text_encoder=text(24),
        tokenizer=tokenizer("!"),
        unet=unet(
            24,
            in_channels=7,
            num_class_embeds=60,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            only_cross_attention=(True, False),
        ),
        low_res_scheduler=diffusers.DDPMScheduler(**BETAS),
        scheduler=diffusers.DDIMScheduler(**DDIM, prediction_type="v_prediction"),
        max_noise_level=50,
    )
    save(pipe, tmp_path / "a")
    drawn = np.random.default_rng(6).standard_normal((8, 8, 3)).astype(np.float32)
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale"
    low = torch.from_numpy(drawn).permute(2, 0, 1)[None]
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *a, **k: low)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    expected = pipe(
        PROMPT,
        image=torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1)[None].float(),
        noise_level=30,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=noise(6),
        output_type="np",
    ).images
    ours = ldm_jax.load(tmp_path / "a", dtype="float32")
    options: dict[str, Any] = {"noise_level": 30, "steps": STEPS, "guidance": 3.0}
    same(ours(PROMPT, image=picture, seeds=6, **options), expected)
