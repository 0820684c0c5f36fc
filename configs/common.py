"""Every field of a config, with its default. A config file sets what differs."""

from typing import Any

import ml_collections


def section(**fields: Any) -> ml_collections.ConfigDict:
    """Returns a nested section of a config."""
    return ml_collections.ConfigDict(fields)


def base(task: str) -> ml_collections.ConfigDict:
    """Returns the defaults of every training and those of the task, see `ldm_jax.train.tasks`."""
    from ldm_jax.train.tasks import TASKS

    config = ml_collections.ConfigDict()
    config.task = task
    config.seed = 0
    # A model directory whose parameters initialise the run: fine-tuning.
    config.init = ""
    # False: parameters that `init` lacks, or has in another shape, are initialised randomly.
    config.init_strict = True
    config.steps = 100_000
    config.batch_size = 32
    config.dtype = "float32"  # of the computation; parameters are always float32
    config.remat = "none"  # or "blocks": the backward pass recomputes the inside of each block
    config.ema = 0.9999  # decay of the parameters' moving average; 0: no average
    config.ema_warmup = True  # a lower decay in the first steps, which forgets the start
    # Averages whose length `ldm-convert average` chooses after training: relative standard
    # deviations of their profiles, such as (0.05, 0.1), and the steps between snapshots.
    config.power_ema = section(stds=(), every=1000)
    config.parallel = "jit"  # or "pmap": one host, everything replicated
    config.mesh = section()  # axis sizes; -1: the devices that the other axes leave
    config.mesh.data = -1
    config.mesh.fsdp = 1  # shards parameters, their average and the optimiser's moments
    config.mesh.tensor = 1  # shards attention and feed-forward layers
    config.mesh.zero1 = False  # shards only the average and the moments (ZeRO stage 1)
    config.log_every = 50
    config.save_every = 1000
    config.eval_every = 1000
    config.eval_batches = 8
    config.preview_every = 1000
    config.keep = 3  # number of newest checkpoints to keep
    config.best = section()  # checkpoints of the best validations, kept beside the newest
    config.best.keep = 0  # how many
    config.best.metric = "loss"  # a validation metric
    config.best.mode = "min"  # or "max"
    config.wandb = section()
    config.wandb.project = ""  # log to this Weights & Biases project; "": no logging

    config.data = section()
    config.data.source = "image_folder"  # a name in ldm_jax.data.SOURCES
    config.data.path = ""
    config.data.size = (64, 64)  # height, width in pixels
    config.data.channels = 3  # 1 to 16; other than RGB only in the first stage
    config.data.values = ()  # lowest and highest number of pictures that are not of 8 or 16 bits
    # Aspect-ratio buckets: each picture is cut to the nearest of several sizes, each batch has one.
    config.data.buckets = section()
    config.data.buckets.step = 0  # sides are multiples of it, in pixels; 0: no buckets
    config.data.buckets.areas = ()  # in pixels, one or several; (): that of data.size
    config.data.buckets.max_ratio = 4.0  # of the longer side to the shorter one
    config.data.buckets.ratios = ()  # width / height; (): all that multiples of the step give
    config.data.buckets.sizes = ()  # (height, width) pairs, instead of all of these
    config.data.buckets.columns = ()  # of pictures' height and width; (): the pictures are read
    config.data.crop = "center"  # or "random", "none"
    config.data.flip = False
    config.data.caption = "{text}"  # a template over the columns; "[, {style} style]" is optional
    config.data.caption_templates = ()  # instead of it, several: each sample draws one ...
    config.data.caption_weights = ()  # ... with these relative probabilities
    config.data.part_dropout = 0.0  # probability that an optional part is left out
    config.data.tag_column = ""  # a list, or a text with commas, drawn as follows:
    config.data.tag_shuffle = False
    config.data.tag_dropout = 0.0  # probability that a tag is left out
    config.data.tag_keep = 0  # tags at the beginning that are neither moved nor left out
    config.data.cache = ""  # a latent cache of this data, made by `ldm-data encode`
    # Fields of the model's condition that are read from the data; see docs/data.md.
    config.data.condition = section()
    config.data.num_workers = 0  # decoding processes; 0 decodes in threads

    config.optim = section()
    config.optim.kind = "adamw"  # or "adafactor" (factored second moments), "muon"
    config.optim.mu_dtype = "float32"  # or "bfloat16": dtype of the first moments
    config.optim.lr = 1e-4
    config.optim.warmup = 0  # steps
    config.optim.scale_lr = False  # multiply lr by batch_size
    # "constant", "cosine" or "linear"; "cycles_cosine" and "cycles_linear" follow optim.cycles.
    config.optim.decay = "constant"
    config.optim.final = 0.0  # fraction of lr at the last step
    config.optim.cycles = section(  # lengths in steps; start, high and low as fractions of lr
        lengths=(100_000,), warmup=(10_000,), start=(1e-6,), high=(1.0,), low=(1.0,)
    )
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.0
    config.optim.clip = 0.0  # maximum gradient norm; 0: no clipping
    config.optim.accumulate = 1  # number of micro-batches that a batch is split into

    config.loss = section()
    config.model = section()
    for name, value in TASKS[task].defaults().items():
        if isinstance(value, dict):
            value = section(**{**config.get(name, {}), **value})
        config[name] = value
    return config


def short(config: ml_collections.ConfigDict, steps: int = 20) -> None:
    """Makes ``config`` a run of a few steps on the bundled images; every output occurs twice."""
    config.steps, config.batch_size = steps, 8
    config.log_every = config.save_every = config.eval_every = config.preview_every = steps // 2
    config.eval_batches = 1
    config.data.path = "pkg:assets/emoji_subset.zip"
    if "scale_factor_batches" in config:
        config.scale_factor_batches = 2
