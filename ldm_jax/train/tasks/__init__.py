"""The tasks that can be trained, by the name that a config's ``task`` gives."""

from typing import Any

from ldm_jax.errors import ConfigError, did_you_mean
from ldm_jax.train.tasks.autoencoder import AutoencoderTask
from ldm_jax.train.tasks.base import Task
from ldm_jax.train.tasks.classifier import ClassifierTask
from ldm_jax.train.tasks.contrastive import ContrastiveTask
from ldm_jax.train.tasks.diffusion import DiffusionTask
from ldm_jax.train.tasks.inversion import InversionTask
from ldm_jax.train.tasks.label_maps import LabelMapTask
from ldm_jax.train.tasks.lora import LoraTask
from ldm_jax.train.tasks.transformer import TransformerTask

TASKS: dict[str, type[Task]] = {
    "autoencoder": AutoencoderTask,
    "classifier": ClassifierTask,
    "contrastive": ContrastiveTask,
    "diffusion": DiffusionTask,
    "inversion": InversionTask,
    "label_maps": LabelMapTask,
    "lora": LoraTask,
    "transformer": TransformerTask,
}


def task_class(config: Any) -> type[Task]:
    """Returns the class of a config's task; ConfigError where there is none."""
    if config.task not in TASKS:
        raise ConfigError(f"task {config.task!r} does not exist{did_you_mean(config.task, TASKS)}")
    return TASKS[config.task]
