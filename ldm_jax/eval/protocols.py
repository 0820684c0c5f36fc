"""What a figure depends on: presets of the common codes, fingerprints, statistics files."""

import dataclasses
import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.errors import EvaluationError, ReaderError
from ldm_jax.io.atomic import atomic_path
from ldm_jax.io.paths import as_path, local_copy


@dataclasses.dataclass(frozen=True)
class Preset:
    """How one of the common codes computes its figures.

    Attributes:
      resizer: Of InceptionV3's input, see `ldm_jax.eval.resize`.
      splits: Parts of the Inception Score.
      split_size: Pictures in a part, which takes the place of ``splits``.
      shuffle_seed: Seed of the Inception Score's permutation; None keeps the order.
      subsets: Subsets of KID.
      subset_size: Pictures in each.
      kid_seed: Seed of the subsets.
      neighbours: k of precision and recall.
      coverage_neighbours: k of density and coverage.
    """

    resizer: str
    splits: int = 10
    split_size: int | None = None
    shuffle_seed: int | None = 2020
    subsets: int = 100
    subset_size: int = 1000
    kid_seed: int = 2020
    neighbours: int = 3
    coverage_neighbours: int = 5


PRESETS = {
    "torch-fidelity": Preset("tf1_bilinear"),
    "pytorch-fid": Preset("torch_bilinear"),
    "clean-fid": Preset("pil_bicubic"),
    "adm": Preset("tf1_bilinear", split_size=5000, shuffle_seed=None),
}

# ------------------------------------------------------------------------------- fingerprints


def fingerprint(protocol: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that are equal for equal protocols."""
    text = json.dumps(protocol, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> list[str]:
    """One line for each entry that differs between two protocols."""
    lines = []
    for key in sorted({*a, *b}):
        x, y, name = a.get(key), b.get(key), f"{path}{key}"
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            lines += differences(x, y, f"{name}.")
        elif x != y:
            lines.append(f"{name}: {_short(x)} and {_short(y)}")
    return lines


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:12] if len(text) == 64 else text  # a hash


@dataclasses.dataclass
class Result:
    """Figures of one subject, and the protocol that they hold for.

    Attributes:
      subject: What was evaluated.
      metrics: Figure by name; where it has a spread, ``{"mean", "std"}``.
      protocol: All that the figures depend on, but for the subject.
      details: What identifies the subject: hashes of its pictures and model.
    """

    subject: str
    metrics: dict[str, Any]
    protocol: dict[str, Any]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """See `fingerprint`."""
        return fingerprint(self.protocol)

    def to_json(self) -> str:
        """The result as it is written to ``result.json``."""
        fields = dataclasses.asdict(self) | {"fingerprint": self.fingerprint}
        return json.dumps(fields, indent=1, default=str) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> "Result":
        """Reads a ``result.json``, or the one of an output folder."""
        file = local_copy(path)
        file = file / "result.json" if file.is_dir() else file
        try:
            fields = json.loads(file.read_text())
            fields.pop("fingerprint")
            result = cls(**fields)
            assert isinstance(result.metrics, dict)
            assert isinstance(result.protocol, dict)
            return result
        except OSError as error:
            raise EvaluationError(f"{file} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
            raise EvaluationError(f"{file} is no result of ldm-eval") from None


def table(results: Sequence[Result]) -> tuple[str, list[str]]:
    """Results as one table, a column for each.

    Returns:
      The table, and a warning for each protocol that differs from the first: figures of different
      protocols cannot be compared.
    """
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    columns = [["", *names, "fingerprint"]]
    for result in results:
        cells = [_cell(result.metrics.get(name)) for name in names]
        columns.append([Path(result.subject).name, *cells, result.fingerprint])
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    warnings = []
    for result in results[1:]:
        if found := differences(results[0].protocol, result.protocol):
            warnings.append(
                f"{result.subject} and {results[0].subject} cannot be compared, their protocols "
                f"differ: {'; '.join(found)}"
            )
    return "\n".join(lines), warnings


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return f"{value['mean']:.7g} ± {value['std']:.3g}"
    return f"{value:.7g}" if isinstance(value, int | float) else str(value)


# ------------------------------------------------------------------------------- statistics files


@dataclasses.dataclass
class Statistics:
    """Mean and covariance of a set's features.

    Attributes:
      mu: float64 [d].
      sigma: float64 [d, d].
      spatial: The same two of the spatial features that sFID compares, if known.
      protocol: The protocol that the file records; None in files of other programs.
    """

    mu: np.ndarray
    sigma: np.ndarray
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    protocol: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        pairs = [(self.mu, self.sigma), *([self.spatial] if self.spatial else [])]
        for mu, sigma in pairs:
            if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
                raise EvaluationError(
                    f"statistics have the shapes {mu.shape} and {sigma.shape}, not [d] and [d, d]"
                )
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise EvaluationError("statistics hold values that are not finite")


def is_statistics(path: Path) -> bool:
    """Whether a file holds mu and sigma."""
    if path.suffix == ".pt":
        return True
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())


def read_statistics(path: str | Path) -> Statistics:
    """Reads statistics: .npz of pytorch-fid, ADM or `write_statistics`, .pt of torch-fidelity."""
    path = local_copy(path)
    if path.suffix == ".pt":
        try:
            with open_checkpoint(path) as checkpoint:
                arrays = {k: np.asarray(v) for k, v in checkpoint.tree.items() if k in _KEYS}
        except (ReaderError, AttributeError) as error:
            raise EvaluationError(f"{path} holds no statistics: {error}") from None
    else:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in (*_KEYS, "protocol") if key in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise EvaluationError(f"{path} holds no statistics: {error}") from None
    if not {"mu", "sigma"} <= arrays.keys():
        raise EvaluationError(f"{path} holds no statistics: it has no mu and sigma")
    values = {key: np.asarray(arrays[key], np.float64) for key in _KEYS if key in arrays}
    spatial = (values["mu_s"], values["sigma_s"]) if {"mu_s", "sigma_s"} <= values.keys() else None
    try:
        protocol = json.loads(str(arrays["protocol"])) if "protocol" in arrays else None
        return Statistics(values["mu"], values["sigma"], spatial, protocol)
    except ValueError as error:
        raise EvaluationError(f"{path}: {error}") from None


_KEYS = ("mu", "sigma", "mu_s", "sigma_s")


def write_statistics(path: str | Path, statistics: Statistics) -> None:
    """Writes statistics that the other codes read.

    ``.npz`` has mu and sigma as pytorch-fid, mu_s and sigma_s as ADM, and the protocol as JSON;
    ``.pt`` is torch-fidelity's cache entry, which has no room for the protocol.
    """
    path = as_path(path)
    if path.suffix not in (".npz", ".pt"):
        raise EvaluationError(f"{path}: statistics are written as .npz or .pt")
    with atomic_path(path) as temporary:
        if path.suffix == ".pt":
            # torch-fidelity's mean is float32, its covariance float64.
            _write_torch(
                temporary, {"mu": statistics.mu.astype(np.float32), "sigma": statistics.sigma}
            )
            return
        arrays: dict[str, Any] = {"mu": statistics.mu, "sigma": statistics.sigma}
        if statistics.spatial is not None:
            arrays |= dict(zip(("mu_s", "sigma_s"), statistics.spatial, strict=True))
        if statistics.protocol is not None:
            arrays["protocol"] = json.dumps(statistics.protocol, sort_keys=True)
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)


def _write_torch(path: Path, tree: Any) -> None:
    """Writes plain Python and NumPy objects in the zip form of `torch.save`."""
    buffer = io.BytesIO()
    pickle.dump(tree, buffer, protocol=2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
