"""Evaluates a model, or pictures, against a reference: `evaluate`."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.convert.conversion import is_foreign, read_model
from ldm_jax.data import make_source
from ldm_jax.data.pixels import PixelFormat, model_pixels
from ldm_jax.errors import EvaluationError, did_you_mean
from ldm_jax.eval import metrics
from ldm_jax.eval.collect import Collected, collect
from ldm_jax.eval.features import CLIP, Extractor, Images, load_clip, load_extractor
from ldm_jax.eval.pictures import (
    ArrayPictures,
    NpzPictures,
    Pictures,
    Reconstructions,
    SampledPictures,
    SourcePictures,
)
from ldm_jax.eval.protocols import (
    PRESETS,
    Preset,
    Result,
    Statistics,
    differences,
    is_statistics,
    read_statistics,
    write_statistics,
)
from ldm_jax.io.atomic import write_atomic
from ldm_jax.io.checkpoint import find_model, load_model, read_config
from ldm_jax.io.paths import is_bucket, local_copy, local_only
from ldm_jax.models.build import build_first_stage
from ldm_jax.models.ldm import FirstStage
from ldm_jax.models.perceptual import load_lpips
from ldm_jax.sampling.pipeline import load as load_pipeline

LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Inputs:
    """What the metrics of one evaluation can draw on; ``generated`` and ``real`` once collected."""

    extractor: Extractor
    preset: Preset
    statistics: Statistics | None
    reference: Pictures | None
    clip: CLIP | None = None
    prompts: Sequence[str] | None = None
    pairs: "PairMeasure | None" = None
    labels: "Labels | None" = None
    prefix: str = ""
    generated: Any = None
    real: Any = None

    def frechet(self, layer: str, stored: tuple[np.ndarray, np.ndarray] | None) -> float:
        """Frechet distance of a layer, to stored moments or those of the reference pictures."""
        moments = self.generated.moments(f"features/{layer}")
        if stored is None:
            real = self.real.moments(f"features/{layer}")
            stored = (real.mean, real.covariance)
        return metrics.frechet_distance(moments.mean, moments.covariance, *stored)

    def features(self, name: str = "") -> tuple[np.ndarray, np.ndarray]:
        """(generated, real) features of the extractor's layer, or of ``name``."""
        name = name or f"features/{self.extractor.layer}"
        return self.generated[name], self.real[name]


@dataclasses.dataclass
class Labels:
    """Columns of the reference that top-k retrieval reads.

    Attributes:
      k: How many nearest labels count.
      label: The column with the right answer.
      group: A column whose groups are centred first, such as the style; "" for none.
      rows: The reference row of each generated picture, int [n].
    """

    k: int
    label: str
    group: str
    rows: np.ndarray


class PairMeasure:
    """PSNR, SSIM and LPIPS between pictures and their originals."""

    def __init__(
        self, originals: Pictures, lpips: tuple[Any, Any] | None = None, batch: int = 16
    ) -> None:
        self._originals, self._batch = originals, batch
        self.lpips_name = ""
        if lpips is not None:
            module, self._params = lpips
            approximate = module.preprocess != "torchvision"
            self.lpips_name = "LPIPS (Caffe VGG-16, approximate)" if approximate else "LPIPS"
            self._run = jax.jit(lambda params, a, b: module.apply({"params": params}, a, b))

    def __call__(self, images: Images, start: int) -> dict[str, np.ndarray]:
        """Each measure [n] of the pictures from ``start`` on."""
        made = np.asarray(images)
        originals = np.asarray(self._originals.read(start, start + len(made)))
        found = {"psnr": metrics.psnr(made, originals), "ssim": metrics.ssim(made, originals)}
        if not self.lpips_name:
            return found
        distances = []
        for i in range(0, len(made), self._batch):
            a, b = (x[i : i + self._batch] for x in (made, originals))
            shape = (self._batch, *made.shape[1:])
            scaled = (np.resize(x, shape) / np.float32(127.5) - 1 for x in (a, b))
            distances.append(np.asarray(self._run(self._params, *scaled))[: len(a)])
        return found | {"lpips": np.concatenate(distances)}


# ------------------------------------------------------------------------------- the metrics


@dataclasses.dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`.

    Attributes:
      compute: (inputs) -> figure by name.
      missing: (inputs) -> what it lacks, "" if nothing; called before any picture is read.
    """

    compute: Callable[[Inputs], dict[str, Any]]
    missing: Callable[[Inputs], str]


def _needs_features(inputs: Inputs) -> str:
    return "" if inputs.extractor.layers else "other --features than none"


def _needs_reference(inputs: Inputs) -> str:
    if lack := _needs_features(inputs):
        return lack
    return "" if inputs.reference or inputs.statistics else "a --reference"


def _needs_pictures(inputs: Inputs) -> str:
    if lack := _needs_features(inputs):
        return lack
    return "" if inputs.reference else "a --reference of pictures, not statistics alone"


def _needs_spatial(inputs: Inputs) -> str:
    if "spatial" not in inputs.extractor.layers:
        return "InceptionV3's features"
    stored = inputs.statistics is not None and inputs.statistics.spatial is not None
    return (
        "" if stored or inputs.reference else "a --reference of pictures or with mu_s and sigma_s"
    )


def _needs_logits(inputs: Inputs) -> str:
    return "" if "logits_unbiased" in inputs.extractor.layers else "InceptionV3's features"


def _needs_clip(inputs: Inputs) -> str:
    return "" if inputs.clip else "--clip"


def _needs_prompts(inputs: Inputs) -> str:
    return _needs_clip(inputs) or ("" if inputs.prompts else "prompts")


def _needs_pairs(inputs: Inputs) -> str:
    return "" if inputs.pairs else "--reconstruct"


def _frechet(inputs: Inputs) -> dict[str, Any]:
    s = inputs.statistics
    stored = None if s is None else (s.mu, s.sigma)
    name = f"{inputs.prefix}{inputs.extractor.frechet}"
    return {name: inputs.frechet(inputs.extractor.layer, stored)}


def _spatial(inputs: Inputs) -> dict[str, Any]:
    stored = None if inputs.statistics is None else inputs.statistics.spatial
    return {f"{inputs.prefix}sFID": inputs.frechet("spatial", stored)}


def _kernel(inputs: Inputs) -> dict[str, Any]:
    generated, real = inputs.features()
    preset = inputs.preset
    size = min(preset.subset_size, len(generated), len(real))
    spread = metrics.kernel_distance(
        generated, real, subsets=preset.subsets, subset_size=size, seed=preset.kid_seed
    )
    return {f"{inputs.prefix}{inputs.extractor.kernel}": spread._asdict()}


def _inception_score(inputs: Inputs) -> dict[str, Any]:
    logits, preset = inputs.generated["features/logits_unbiased"], inputs.preset
    splits = max(len(logits) // preset.split_size, 1) if preset.split_size else preset.splits
    splits = min(splits, len(logits))
    score = metrics.inception_score(logits, splits=splits, shuffle_seed=preset.shuffle_seed)
    return {"Inception Score": score._asdict()}


def _precision_recall(inputs: Inputs) -> dict[str, Any]:
    generated, real = inputs.features()
    precision, recall = metrics.precision_recall(real, generated, inputs.preset.neighbours)
    return {"precision": precision, "recall": recall}


def _density_coverage(inputs: Inputs) -> dict[str, Any]:
    generated, real = inputs.features()
    k = inputs.preset.coverage_neighbours
    density, coverage = metrics.density_coverage(real, generated, k)
    return {"density": density, "coverage": coverage}


def _clip_score(inputs: Inputs) -> dict[str, Any]:
    assert inputs.clip is not None
    assert inputs.prompts is not None
    texts = inputs.clip.texts(inputs.prompts)
    return {"CLIP score": metrics.clip_score(inputs.generated["clip/image"], texts)}


def _cmmd(inputs: Inputs) -> dict[str, Any]:
    return {"CMMD": metrics.cmmd(*inputs.features("clip/image"))}


def _retrieval(inputs: Inputs) -> dict[str, Any]:
    labels, rows = inputs.labels, getattr(inputs.reference, "rows", [])
    assert labels is not None

    def column(name: str) -> np.ndarray:
        return np.array([str(row.get(name)) for row in rows])

    generated, real = inputs.features()
    answers = column(labels.label)
    groups = None
    if labels.group:
        theirs = column(labels.group)
        groups = (theirs[labels.rows], theirs)
    share = metrics.retrieval(
        generated,
        answers[labels.rows],
        real,
        answers,
        labels.k,
        own=labels.rows,
        groups=groups,
    )
    name = f"top-{labels.k} {labels.label} ({inputs.extractor.name})"
    return {name: share}


def _pair(key: str, name: Callable[[PairMeasure], str]) -> Callable[[Inputs], dict[str, Any]]:
    def compute(inputs: Inputs) -> dict[str, Any]:
        assert inputs.pairs is not None
        return {name(inputs.pairs): float(np.mean(inputs.generated[f"pairs/{key}"]))}

    return compute


METRICS = {
    "fd": Metric(_frechet, _needs_reference),
    "sfid": Metric(_spatial, _needs_spatial),
    "kd": Metric(_kernel, _needs_pictures),
    "is": Metric(_inception_score, _needs_logits),
    "pr": Metric(_precision_recall, _needs_pictures),
    "dc": Metric(_density_coverage, _needs_pictures),
    "clip_score": Metric(_clip_score, _needs_prompts),
    "cmmd": Metric(_cmmd, lambda inputs: _needs_clip(inputs) or _needs_pictures(inputs)),
    "top_k": Metric(
        _retrieval, lambda inputs: _needs_features(inputs) or ("" if inputs.labels else "--top_k")
    ),
    "psnr": Metric(_pair("psnr", lambda _: "PSNR"), _needs_pairs),
    "ssim": Metric(_pair("ssim", lambda _: "SSIM"), _needs_pairs),
    "lpips": Metric(
        _pair("lpips", lambda pairs: pairs.lpips_name),
        lambda inputs: "" if inputs.pairs and inputs.pairs.lpips_name else "--reconstruct, --lpips",
    ),
}
# FID and KID are what the two distances are called with InceptionV3's features alone.
_INCEPTION_NAMES = {"fid": "fd", "kid": "kd"}


def choose_metrics(names: Sequence[str] | None, inputs: Inputs) -> list[str]:
    """The metrics to compute: those of ``names``, or all that lack nothing."""
    if names is None:
        return [name for name, metric in METRICS.items() if not metric.missing(inputs)]
    chosen = []
    for name in names:
        key = _INCEPTION_NAMES.get(name, name)
        if key not in METRICS:
            known = [*METRICS, *_INCEPTION_NAMES]
            raise EvaluationError(f"metric {name!r} does not exist{did_you_mean(name, known)}")
        if key != name and inputs.extractor.frechet != "FID":
            raise EvaluationError(
                f"{name} is defined by InceptionV3's pool features: give --inception, or ask for "
                f"{key}"
            )
        if lack := METRICS[key].missing(inputs):
            raise EvaluationError(f"metric {name!r} needs {lack}")
        chosen.append(key)
    return chosen


# ------------------------------------------------------------------------------- evaluation


def evaluate(
    subject: Any,
    reference: Any = None,
    *,
    metrics: Sequence[str] | None = None,
    features: str = "inception",
    weights: str | Path | None = None,
    protocol: str = "torch-fidelity",
    resizer: str | None = None,
    layer: str | None = None,
    num: int | None = None,
    size: Sequence[int] | None = None,
    crop: str = "center",
    data: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch: int = 64,
    caption: str = "{text}",
    prompts: Sequence[str] | None = None,
    classes: Sequence[Any] | None = None,
    column: str | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    reconstruct: bool = False,
    lpips: tuple[str | Path | None, str | Path | None] | None = None,
    clip: str | Path | None = None,
    top_k: int | None = None,
    label: str = "",
    group: str = "",
    save_statistics: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Evaluates a model or pictures, with a protocol that says what the figures depend on.

    Args:
      subject: A model (name, folder or checkpoint, or a `Pipeline`), a folder or archive of
        pictures, an .npz with ``arr_0``, or an array uint8 [n, h, w, 3].
      reference: Pictures as for ``subject``, or statistics (.npz, .pt); an .npz with both, as
        ADM's, gives FID its statistics and the others its pictures.
      metrics: Names in `METRICS`; None computes all that are possible.
      features: The network whose features are compared, a name in `EXTRACTORS`.
      weights: Its weights file.
      protocol: A name in `PRESETS`: the code whose figures to reproduce.
      resizer: Replaces the preset's resizer.
      layer: Replaces the network's usual layer.
      num: Number of pictures to sample, or of the subject's pictures to use.
      size: (height, width) that pictures are cropped and resized to; None leaves them.
      crop: "center" or "none", with ``size``.
      data: Further settings of `make_source` for the reference: source, part, where ...
      seed: Seed of the first sample; sample i has ``seed`` + i.
      batch: Pictures at a time.
      caption: Template of the prompt that a reference row gives.
      prompts: Prompts, repeated from the first after the last, in place of captions.
      classes: Classes, likewise.
      column: The column of the reference that holds the model's condition, where it is no text.
      settings: Fields of the sampling request: steps, sampler, guidance, eta ...
      dtype: What the model computes in.
      reconstruct: Evaluate the model's first stage on the reference's pictures.
      lpips: (VGG-16 weights, LPIPS heads) for LPIPS; None leaves it out.
      clip: Folder of a CLIP model, for the CLIP score and CMMD.
      top_k: k of the top-k retrieval accuracy, with ``label`` and ``group``.
      label: The reference's column that is to be retrieved.
      group: A column whose groups are centred first.
      save_statistics: Where the statistics of the subject are written.
      out: Folder for the features, so that a stopped run resumes, and for ``result.json``.
      progress: Show progress bars.
    """
    if protocol not in PRESETS:
        raise EvaluationError(
            f"protocol {protocol!r} does not exist{did_you_mean(protocol, PRESETS)}"
        )
    if batch < 1 or (num is not None and num < 1):
        raise EvaluationError(f"batch and num must be at least 1, not {batch} and {num}")
    preset = PRESETS[protocol]
    resizer = resizer or (preset.resizer if features == "inception" else None)
    extractor = load_extractor(features, weights=weights, resizer=resizer, layer=layer)
    preset = dataclasses.replace(preset, resizer=extractor.resizer)
    pixels = first_stage_pixels(subject) if reconstruct else PixelFormat()
    if not pixels.is_plain and (extractor.layers or lpips is not None or clip is not None):
        raise EvaluationError(
            f"this first stage is of pictures of {pixels.channels} channels that are no 8-bit RGB, "
            "and features and LPIPS are of RGB: give --features none, without --lpips and --clip"
        )
    if save_statistics is not None and not extractor.layers:
        raise EvaluationError("statistics are of features: give other --features than none")
    statistics, known = open_reference(reference, size=size, crop=crop, data=data, pixels=pixels)
    if statistics is not None:
        _check_statistics(statistics, extractor, str(reference))

    name = subject if isinstance(subject, str | Path) else getattr(subject, "name", "array")
    sampling: dict[str, Any] | None = None
    rows: np.ndarray | None = None
    pairs = None
    if reconstruct:
        if known is None:
            raise EvaluationError("--reconstruct needs pictures: give them as --reference")
        known = _first(known, num)
        heads = None
        if lpips is not None:
            vgg, linear = (file and local_copy(file) for file in lpips)
            heads = load_lpips(vgg, linear)
        pictures: Pictures = Reconstructions(load_first_stage(subject), known)
        pairs = PairMeasure(known, heads)
    elif is_model(subject):
        pipe = _load_pipeline(subject, dtype)
        count = num or (known.count if known is not None else 0)
        if not count:
            raise EvaluationError("give --num, how many pictures to sample")
        conditions, rows = _conditions(pipe, known, count, seed, prompts, classes, column, caption)
        pictures = SampledPictures(
            pipe, count, seed=seed, conditions=conditions, batch=batch, settings=settings
        )
        sampling = _sampling_protocol(pipe, seed, settings or {}, conditions)
    else:
        pictures = _first(open_pictures(subject, size=size, crop=crop), num)
        sampling = _recorded_sampling(subject)

    if prompts is None:
        prompts = getattr(pictures, "prompts", None)
    if prompts is not None:
        prompts = [prompts[i % len(prompts)] for i in range(pictures.count)]
    labels = None
    if top_k is not None:
        if not isinstance(known, SourcePictures) or rows is None or not label:
            raise EvaluationError(
                "--top_k needs --label, a model, and a --reference whose rows it samples from"
            )
        labels = Labels(top_k, label, group, rows)
    inputs = Inputs(
        extractor,
        preset,
        statistics,
        known,
        clip=None if clip is None else load_clip(clip),
        prompts=prompts,
        pairs=pairs,
        labels=labels,
        prefix="r" if reconstruct else "",
    )
    chosen = choose_metrics(metrics, inputs)
    if not chosen and save_statistics is None:
        raise EvaluationError("nothing to compute: give a --reference, or --save_stats")

    folder = None if out is None else local_only(out, "the parts of an evaluation")
    identity = {
        "subject": str(name),
        "features": extractor.protocol(),
        "pictures": pictures.protocol,
        "sampling": sampling,
        "clip": None if inputs.clip is None else inputs.clip.images.weights,
    }
    measures: dict[str, Any] = {"features": extractor}
    if inputs.clip is not None:
        measures["clip"] = inputs.clip.images
    inputs.generated = collect(
        pictures,
        measures | ({"pairs": pairs} if pairs else {}),
        batch=batch,
        folder=folder and folder / "subject",
        identity=identity,
        title=Path(str(name)).name,
        progress=progress,
    )
    if known is not None and chosen:
        inputs.real = collect(
            known,
            measures,
            batch=batch,
            folder=folder and folder / "reference",
            identity=identity | {"subject": str(reference), "pictures": known.protocol},
            title="reference",
            progress=progress,
        )
    figures: dict[str, Any] = {}
    for key in chosen:
        figures |= METRICS[key].compute(inputs)

    result = Result(
        str(name),
        figures,
        {
            "features": extractor.protocol(),
            "clip": None if inputs.clip is None else inputs.clip.images.protocol(),
            "preset": dataclasses.asdict(preset),
            "pictures": _pictures_protocol(pictures, inputs.generated),
            "sampling": sampling,
            "reference": _reference_protocol(statistics, known, inputs.real),
            "retrieval": labels and {"k": top_k, "label": label, "group": group},
        },
        {"pixels": inputs.generated.pixels_hash()},
    )
    own = _statistics(inputs, result) if save_statistics else None
    if jax.process_index() == 0:
        if own is not None and save_statistics is not None:
            write_statistics(save_statistics, own)
        if folder is not None:
            write_atomic(folder / "result.json", result.to_json())
    return result


def _pictures_protocol(pictures: Pictures, collected: Collected) -> dict[str, Any]:
    return pictures.protocol | {"count": pictures.count, "size": collected.sizes()}


def _reference_protocol(
    statistics: Statistics | None, known: Pictures | None, collected: Collected | None
) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    if statistics is not None:
        recorded = (statistics.protocol or {}).get("pictures")
        digest = hashlib.sha256(statistics.mu.tobytes() + statistics.sigma.tobytes()).hexdigest()
        found = recorded or {"statistics": digest}
    if known is not None and collected is not None:
        pixels = {"pixels": collected.pixels_hash(), **_pictures_protocol(known, collected)}
        found = pixels if statistics is None else found | {"pictures": pixels}
    return found or None


def _statistics(inputs: Inputs, result: Result) -> Statistics:
    layer, generated = inputs.extractor.layer, inputs.generated
    moments = generated.moments(f"features/{layer}")
    spatial = None
    if "features/spatial" in generated:
        own = generated.moments("features/spatial")
        spatial = (own.mean, own.covariance)
    pictures = result.protocol["pictures"] | result.details
    recorded = {"features": result.protocol["features"], "pictures": pictures}
    return Statistics(moments.mean, moments.covariance, spatial, recorded)


def _check_statistics(statistics: Statistics, extractor: Extractor, path: str) -> None:
    """Refuses statistics of other features; warns where the file does not say which they are."""
    own = extractor.protocol()
    if statistics.protocol is None:
        LOG.warning(
            "%s does not record its protocol: make sure that it is %s with the resizer %s",
            path,
            extractor.name,
            extractor.resizer,
        )
    elif found := differences(statistics.protocol.get("features", {}), own):
        raise EvaluationError(
            f"{path} was made with other features: {'; '.join(found)}; use the same, or make the "
            "statistics again from the pictures"
        )


# ------------------------------------------------------------------------------- opening things


def is_model(subject: Any) -> bool:
    """Whether a subject is a model, not pictures."""
    if not isinstance(subject, str | Path):
        return not isinstance(subject, np.ndarray)
    path = local_copy(subject)
    if path.is_dir():
        return (path / "config.json").is_file() or (path / "model_index.json").is_file()
    if not path.exists():
        return True  # a shipped model, one of the Hub, or an error of `ldm_jax.load`
    return path.suffix in (".ckpt", ".pth", ".pt", ".safetensors", ".bin") and is_foreign(path)


def open_pictures(
    what: Any,
    *,
    size: Sequence[int] | None = None,
    crop: str = "center",
    data: Mapping[str, Any] | None = None,
    pixels: PixelFormat | None = None,
) -> Pictures:
    """A set of pictures from an array, an .npz, a folder of ldm-sample, or a data source."""
    if isinstance(what, np.ndarray):
        if what.dtype != np.uint8 or what.ndim != 4 or what.shape[3] != 3:
            raise EvaluationError(
                f"pictures are uint8 [n, h, w, 3], not {what.dtype} {list(what.shape)}"
            )
        return ArrayPictures(what)
    path = local_copy(what)
    if path.is_dir() and (path / "pictures.npz").is_file():
        path = path / "pictures.npz"
    if path.suffix == ".npz" and not data:
        if is_statistics(path) and not _has_pictures(path):
            raise EvaluationError(f"{path} holds statistics: pictures are needed here")
        if size is not None:
            raise EvaluationError(f"{path} has a fixed size: leave --size out")
        return NpzPictures(path)
    source = make_source(
        {"path": str(path if is_bucket(what) else what), "part": "all", **(data or {})}
    )
    return SourcePictures(source, size=size, crop=crop, pixels=pixels)


def open_reference(
    reference: Any,
    *,
    size: Sequence[int] | None = None,
    crop: str = "center",
    data: Mapping[str, Any] | None = None,
    pixels: PixelFormat | None = None,
) -> tuple[Statistics | None, Pictures | None]:
    """(statistics, pictures) of a reference; either is None where it has none."""
    if reference is None:
        return None, None
    if isinstance(reference, str | Path) and is_bucket(reference):
        reference = local_copy(reference)
    if isinstance(reference, str | Path) and Path(reference).is_file():
        path = Path(reference)
        if is_statistics(path):
            pictures = NpzPictures(path) if _has_pictures(path) else None
            return read_statistics(path), pictures
    return None, open_pictures(reference, size=size, crop=crop, data=data, pixels=pixels)


def _has_pictures(path: Path) -> bool:
    if path.suffix != ".npz":
        return False
    with np.load(path, allow_pickle=False) as file:
        return "arr_0" in file.files


def _first(pictures: Pictures, num: int | None) -> Pictures:
    """The first ``num`` pictures of a set."""
    if num is not None:
        if num > pictures.count:
            raise EvaluationError(f"there are {pictures.count} pictures, not {num}: lower --num")
        pictures.count = num
    return pictures


def _recorded_sampling(subject: Any) -> dict[str, Any] | None:
    """The settings that `ldm-sample --format npz` writes beside its pictures."""
    if isinstance(subject, str | Path):
        path = local_copy(subject)
        note = (path if path.is_dir() else path.parent) / "run.json"
        if note.is_file():
            try:
                recorded = json.loads(note.read_text())
            except ValueError:
                raise EvaluationError(f"{note} is damaged: remove it or sample again") from None
            return {k: v for k, v in recorded.items() if k not in ("model", "num", "format")}
    return None


def _load_pipeline(subject: Any, dtype: str | None) -> Any:
    if not isinstance(subject, str | Path):
        return subject
    return load_pipeline(str(subject), dtype=dtype)


def first_stage_pixels(subject: Any) -> PixelFormat:
    """The format of the pictures of a model directory's first stage; 8-bit RGB of other models."""
    if not isinstance(subject, str | Path):
        return PixelFormat()
    path = find_model(subject)
    return PixelFormat() if is_foreign(path) else model_pixels(read_config(path))


def load_first_stage(subject: Any) -> Any:
    """The `FirstStage` of a pipeline, of a model directory or of a checkpoint."""
    if not isinstance(subject, str | Path):
        return subject.model.first_stage
    path = find_model(subject)
    if is_foreign(path):
        converted = read_model(path)
        config, params = converted.config, converted.params
    else:
        config, params = load_model(path)
    if "first_stage" not in params:
        raise EvaluationError(f"{path} has no first stage to reconstruct with")
    module = build_first_stage(config)
    return FirstStage(params["first_stage"], config.get("scale_factor", 1.0), module)


def _conditions(
    pipe: Any,
    known: Pictures | None,
    count: int,
    seed: int,
    prompts: Sequence[str] | None,
    classes: Sequence[Any] | None,
    column: str | None,
    caption: str,
) -> tuple[dict[str, list[Any]], np.ndarray | None]:
    """(fields of the request, the reference row of each sample) of ``count`` samples."""
    field = getattr(pipe.model.conditioner, "field", None)
    if prompts is not None:
        return {"prompts": list(prompts)}, None
    if classes is not None:
        return {"classes": list(classes)}, None
    if field is None:
        return {}, None
    if not isinstance(known, SourcePictures):
        raise EvaluationError(
            f"this model takes {field}: give --prompts_file or --classes, or a --reference of "
            "data whose rows have them"
        )
    # In random order, so that a part of the reference stands for all of it.
    order = np.random.default_rng(seed).permutation(known.count)
    rows = order[np.arange(count) % len(order)]
    if field == "prompts":
        captions = known.captions(caption)
        return {field: [captions[i] for i in rows]}, rows
    if column is None:
        raise EvaluationError(
            f"this model takes {field}: name the reference's column with --condition_column"
        )
    table = known.rows
    if missing := [i for i in rows if column not in table[i]]:
        raise EvaluationError(
            f"--condition_column {column}: row {missing[0]} has none; it has "
            f"{', '.join(table[missing[0]])}"
        )
    return {field: [table[i][column] for i in rows]}, rows


def _sampling_protocol(
    pipe: Any, seed: int, settings: Mapping[str, Any], conditions: Mapping[str, Any]
) -> dict[str, Any]:
    chosen = pipe.settings(**{k: v for k, v in settings.items() if v is not None})
    text = json.dumps(conditions, sort_keys=True, default=str)
    return {
        **{name: getattr(chosen, name) for name in _SAMPLING_FIELDS},
        **{name: value for name in _RARE_FIELDS if (value := getattr(chosen, name)) is not None},
        "seed": seed,
        "dtype": pipe.dtype,
        "conditions": hashlib.sha256(text.encode()).hexdigest(),
    }


# Settings that enter the protocol only where they are set.
_RARE_FIELDS = ("sampler_options", "noise_dropout", "renoise_null")
_SAMPLING_FIELDS = (
    *("sampler", "steps", "grid", "eta", "temperature"),
    *("guidance", "guidance_rescale", "guidance_interval"),
    *("size", "tile", "cache_interval", "cache_depth"),
)
