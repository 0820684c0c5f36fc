"""Fields that the configs of transformers over codes share."""

import ml_collections

from ldm_jax.configs.common import base, section, short
from ldm_jax.configs.released import FIRST_STAGES


def transformer(
    vocabulary: int, condition: int, *, side: int = 256, codes: int = 16, **gpt: int
) -> ml_collections.ConfigDict:
    """Returns the training of a transformer over square pictures.

    The optimiser is the original's: AdamW with betas 0.9 and 0.95, decay 0.01 of linear weights,
    and a learning rate of 4.5e-6 for each picture of the batch.

    Args:
      vocabulary: The number of tokens, of codes and condition.
      condition: The number of tokens of the condition.
      side: Pixels of a side.
      codes: Codes of a side.
      **gpt: n_layer, n_head, n_embd.
    """
    config = base("transformer")
    config.steps, config.batch_size = 500_000, 16
    config.ema = 0.0  # as the original
    config.data.update(path="pictures", size=(side, side))
    config.optim.update(lr=4.5e-6, scale_lr=True, b1=0.9, b2=0.95, weight_decay=0.01)
    model = config.model
    model.transformer = section(vocab_size=vocabulary, block_size=condition + codes**2 - 1, **gpt)
    model.first_stage = section(path="runs/vqgan_f16/model", **FIRST_STAGES["vqgan_f16"])
    model.sampling = section(size=(side, side), top_k=100)
    return config


def emoji() -> ml_collections.ConfigDict:
    """Returns the training of a small transformer over the 64 codes of emoji_vq:coarse."""
    config = base("transformer")
    config.steps, config.batch_size = 5000, 16
    config.save_every = config.eval_every = config.preview_every = 500
    config.ema = 0.99
    config.data.update(
        path="emoji64.zip", split_column="hexcode", holdout=0.05, flip=True, size=(64, 64)
    )
    config.optim.update(lr=1e-3, warmup=100, decay="cosine", final=0.02, b2=0.95)
    config.optim.update(weight_decay=0.01, clip=1.0)
    config.loss.pkeep = 0.95
    config.model.transformer = section(
        vocab_size=1024, block_size=64, n_layer=6, n_head=6, n_embd=192
    )
    config.model.transformer.update(embd_pdrop=0.1, resid_pdrop=0.1)
    config.model.first_stage = section(path="runs/emoji_vq/model", **_coarse())
    config.model.conditioner = section(kind="start")
    config.model.sampling = section(size=(64, 64), top_k=100, temperature=1.0)
    return config


def _coarse() -> ml_collections.ConfigDict:
    from ldm_jax.configs import emoji_vq

    return emoji_vq.get_config("coarse").model.first_stage


def tiny_stage(channels: int = 3) -> dict[str, object]:
    """Returns an untrained VQ model of 64 codes and f = 8, for trial runs."""
    return {
        "untrained": True,
        "n_embed": 64,
        "embed_dim": 4,
        "z_channels": 4,
        "ch": 32,
        "ch_mult": (1, 1, 1, 1),
        "num_res_blocks": 1,
        "attn_resolutions": (),
        "attn_type": "none",
        "resolution": 64,
        "in_channels": channels,
        "out_ch": channels,
    }


def finish(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """Returns ``config``; as "smoke", a short run of a narrow transformer on untrained codes."""
    if variant == "smoke":
        short(config, steps=4)
        config.data.size = (64, 64)
        config.optim.update(lr=1e-3, scale_lr=False)
        model, codes = config.model, 64
        ratio = (model.transformer.block_size + 1) // 256
        model.first_stage = section(kind="vq", **tiny_stage())
        block = codes * ratio if ratio > 1 else codes
        model.transformer.update(vocab_size=65, block_size=block, n_layer=2, n_head=4, n_embd=128)
        model.sampling.size = (64, 64)
    return config
