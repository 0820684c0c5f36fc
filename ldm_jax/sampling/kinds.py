"""Kinds of models that can be sampled, by the "kind" of a model directory's config."""

import pkgutil
from typing import Any

# The class that samples a kind, a subclass of `ldm_jax.sampling.pipeline.Pipeline`, or where it is,
# "module:name": it is then imported when it is needed.
PIPELINES: dict[str, Any] = {
    "latent_diffusion": "ldm_jax.sampling.pipeline:Pipeline",
    "transformer": "ldm_jax.sampling.codes:CodePipeline",
}


def pipeline_class(kind: Any) -> Any:
    """Returns the class that samples models of a kind; None where they make no pictures."""
    found = PIPELINES.get(kind)
    return pkgutil.resolve_name(found) if isinstance(found, str) else found
