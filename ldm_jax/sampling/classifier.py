"""Guidance by a classifier: its model directory, and the classes of a request."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.base import as_list
from ldm_jax.conditioning.class_label import class_numbers
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.errors import RequestError
from ldm_jax.io.checkpoint import find_model, load_model
from ldm_jax.models.build import construct
from ldm_jax.models.classifier import Classifier
from ldm_jax.models.encoder_unet import EncoderUNet
from ldm_jax.models.ldm import LatentDiffusion
from ldm_jax.sampling.inputs import Inputs, numbers, pair
from ldm_jax.sampling.request import Request


def load_classifier(name: str | Path, model: LatentDiffusion) -> Classifier:
    """Reads the model directory of a classifier, for a diffusion model that it fits.

    Raises:
      RequestError: It is no classifier, or was trained on other latents or timesteps.
    """
    path = find_model(name)
    config, params = load_model(path)
    if config.get("kind") != "classifier":
        raise RequestError(f"classifier {path} is a {config.get('kind')}, not a classifier")
    module = construct(EncoderUNet, "classifier", config["classifier"])
    schedule = construct(make_schedule, "schedule", config["schedule"])
    theirs = jax.device_get(model.schedule.alphas_cumprod)
    if schedule.timesteps != len(theirs) or not np.allclose(schedule.alphas_cumprod, theirs):
        raise RequestError(f"classifier {path} was trained with another noise schedule")
    if module.in_channels != model.first_stage.channels:
        raise RequestError(
            f"classifier {path} takes latents of {module.in_channels} channels, and this model has "
            f"{model.first_stage.channels}"
        )
    weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params["classifier"])
    return Classifier(weights, schedule, module, tuple(config.get("classes") or ()))


def take_classes(model: LatentDiffusion, request: Request) -> tuple[Request, list[int] | None]:
    """Returns a request as the model's conditioner takes it, and the classes of its classifier.

    The conditioner gets the classes too where it takes some.

    Raises:
      RequestError: The request and the classifier do not fit.
    """
    classifier = model.classifier
    if classifier is None:
        if request.classifier_scale is not None:
            raise RequestError(
                "classifier_scale needs a classifier: give one by --classifier (classifier=)"
            )
        return request, None
    labels = as_list(request.classes)
    if not labels:
        raise RequestError("the classifier guides to a class: give classes")
    wanted = class_numbers(labels, classifier.module.out_channels, classifier.names)
    if model.conditioner.field == "classes":
        return request, wanted
    rest = dataclasses.replace(request, classes=None)
    if len(wanted) > 1 or model.conditioner.field is None:
        wanted, seeds = pair(wanted, request.seeds, "classes")
        rest = dataclasses.replace(rest, seeds=seeds)
    return rest, wanted


def with_labels(
    model: LatentDiffusion, inputs: Inputs, labels: Sequence[int] | None, request: Request
) -> Inputs:
    """Returns the inputs with the classes of the classifier, one for each picture."""
    if labels is None or model.classifier is None:
        return inputs
    n = len(inputs.seeds)
    if len(labels) not in (1, n):
        raise RequestError(f"{len(labels)} classes for {n} pictures: give one, or one for each")
    side = model.classifier.module.image_size
    if model.classifier.module.pool == "attention" and request.size is not None:
        f = model.first_stage.downsampling
        if tuple(request.size) != (side * f, side * f):
            raise RequestError(f"this classifier takes pictures of {side * f}x{side * f} alone")
    scale: Any = 1.0 if request.classifier_scale is None else request.classifier_scale
    return inputs._replace(
        labels=np.broadcast_to(np.asarray(labels, np.int32), (n,)),
        label_scale=numbers(scale, n, "classifier scales"),
    )
