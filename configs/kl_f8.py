"""The KL autoencoder with f = 8 of latent diffusion and Stable Diffusion v1 (Rombach et al. 2022), on 256x256 pictures.

    python train.py --config=configs/kl_f8.py --config.data.path=PICTURES --workdir=runs/kl_f8

83.7 million parameters. What it needs on which chips: docs/scale.md; it has not been trained here. config.loss.vgg16 and config.loss.lpips_heads are
files of the perceptual distance's published weights.
"""

import ml_collections

from configs.common import base, section

# Also the first stage of configs/sd_v1.py and configs/txt2img_1p4b.py.
KL_F8 = {
    "kind": "kl",
    "embed_dim": 4,
    "z_channels": 4,
    "ch": 128,
    "ch_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_resolutions": (),
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a narrow one of a minute on the pictures that ship with the package."""
    config = base("autoencoder")
    config.steps = 250_000
    config.batch_size = 96
    config.dtype = "bfloat16"
    config.remat = "blocks"
    config.ema = 0.0
    config.mesh.zero1 = True
    config.data.update(size=(256, 256), crop="random", flip=True, num_workers=8)
    config.optim.update(lr=4.5e-6 * 96, b1=0.5, b2=0.9)  # the original's base rate times the batch
    config.loss.update(
        kind="l1", kl_weight=1e-6, perceptual_weight=1.0, vgg16="vgg16.safetensors", lpips_heads="lpips.safetensors"
    )
    config.model.first_stage = section(**KL_F8)
    if variant == "smoke":
        config.update(steps=20, batch_size=8, dtype="float32")
        config.log_every = config.save_every = config.eval_every = config.preview_every = 10
        config.eval_batches = 1
        config.loss.update(perceptual_weight=0.0, vgg16="", lpips_heads="")
        config.data.update(path="pkg:assets/emoji_subset.zip", size=(32, 32), num_workers=0)
        config.model.first_stage.update(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    elif variant:
        raise ValueError(f"kl_f8 has no variant {variant!r}; there is smoke")
    return config
