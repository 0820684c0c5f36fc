"""The errors a user can cause and fix. Each message is one line that says what to change."""

import difflib
from collections.abc import Iterable
from typing import Any


class LdmJaxError(Exception):
    """Base of every expected error.

    The console commands print its message as one line and exit with status 2; any other exception
    is a bug and shows its traceback.
    """


class ConfigError(LdmJaxError, ValueError):
    """A training or model config that cannot be built."""


class RequestError(LdmJaxError, ValueError):
    """A sampling request that the model cannot fulfil."""


class CheckpointError(LdmJaxError, ValueError):
    """A model directory or a training checkpoint that is missing, damaged or of another kind."""


class DataError(LdmJaxError, ValueError):
    """A data set, or a row of one, that cannot be used."""


class UnreadablePicture(LdmJaxError, ValueError):
    """A picture that cannot be decoded. Training names and skips it."""


class MeshError(LdmJaxError, ValueError):
    """A device mesh, or a set of processes, that cannot be formed."""


class ReaderError(LdmJaxError, ValueError):
    """A checkpoint file that cannot be read, or that is not safe to read."""


class TargetError(LdmJaxError, ValueError):
    """An original model config that has no counterpart here."""


class ConversionError(LdmJaxError, ValueError):
    """Weights that do not match the table of the network they are converted to.

    Attributes:
      missing: Names that the table has and the file lacks.
      unexpected: Names that the file has and the table lacks.
      duplicate: Names that occur more than once.
      misshapen: (name, shape found, shape expected).
      different: Names of constants and duplicates whose values are not what they must be.
      not_finite: Names of weights that hold NaN or infinity.
    """

    _KINDS = ("missing", "unexpected", "duplicate", "misshapen", "different", "not_finite")

    def __init__(self, where: str, **lists: Iterable[Any]):
        for kind in self._KINDS:
            setattr(self, kind, sorted(lists.get(kind, ())))
        self.misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
        head = "the names and shapes do not fit"
        if self.any() == ["not_finite"]:
            head = "its weights hold NaN or infinity, so the model makes no pictures"
        lines = [f"{where}: {head}"]
        for kind in self.any():
            names = getattr(self, kind)
            if kind == "misshapen":
                names = [f"{name}: found {found}, expected {want}" for name, found, want in names]
            lines += [f"  {kind.replace('_', ' ')} ({len(names)}):", *(f"    {n}" for n in names)]
        super().__init__("\n".join(lines))

    def any(self) -> list[str]:
        """The kinds of mismatch that were found."""
        return [kind for kind in self._KINDS if getattr(self, kind)]

    @classmethod
    def check(cls, where: str, **lists: Iterable[Any]) -> None:
        """Raises ConversionError when any of the lists is not empty."""
        problem = cls(where, **lists)
        if problem.any():
            raise problem


class PlanError(LdmJaxError, ValueError):
    """A plan that cannot be made: an unknown topology, or a missing compiler."""


class EvaluationError(LdmJaxError, ValueError):
    """An evaluation that cannot be made: sets that do not fit, or statistics of another kind."""


class ResourceError(LdmJaxError, RuntimeError):
    """A disk that is full, or memory that does not suffice."""


class StorageError(LdmJaxError, OSError):
    """A path that cannot be used: a bucket without rights, or a kind of storage that is not known.

    An OSError, so that code which reads optional files treats it as one.
    """


class TrainingDiverged(LdmJaxError, RuntimeError):
    """Training that cannot improve any more.

    Attributes:
      reason: What went wrong, without the advice that the message adds.
    """

    def __init__(self, reason: str, advice: str):
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


class TrainingStopped(LdmJaxError, RuntimeError):
    """Training that was asked to stop (SIGTERM) and has saved its state."""


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Returns the end of an error message about an unknown name.

    Args:
      name: The unknown name.
      known: The names that exist.

    Returns:
      "; did you mean 'x'?" where one known name is close, else " (known: a, b, c)".
    """
    names = [str(each) for each in known]
    close = difflib.get_close_matches(str(name), names, 1)
    return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(names)})"
