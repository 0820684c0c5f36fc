"""LoRA, textual inversion and ControlNet give what they give in diffusers and peft.

Runs where diffusers and peft are installed; all weights are small and random.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax.configs.common import base as make_base
from ldm_jax.convert.conversion import convert, export
from ldm_jax.diffusion.samplers import initial_noise
from ldm_jax.distributed.mesh import make_mesh
from ldm_jax.train import loop

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from safetensors.torch import save_file  # noqa: E402
from test_live_diffusers import (  # noqa: E402
    KL,
    PROMPTS,
    SCHEDULERS,
    nchw,
    random,
    stable_diffusion,
)
from test_live_sdxl import folders, loaded  # noqa: E402, F401

pytestmark = pytest.mark.compile

SEEDS, OPTIONS = [7, 8], {"guidance_scale": 3.0, "output_type": "np"}


def noise(height: int, width: int) -> Any:
    """The noise of `SEEDS`, as diffusers takes it."""
    keys = jax.vmap(jax.random.key)(np.array(SEEDS, np.uint32))
    return nchw(np.asarray(initial_noise(keys, (height, width, 4))))


def close(ours: np.ndarray, theirs: np.ndarray, apart: Any = None) -> None:
    """Equal to one step of 8 bits; ``apart`` are pictures that must differ."""
    assert np.abs(ours - 255 * theirs).max() <= 1
    if apart is not None:
        assert np.abs(255 * (theirs - apart)).max() > 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """(a folder of diffusers, its pictures after ten steps)."""
    theirs = stable_diffusion(SCHEDULERS["ddim"]())
    theirs.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("base")
    theirs.save_pretrained(folder)
    options = OPTIONS | {"num_inference_steps": 10, "latents": noise(8, 8)}
    return folder, theirs(PROMPTS, **options).images


def reload(folder: Path) -> Any:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def filled(model: Any, seed: int) -> Any:
    """The model with random LoRA weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.3 * draw / parameter[0].numel() ** 0.5)
    return model


def test_lora_of_the_unet_at_two_strengths(base: Any, tmp_path: Path) -> None:
    folder, plain = base
    theirs = reload(folder)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
    theirs.unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    layers = peft.get_peft_model_state_dict(filled(theirs.unet, 0))
    about = theirs.unet.peft_config["default"].to_dict()
    type(theirs).save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=about
    )
    theirs = reload(folder)
    theirs.load_lora_weights(tmp_path, adapter_name="a")
    (file,) = tmp_path.glob("*.safetensors")
    pipe = ldm_jax.load(folder, dtype="float32", devices=1)
    for strength in (1.0, 0.6):
        theirs.set_adapters(["a"], [strength])
        options = OPTIONS | {"num_inference_steps": 10, "latents": noise(8, 8)}
        expected = theirs(PROMPTS, **options).images
        found = pipe.with_lora((file, strength))(PROMPTS, seeds=SEEDS, steps=10, guidance=3.0)
        close(found, expected, plain)


def test_lora_of_the_text_encoder(base: Any, tmp_path: Path) -> None:
    folder, plain = base
    theirs = reload(folder)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj", "fc1"])
    encoder = filled(peft.inject_adapter_in_model(config, theirs.text_encoder), 1)
    layers = {n.replace(".default", ""): a for n, a in encoder.state_dict().items() if "lora_" in n}
    type(theirs).save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    (file,) = tmp_path.glob("*.safetensors")
    options = OPTIONS | {"num_inference_steps": 10, "latents": noise(8, 8)}
    expected = theirs(PROMPTS, **options).images
    pipe = ldm_jax.load(folder, dtype="float32", devices=1, lora=[file])
    close(pipe(PROMPTS, seeds=SEEDS, steps=10, guidance=3.0), expected, plain)


def trained_lora(base_model: Path, folder: Path, targets: tuple[str, ...]) -> Path:
    """The directory of a LoRA that two steps have trained on pictures of noise."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    for i in range(4):
        pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    convert(base_model, folder / "base")
    config = make_base("lora")
    config.update(steps=2, batch_size=2, ema=0.0, save_every=2, eval_every=2, eval_batches=1)
    config.update(preview_every=2, preview_captions=("toy",), loss={"caption_dropout": 0.0})
    config.data.update(path=str(folder / "pictures"), size=(16, 16), caption="toy")
    config.optim.update(lr=0.1)
    config.model.update(path=str(folder / "base"), sampling={"size": (16, 16)})
    config.adapter.update(rank=2, alpha=3.0, targets=targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda **axes: make_mesh(1))
        return ldm_jax.train(config, folder / "run")


# diffusers reads kohya's text encoder only where all four layers of its attention are there.
TRAINED = (r"attn\d/to_(q|k|v|out)$", "in_conv", "proj_in$", r"layers_\d/(q|k|v|out|fc1)$")


def test_a_lora_that_was_trained_here(base: Any, tmp_path: Path) -> None:
    folder, plain = base
    lora = trained_lora(folder, tmp_path, TRAINED)
    pipe = ldm_jax.load(folder, dtype="float32", devices=1)
    found = pipe.with_lora((lora, 0.7))(PROMPTS, seeds=SEEDS, steps=10, guidance=3.0)
    for to in ("kohya", "peft"):
        export(lora, to, tmp_path / f"{to}.safetensors")
        theirs = reload(folder)
        theirs.load_lora_weights(tmp_path, weight_name=f"{to}.safetensors", adapter_name="a")
        theirs.set_adapters(["a"], [0.7])
        options = OPTIONS | {"num_inference_steps": 10, "latents": noise(8, 8)}
        close(found, theirs(PROMPTS, **options).images, plain)


def test_a_lora_of_stable_diffusion_xl_that_was_trained_here(
    folders: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = folders["base"]
    lora = trained_lora(folder, tmp_path, TRAINED)
    pipe = ldm_jax.load(folder, dtype="float32", devices=1)
    settings = {"seeds": SEEDS[:1], "steps": 4, "guidance": 3.0}
    found = pipe.with_lora((lora, 0.7))(PROMPTS[:1], size=(16, 16), **settings)
    theirs = loaded("StableDiffusionXLPipeline", folder)
    options = OPTIONS | {"num_inference_steps": 4, "latents": noise(8, 8)[:1]}
    plain = theirs(PROMPTS[0], **options).images
    for to in ("kohya", "peft"):
        export(lora, to, tmp_path / f"{to}.safetensors")
        theirs = loaded("StableDiffusionXLPipeline", folder)
        theirs.load_lora_weights(tmp_path, weight_name=f"{to}.safetensors", adapter_name="a")
        theirs.set_adapters(["a"], [0.7])
        close(found, theirs(PROMPTS[0], **options).images, plain)


def test_textual_inversion_of_several_vectors(base: Any, tmp_path: Path) -> None:
    folder, _ = base
    theirs = reload(folder)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, 24, generator=generator)
    save_file({"<toy>": vectors}, tmp_path / "toy.safetensors")
    torch.save(
        {"string_to_param": {"*": torch.nn.Parameter(vectors[:1] * 2)}, "name": "sks"},
        tmp_path / "sks.pt",
    )
    theirs.load_textual_inversion(tmp_path / "toy.safetensors")
    theirs.load_textual_inversion(tmp_path / "sks.pt")
    prompts = ["a <toy> on a table", "sks, in the style of <toy>"]
    options = OPTIONS | {"num_inference_steps": 10, "latents": noise(8, 8)}
    expected = theirs(prompts, **options).images
    files = [tmp_path / "toy.safetensors", tmp_path / "sks.pt"]
    pipe = ldm_jax.load(folder, dtype="float32", devices=1, embedding=files)
    found = pipe(prompts, seeds=SEEDS, steps=10, guidance=3.0)
    close(found, expected, reload(folder)(prompts, **options).images)


def test_controlnets(tmp_path: Path) -> None:
    coder = KL | {
        "block_out_channels": (32,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 64,
    }
    parts = stable_diffusion(SCHEDULERS["ddim"]()).components
    parts["vae"] = random(diffusers.AutoencoderKL(**coder))
    theirs = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    theirs.save_pretrained(tmp_path / "base")
    nets = []
    for i in range(2):
        net = random(diffusers.ControlNetModel.from_unet(parts["unet"]), seed=i)
        net.save_pretrained(tmp_path / f"net{i}")
        nets.append(net)
    hints = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    images = [torch.from_numpy(h / 255.0).float().permute(2, 0, 1)[None] for h in hints]
    pipe = ldm_jax.load(tmp_path / "base", dtype="float32", devices=1)
    options = OPTIONS | {"num_inference_steps": 4, "latents": noise(8, 8)}
    theirs.set_progress_bar_config(disable=True)
    plain = theirs(PROMPTS, **options).images
    for count, scales in ((1, [0.7]), (2, [1.0, 0.5])):
        control: Any = nets[:count] if count > 1 else nets[0]
        controlled = diffusers.StableDiffusionControlNetPipeline(
            **parts, controlnet=control, requires_safety_checker=False
        )
        controlled.set_progress_bar_config(disable=True)
        expected = controlled(
            PROMPTS,
            image=images[:count] if count > 1 else images[0],
            controlnet_conditioning_scale=scales if count > 1 else scales[0],
            **options,
        ).images
        ours = pipe.with_control(*(tmp_path / f"net{i}" for i in range(count)))
        found = ours(
            PROMPTS,
            control_image=list(hints[:count]),
            control_scale=scales,
            seeds=SEEDS,
            steps=4,
            guidance=3.0,
        )
        close(found, expected, plain)


def test_an_earlier_layer_of_the_text_encoder(base: Any) -> None:
    folder, plain = base
    theirs = reload(folder)
    encoder = theirs.text_encoder
    norm = getattr(encoder, "text_model", encoder).final_layer_norm

    def embeds(prompts: list[str]) -> Any:
        inputs = theirs.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            states = encoder(inputs.input_ids, output_hidden_states=True).hidden_states
            return norm(states[-2])

    options = OPTIONS | {"num_inference_steps": 10, "latents": noise(8, 8)}
    expected = theirs(
        prompt_embeds=embeds(PROMPTS), negative_prompt_embeds=embeds([""] * 2), **options
    ).images
    pipe = ldm_jax.load(folder, dtype="float32", devices=1, clip_skip=2)
    close(pipe(PROMPTS, seeds=SEEDS, steps=10, guidance=3.0), expected, plain)
