"""Emoji four times as large: the small picture, 16x16 as the latents are, is joined to the noisy latents (Rombach et al. 2022, section 4.4).

    python train.py --config=configs/emoji_sr.py --config.data.path=emoji64.zip --workdir=runs/emoji_sr

begins with the demo's UNet and takes its first stage. 25 minutes on one core of a Xeon; samples of six held-out pictures: docs/condition_sr.png.
Their PSNR is 25.7 dB, bicubic pictures' 21.5 dB.
For pictures as they are found, degrade as Zhang et al. 2021 do:
--config.data.condition.kinds="('bsr',)", or bsr_light.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import LATENT, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short one on the pictures that ship with the package."""
    config = emoji_diffusion(
        {"kind": "joined", "of": "picture", "channels": 3, "size": LATENT}, joined=3
    )
    config.steps = 3000
    config.data.condition = section(kinds=("bicubic",))
    config.data.flip = True
    # Noise of half the strength, as for inpainting: edges lie where the small picture has them.
    config.model.sampling.update(eta=1.0, temperature=0.5)
    return smoke(config, variant)
