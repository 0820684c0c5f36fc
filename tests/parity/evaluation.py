"""InceptionV3, resizers and set metrics of the reference implementations."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert.features import inception_table
from ldm_jax.convert.tables import to_ours
from ldm_jax.data import ImageTransform
from ldm_jax.eval import metrics
from ldm_jax.eval.resize import resize
from ldm_jax.models.inception import InceptionV3

from .golden import Case, NotYet, nchw, nhwc

Results = dict[str, Any]
SIZE = (299, 299)


@cache
def network() -> tuple[Any, Any, Any]:
    """(module, compiled apply, shapes of the variables) of InceptionV3."""
    net = InceptionV3()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    return net, jax.jit(net.apply), shapes


_VARIABLES: dict[str, Any] = {}


def features(case: Case, pixels: Any) -> dict[str, Any]:
    """InceptionV3's features of normalised pixels with the case's weights."""
    _, apply, shapes = network()
    key = case.spec.get("params_from_recipe_of", case.name)
    if key not in _VARIABLES:
        weights = case.weights()
        _VARIABLES[key] = to_ours(inception_table(shapes), weights, shapes=shapes, where=key)
    return apply(_VARIABLES[key], pixels)


def big_picture() -> np.ndarray:
    """The picture that the "recipe_big" cases describe, uint8 [1, 3, 320, 352]."""
    return np.random.RandomState(2027).randint(0, 256, (1, 3, 320, 352)).astype(np.uint8)


def sparse(x: Any) -> np.ndarray:
    """Rows and columns of a picture [h, w, c] that the cases record."""
    return np.asarray(x)[::13, ::11]


def inception(case: Case) -> Results:
    picture = nhwc(case.inputs.get("picture", None) if case.inputs else big_picture())
    tf, pt = (resize(picture, SIZE, name) for name in ("tf1_bilinear", "torch_bilinear"))
    ours = features(case, (tf - 128) / 128)
    theirs = features(case, pt / 127.5 - 1)
    spatial = np.asarray(ours["spatial"]).reshape(len(picture), 17, 17, 7)
    names = ("64", "192", "768", "2048")
    return {
        **{f"tf.{name}": ours[name] for name in (*names, "logits_unbiased", "logits")},
        **{f"pt.{name}": theirs[name] for name in names},
        "tf.spatial_7ch": spatial[:, ::4, ::4],
        "tf.resized": nchw(sparse(tf[0])[None]),
        "pt.resized": nchw(sparse(pt[0] / 255)[None]),
    }


def clean_fid(case: Case) -> Results:
    picture = case.inputs["picture_hwc"] if case.inputs else nhwc(big_picture())[0]
    clean = resize(picture[None], SIZE, "pil_bicubic")
    whole = np.asarray(clean[0], np.float64)
    eight_bits = ImageTransform(SIZE, "none", resample="bicubic")
    return {
        "clean": sparse(clean[0]),
        "legacy_pytorch": sparse(resize(picture[None], SIZE, "torch_bilinear")[0]),
        "pil_bilinear_float": sparse(resize(picture[None], SIZE, "pil_bilinear")[0]),
        "pil_uint8_bicubic": sparse(eight_bits(picture, np.random.default_rng(0))),
        "clean_mean": whole.mean((0, 1)),
        "clean_min": whole.min(),
        "clean_max": whole.max(),
        "features_2048_clean": features(case, (clean - 128) / 128)["2048"],
    }


def spread(prefix: str, name: str, value: metrics.Spread) -> Results:
    return {f"{prefix}.{name}_mean": value.mean, f"{prefix}.{name}_std": value.std}


def kernel_of(options: dict[str, Any]) -> metrics.Kernel:
    if "sigma" in options:
        return metrics.gaussian_kernel(options["sigma"])
    known = {k: options[k] for k in ("degree", "gamma", "coef0") if k in options}
    return metrics.polynomial_kernel(**known)


def set_metrics(case: Case) -> Results:
    kwargs, found = case.kwargs, {}
    generated, real = case.inputs["features_1"], case.inputs["features_2"]
    logits, seed = case.inputs["logits"], kwargs["rng_seed"]
    known = {"kid", "kid_poly2", "kid_rbf", "rng_seed", "isc", "prc_neighborhood", "mind"}
    if unknown := kwargs.keys() - known:
        raise NotYet(f"arguments {sorted(unknown)}")
    moments = [metrics.RunningMoments(x.shape[1]).update(x) for x in (generated, real)]
    fid = metrics.frechet_distance(
        moments[0].mean, moments[0].covariance, moments[1].mean, moments[1].covariance
    )
    half = generated.shape[1] // 2
    a, b = (metrics.RunningMoments(x.shape[1]).update(x[:half]) for x in (generated, real))
    singular = metrics.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    found |= {
        "fid.frechet_inception_distance": fid,
        "adm.fid": fid,
        "pytorch_fid.fid": fid,
        "fid_singular.frechet_inception_distance": singular,
        "mu1": moments[0].mean,
        "sigma1": moments[0].covariance,
    }
    for name in ("kid", "kid_poly2", "kid_rbf"):
        value = metrics.kernel_distance(
            generated,
            real,
            subsets=kwargs[name]["kid_subsets"],
            subset_size=kwargs[name]["kid_subset_size"],
            seed=seed,
            kernel=kernel_of(kwargs[name]),
        )
        found |= spread(name, "kernel_inception_distance", value)
    shuffled = seed if kwargs["isc"]["shuffle"] else None
    whole = metrics.inception_score(logits, splits=kwargs["isc"]["splits"], shuffle_seed=shuffled)
    three = metrics.inception_score(logits, splits=3, shuffle_seed=None)
    found |= spread("isc", "inception_score", whole)
    found |= spread("isc_split3_noshuffle", "inception_score", three)
    one = metrics.inception_score(logits, splits=1, shuffle_seed=None)
    parts = [metrics.inception_score(logits[i : i + 25], splits=1) for i in range(0, 90, 25)]
    found |= {
        "adm.inception_score": one.mean,
        "adm.inception_score_split25": np.mean([part.mean for part in parts]),
    }
    for k in kwargs["prc_neighborhood"]:
        precision, recall = metrics.precision_recall(real, generated, k)
        found |= {
            f"prc_k{k}.precision": precision,
            f"prc_k{k}.recall": recall,
            f"prc_k{k}.f_score": 2 * precision * recall / (precision + recall),
        }
    precision, recall = metrics.precision_recall(100 * real, 100 * generated, 3)
    radii = metrics.neighbour_radii(np.float64(100 * real), 3)
    return found | {"adm.precision": precision, "adm.recall": recall, "adm.radii_ref": radii}


CASES = {
    "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3 (tf.*) and "
    "pytorch_fid.inception.InceptionV3 (pt.*)": inception,
    "cleanfid.resize.build_resizer / make_resizer": clean_fid,
    "torch_fidelity.metric_{fid,kid,isc,prc,mind} 0.4.0, guided-diffusion "
    "evaluations/evaluator.py, pytorch_fid.fid_score": set_metrics,
}
