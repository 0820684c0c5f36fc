"""Four-fold super-resolution of emoji, 16x16 to 64x64.

The small image has the size of the latents and is concatenated to them
(Rombach et al. 2022, section 4.4).

    ldm-train --config=emoji_sr --config.data.path=emoji64.zip --workdir=runs/emoji_sr

Starts from the demo's UNet and uses its first stage. For real degradations, train with
--config.data.condition.kinds="('bsr',)" (Zhang et al. 2021). docs/conditions.md shows results.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.emoji_presets import LATENT, emoji_diffusion, smoke


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant="smoke"`` is a short, narrow run on the bundled images."""
    config = emoji_diffusion(
        {"kind": "joined", "of": "picture", "channels": 3, "size": LATENT}, joined=3
    )
    config.steps = 3000
    config.data.condition = section(kinds=("bicubic",))
    config.data.flip = True
    # Half of DDIM's noise keeps edges where the small image has them.
    config.model.sampling.update(eta=1.0, temperature=0.5)
    return smoke(config, variant)
