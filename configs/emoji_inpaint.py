"""Inpainting of emoji: at most a fifth of the image is hidden.

The latents of the masked image and the mask are concatenated to the noisy latents
(Rombach et al. 2022, section 4.5). The hole is filled smoothly before the image is encoded: a
black hole, as in the original, corrupts the few latents around it.

    ldm-train --config=emoji_inpaint --config.data.path=emoji64.zip --workdir=runs/emoji_inpaint

Starts from the demo's UNet and uses its first stage. docs/conditions.md shows results.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import CHANNELS, LATENT, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    joined = CHANNELS + 1
    config = emoji_diffusion(
        {"kind": "joined", "of": "masked_filled", "channels": joined, "size": LATENT}, joined=joined
    )
    config.steps = 5500
    config.data.condition = section(kinds=("boxes", "strokes", "outpaint"), most=0.2)
    config.data.flip = True
    # A third of DDIM's noise: a model of this size overestimates the posterior's variance.
    config.model.sampling.update(eta=1.0, temperature=0.3)
    return smoke(config, variant)
