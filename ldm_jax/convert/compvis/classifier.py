"""NoisyLatentImageClassifier of the original: a classifier beside the diffusion model it guides."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.convert.compvis.networks import param_shapes, table_of
from ldm_jax.convert.compvis.targets import module_from_config, pick_params
from ldm_jax.convert.compvis.whole import Whole, latent_diffusion
from ldm_jax.convert.tables import Table, under
from ldm_jax.errors import TargetError
from ldm_jax.models.classifier import classifier_of
from ldm_jax.models.unet import UNet

TARGET = "ldm.models.diffusion.classifier.NoisyLatentImageClassifier"
OWN, DIFFUSION = "model.", "diffusion_model."


def noisy_classifier(params: Mapping[str, Any]) -> Whole:
    """Returns the parts of a classifier: "classifier", and those of its diffusion model.

    Raises:
      TargetError: Something in it is not supported.
    """
    pick_params(
        "NoisyLatentImageClassifier",
        params,
        same="num_classes pool label_key diffusion_config",
        # About the training; diffusion_path names the folder of the YAML that is given here.
        ignored="weight_decay log_steps monitor scheduler_config ckpt_path diffusion_ckpt_path "
        "diffusion_path",
    )
    config = params.get("diffusion_config")
    if config is None:
        raise TargetError(
            "NoisyLatentImageClassifier: give the diffusion model's config as diffusion_config"
        )
    inner = config["params"]
    unet = inner["unet_config"]["params"]
    of_unet = module_from_config(inner["unet_config"]["target"], unet)
    key = params.get("label_key") or inner.get("cond_stage_key", "image")
    count = params["num_classes"]
    module: Any
    if key == "class_label":
        module = classifier_of(of_unet, count, unet["image_size"], params.get("pool", "attention"))
    elif key == "segmentation":
        module = of_unet.clone(in_channels=of_unet.out_channels, out_channels=count)
        assert isinstance(module, UNet)
    else:
        raise TargetError(
            f"NoisyLatentImageClassifier: label_key {key!r} is not one of class_label, segmentation"
        )
    diffusion = latent_diffusion(inner, buffers=False)
    table: Table = under(("classifier",), table_of(module, OWN))
    table += [entry._replace(source=f"{DIFFUSION}{entry.source}") for entry in diffusion.table]
    shapes = {"classifier": param_shapes(module), **diffusion.shapes}
    return Whole({"classifier": module, **diffusion.modules}, table, shapes)
