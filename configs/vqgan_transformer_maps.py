r"""A transformer over the codes of vqgan_f16 and of maps: semantic maps, or depths with :depth.

Esser et al. 2021 (arXiv:2012.09841), section 4.1: S-FLCKR and ImageNet's depths. The map has a VQ
model of its own, with as many channels as it has labels, or one of depths.

    ldm-train --config=vqgan_transformer_maps --config.data.path=IMAGES \
        --config.model.first_stage.path=runs/vqgan_f16/model \
        --config.model.conditioner.path=runs/vqgan_maps/model --workdir=runs/vqgan_transformer_maps

Larger pictures are sampled by sliding windows: ldm-sample --size=256x512 --semantic_map=MAP.png.
Not trained by this project: it needs accelerators.
"""

import ml_collections

from ldm_jax.configs.common import section
from ldm_jax.configs.released import FIRST_STAGES
from ldm_jax.configs.transformers import finish, tiny_stage, transformer

LABELS = 182


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``variant`` is "", "depth" or "smoke"."""
    if variant not in ("", "depth", "smoke"):
        raise ValueError(
            f"vqgan_transformer_maps has no variant {variant!r}; choose depth or smoke"
        )
    config = transformer(1024, 256, n_layer=24, n_head=16, n_embd=1024)
    channels = 1 if variant == "depth" else LABELS
    fields = {name: v for name, v in FIRST_STAGES["vqgan_f16"].items() if name != "kind"}
    fields |= {"in_channels": channels, "out_ch": channels}
    of = "depth" if variant == "depth" else "labels"
    config.data.condition = section(column=of if variant == "depth" else "map")
    config.model.conditioner = section(
        kind="coded_map", of=of, size=(256, 256), path="runs/vqgan_maps/model", **fields
    )
    if variant != "depth":
        config.model.conditioner.n_labels = channels
    if variant == "smoke":
        config = finish(config, variant)
        config.data.update(source="scenes", count=40, objects=2, smallest=0.4, largest=0.7)
        config.data.update(column="subgroup", classes=("heart", "time"), background=255)
        config.model.conditioner = section(
            kind="coded_map", of="labels", size=(64, 64), n_labels=4, **tiny_stage(4)
        )
    return config
