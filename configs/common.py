"""What every config has, with its default. A config file changes what is its own."""

from typing import Any

import ml_collections


def section(**fields: Any) -> ml_collections.ConfigDict:
    """A part of a config."""
    return ml_collections.ConfigDict(fields)


def base(task: str) -> ml_collections.ConfigDict:
    """Defaults for the ``task`` "autoencoder" or "diffusion"."""
    config = ml_collections.ConfigDict()
    config.task = task
    config.seed = 0
    config.steps = 100_000
    config.batch_size = 32
    config.dtype = "float32"  # of products; parameters are always float32
    config.remat = (
        "none"  # or "blocks": the backward pass computes each block again instead of keeping what is inside it
    )
    config.ema = 0.9999  # decay of the average of parameters; 0 keeps none
    config.parallel = "jit"  # or "pmap": one host, everything replicated
    config.mesh = section()  # sizes of the axes; -1 is what the others leave
    config.mesh.data = -1
    config.mesh.fsdp = 1  # splits parameters, their average and the optimiser's moments
    config.mesh.tensor = 1  # splits attention and feed-forward
    config.mesh.zero1 = False  # splits the average and the optimiser's moments alone: for models that fit a chip
    config.log_every = 50
    config.save_every = 1000
    config.eval_every = 1000
    config.eval_batches = 8
    config.preview_every = 1000
    config.keep = 3  # newest checkpoints

    config.data = section()
    config.data.path = ""
    config.data.size = (64, 64)
    config.data.crop = "center"  # or random, none
    config.data.flip = False
    config.data.caption = "{text}"  # a template over the columns of metadata.jsonl
    config.data.cache = ""  # a latent cache of these data, made by python -m ldm_jax.data encode
    config.data.num_workers = 0  # processes that decode; 0 decodes in threads

    config.optim = section()
    config.optim.kind = "adamw"  # or adafactor, whose second moments are a row and a column for each matrix
    config.optim.mu_dtype = "float32"  # of the first moments; or bfloat16
    config.optim.lr = 1e-4
    config.optim.warmup = 0
    config.optim.decay = "constant"  # or cosine, linear
    config.optim.final = 0.0  # of lr, at the last step
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.0
    config.optim.clip = 0.0  # largest gradient norm; 0 does not clip
    config.optim.accumulate = 1  # parts that a batch is cut into, to save memory

    config.loss = section()
    config.model = section()
    if task == "autoencoder":
        config.loss.kind = "l1"  # or l2
        config.loss.kl_weight = 1e-6
        config.loss.logvar_init = 0.0
        config.loss.perceptual_weight = 0.0
        config.loss.vgg16 = ""  # safetensors of VGG16's convolutions
        config.loss.lpips_heads = ""  # safetensors of LPIPS' linear heads
    else:
        config.scale_factor_batches = 64
        config.preview_captions = ()  # of the preview pictures; () takes them from the held-out pictures
        config.loss.kind = "l2"  # or l1
        config.loss.posterior = "sample"  # of the first stage; or mode
        config.loss.simple_weight = 1.0
        config.loss.elbo_weight = 0.0
        config.loss.logvar_init = 0.0
        config.loss.learn_logvar = False
        config.loss.min_snr_gamma = 0.0  # 0 weighs every timestep alike
        config.loss.caption_dropout = 0.1  # for classifier-free guidance
    return config
