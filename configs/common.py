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
    # A model directory whose parameters the run begins with, to go on with a trained or a converted model.
    config.init = ""
    config.init_strict = (
        True  # False: what that model has not, or has of another shape, begins anew
    )
    config.steps = 100_000
    config.batch_size = 32
    config.dtype = "float32"  # of products; parameters are always float32
    # Or "blocks": the backward pass computes each block again instead of keeping what is inside it.
    config.remat = "none"
    config.ema = 0.9999  # decay of the average of parameters; 0 keeps none
    config.parallel = "jit"  # or "pmap": one host, everything replicated
    config.mesh = section()  # sizes of the axes; -1 is what the others leave
    config.mesh.data = -1
    config.mesh.fsdp = 1  # splits parameters, their average and the optimiser's moments
    config.mesh.tensor = 1  # splits attention and feed-forward
    config.mesh.zero1 = (
        False  # splits the average and the optimiser's moments alone: for models that fit a chip
    )
    config.log_every = 50
    config.save_every = 1000
    config.eval_every = 1000
    config.eval_batches = 8
    config.preview_every = 1000
    config.keep = 3  # newest checkpoints
    config.best = section()  # beside them those of the best validations
    config.best.keep = 0  # how many; 0: none
    config.best.metric = "loss"  # which of validation's means
    config.best.mode = "min"  # or max: which of its values is the best
    config.wandb = section()
    config.wandb.project = ""  # of Weights & Biases, where the run is told too; "" for none

    config.data = section()
    config.data.source = "image_folder"  # a name in ldm_jax.data.SOURCES
    config.data.path = ""
    config.data.size = (64, 64)
    config.data.crop = "center"  # or random, none
    config.data.flip = False
    config.data.caption = "{text}"  # a template over the columns of metadata.jsonl
    config.data.cache = ""  # a latent cache of these data, made by python -m ldm_jax.data encode
    # Of its class in ldm_jax/data/conditions.py, where the model's conditioner needs more than a caption.
    config.data.condition = section()
    config.data.num_workers = 0  # processes that decode; 0 decodes in threads

    config.optim = section()
    config.optim.kind = (
        "adamw"  # or adafactor, whose second moments are a row and a column for each matrix
    )
    config.optim.mu_dtype = "float32"  # of the first moments; or bfloat16
    config.optim.lr = 1e-4
    config.optim.warmup = 0
    config.optim.scale_lr = False  # times batch_size
    config.optim.decay = "constant"  # or cosine, linear; or, as config.optim.cycles says, cycles_cosine, cycles_linear
    config.optim.final = 0.0  # of lr, at the last step
    config.optim.cycles = section(
        lengths=(100_000,), warmup=(10_000,), start=(1e-6,), high=(1.0,), low=(1.0,)
    )  # of lr
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.0
    config.optim.clip = 0.0  # largest gradient norm; 0 does not clip
    config.optim.accumulate = 1  # parts that a batch is cut into, to save memory

    config.loss = section()
    config.model = section()
    if task == "autoencoder":
        config.updates = "fused"  # one run of the autoencoder for both optimisers; "parity": one each, as the original
        config.loss.kind = "l1"  # or l2
        config.loss.kl_weight = 1e-6
        config.loss.logvar_init = 0.0
        config.loss.learn_logvar = (
            False  # the original has it as a parameter that no optimiser gets
        )
        config.loss.perceptual_weight = 0.0
        config.loss.vgg16 = ""  # safetensors of VGG16's convolutions
        config.loss.lpips_heads = ""  # safetensors of LPIPS' linear heads
        config.loss.codebook_weight = 1.0
        config.loss.restart_codes = (
            False  # put codes that nothing chooses on encodings of the batch
        )
        config.loss.temperature = 1.0  # of the Gumbel quantiser, falling ...
        config.loss.temperature_final = 1.0  # ... to this ...
        config.loss.temperature_steps = 1  # ... over so many steps

        config.adversary = section()
        config.adversary.weight = 0.0  # disc_weight; 0 trains without a discriminator
        config.adversary.start = 50_001  # disc_start: the step from which it counts
        config.adversary.factor = 1.0  # disc_factor
        config.adversary.loss = "hinge"  # or vanilla
        config.adversary.layers = 3
        config.adversary.channels = 64
        config.adversary.actnorm = False  # in place of batch normalisation
        # Steps over which the generator's part grows after start; 0: at once, as the original.
        config.adversary.ramp = 0
        config.adversary.cap = 0.0  # highest d_weight; 0: the original's 1e4 * weight
        config.adversary.alarm = 0.0  # a d_weight above this is said in the log; 0: never

        config.guard = section()
        config.guard.rollbacks = (
            0  # how often a run that diverged goes back to its last checkpoint; 0: it stops
        )
        config.guard.lower = 0.5  # each time the adversary's weight is multiplied by this
        # Diverged is what is not finite and, unless this is 0, a recent rec_loss this many times its lowest; above the root of it nothing is saved.
        config.guard.rise = 0.0
    else:
        config.scale_factor_batches = 64
        config.preview_captions = ()  # of the preview pictures of text; () takes them from the held-out pictures
        config.loss.kind = "l2"  # or l1
        config.loss.posterior = "sample"  # of the first stage; or mode
        config.loss.simple_weight = 1.0
        config.loss.elbo_weight = 0.0
        config.loss.logvar_init = 0.0
        config.loss.learn_logvar = False
        config.loss.min_snr_gamma = 0.0  # 0 weighs every timestep alike
        # Above 1 more of training is spent where there is much noise (Esser et al. 2024, equation 23).
        config.loss.timestep_shift = 1.0
        config.loss.caption_dropout = 0.1  # of conditions of any kind, for classifier-free guidance
        config.loss.offset_noise = 0.0  # standard deviation of noise that is equal over a channel
    return config


def short(config: ml_collections.ConfigDict, steps: int = 20) -> None:
    """Makes a run of a few steps on the pictures that ship with the package, each kind of output made twice: what all smoke variants share."""
    config.steps, config.batch_size = steps, 8
    config.log_every = config.save_every = config.eval_every = config.preview_every = steps // 2
    config.eval_batches = 1
    config.data.path = "pkg:assets/emoji_subset.zip"
    if "scale_factor_batches" in config:
        config.scale_factor_batches = 2
