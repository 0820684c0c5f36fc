"""Emoji with a part made anew: the masked picture's latents and the mask are joined to the noisy latents (Rombach et al. 2022, section 4.5).

    python train.py --config=configs/emoji_inpaint.py --config.data.path=emoji64.zip --workdir=runs/emoji_inpaint

begins with the demo's UNet and takes its first stage; a fifth of a picture is hidden at most. 53 minutes on one core of a Xeon beside other work.
Samples of six held-out pictures, docs/condition_inpaint.png, are 27.1 dB from the pictures, holes that are only filled smoothly 24.1 dB. The hole is
filled smoothly before the picture is encoded: black, as in the original, it spoils the few latents beside it.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import CHANNELS, LATENT, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """``variant`` "" is the full run; "smoke" a short one on the pictures that ship with the package."""
    joined = CHANNELS + 1
    config = emoji_diffusion(
        {"kind": "joined", "of": "masked_filled", "channels": joined, "size": LATENT}, joined=joined
    )
    config.steps = 5500
    config.data.condition = section(kinds=("boxes", "strokes", "outpaint"), most=0.2)
    config.data.flip = True
    # Noise of a third of its strength: what a model of this size holds to be possible is wider than what is likely.
    config.model.sampling.update(eta=1.0, temperature=0.3)
    return smoke(config, variant)
