"""CLIP's embedders and the search for neighbours of retrieval-augmented models."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.clip_vector import ClipVector
from ldm_jax.conditioning.neighbors import Index
from ldm_jax.convert.clip.reading import clip_from_shapes
from ldm_jax.convert.clip.tables import openai_table
from ldm_jax.convert.tables import to_ours
from ldm_jax.models.clip import CLIP, fit_pixels

from .golden import Case, NotYet, nchw

Results = dict[str, Any]


def clip_model(case: Case) -> tuple[CLIP, Any]:
    """Both towers of a case and their parameters."""
    weights = {name.removeprefix("model."): a for name, a in case.weights().items()}
    fixed = case.spec["param_recipe"].get("fixed", {})
    weights |= {name: np.float32(value) for name, value in fixed.items()}
    model = clip_from_shapes({name: np.shape(a) for name, a in weights.items()})
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, to_ours(openai_table(model), weights, shapes=shapes, where=case.name)


def known(case: Case, *names: str) -> dict[str, Any]:
    """The arguments of a case; NotYet where there are others than ``names``."""
    if unknown := case.kwargs.keys() - {*names}:
        raise NotYet(f"arguments {sorted(unknown)}")
    return case.kwargs


def text_embedder(case: Case) -> Results:
    # The name of the weights and the device change no number; the original keeps max_length without
    # using it: its tokenizer always gives 77 tokens.
    kwargs = known(case, "version", "device", "max_length", "n_repeat", "normalize")
    model, params = clip_model(case)
    options = {name: kwargs[name] for name in ("n_repeat", "normalize") if name in kwargs}
    embedder = ClipVector(module=model.text, pad_token_id=0, **options)
    tokens = embedder.encode(case.spec["texts"])
    np.testing.assert_array_equal(tokens, case.inputs["tokens"])
    encoded = jax.jit(embedder)(params["conditioner"], tokens).crossattn
    return {"z": encoded[:, 0], "encoded": encoded}


def image_embedder(case: Case) -> Results:
    antialias = known(case, "model", "jit", "device", "antialias").get("antialias", False)
    model, params = clip_model(case)
    images, size = jnp.asarray(case.image("x")), model.vision.image_size

    @jax.jit
    def run(params: Any, images: Any, tokens: Any) -> tuple[Any, Any, Any]:
        pixels = fit_pixels(images, size, antialias)
        features = model.encode_image(params, images, antialias)
        return pixels, features, model.logits(params, pixels, tokens)

    pixels, features, logits = run(params, images, case.inputs["tokens"])
    every = int(re.findall(r"rows ::(\d+)", case.spec["call"])[0])
    return {
        "preprocessed_row0": nchw(pixels)[:, :, ::every],
        "features": features,
        "logits_per_image": logits,
    }


def searcher(case: Case) -> Results:
    # The names of the database and of the encoder choose files alone.
    kwargs = known(case, "k", "metric", "database", "retriever_version")
    queries = case.inputs["queries"]
    queries = queries[:, 0] if queries.ndim == 3 else queries
    index = Index(case.inputs["embedding"], metric=kwargs.get("metric", "dot_product"))
    found = index.search(queries, kwargs["k"])
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    results = {
        "nns": found.rows,
        "nn_embeddings": found.vectors,
        "context": np.concatenate([unit[:, None], found.vectors], axis=1),
        "q_embeddings": unit,
    }
    if "patch_coords" in case.inputs:
        results["patch_coords"] = case.inputs["patch_coords"][found.rows]
    return results


def train_searcher(case: Case) -> Results:
    # Everything but k shapes the learned codes and the tree of its approximations, whose results
    # are soft; the exact search has none of them.
    approximations = "dims_per_block aiq_thld reorder_k partioning_trainsize num_leaves"
    kwargs = known(case, "k", "metric", *approximations.split(), "num_leaves_to_search")
    database = case.inputs.get("embedding")
    if database is None:
        rng = np.random.RandomState(int(re.findall(r"RandomState\((\d+)\)", case.spec["notes"])[0]))
        centres = rng.standard_normal((40, 16))
        labels = rng.randint(0, 40, 4000)
        database = centres[labels] + 0.35 * rng.standard_normal((4000, 16))
    index = Index(np.float32(database), metric=kwargs.get("metric", "dot_product"))
    return {"nns_bruteforce": index.search(case.inputs["queries"], kwargs["k"]).rows}


_SEARCHERS = "search_bruteforce / search_ah / search_partioned_ah (scann 1.4.2)"
CASES: Mapping[str, Callable[[Case], Results]] = {
    "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder": text_embedder,
    "ldm.modules.encoders.modules.FrozenClipImageEmbedder": image_embedder,
    "scripts.knn2img.Searcher": searcher,
    f"scripts.train_searcher.{_SEARCHERS}": train_searcher,
}
