"""The errors a user can cause and fix. Each message is one line that says what to change."""

import difflib
from collections.abc import Iterable


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
    """Weights whose names or shapes do not match the table of the network they are converted to.

    Attributes:
      missing: Names that the table has and the file lacks.
      unexpected: Names that the file has and the table lacks.
      duplicate: Names that occur more than once.
      misshapen: (name, shape found, shape expected).
      different: Names of constants and duplicates whose values are not what they must be.
    """

    def __init__(
        self,
        where: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        duplicate: Iterable[str] = (),
        misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
        different: Iterable[str] = (),
    ):
        self.missing, self.unexpected = sorted(missing), sorted(unexpected)
        self.duplicate, self.different = sorted(duplicate), sorted(different)
        self.misshapen = sorted(misshapen)
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "duplicate": self.duplicate,
            "misshapen": [
                f"{n}: found {found}, expected {want}" for n, found, want in self.misshapen
            ],
            "different": self.different,
        }
        lines = [f"{where}: the names and shapes do not fit"]
        for kind, names in lists.items():
            if names:
                lines += [f"  {kind} ({len(names)}):", *(f"    {name}" for name in names)]
        super().__init__("\n".join(lines))

    @classmethod
    def check(cls, where: str, **lists: Iterable) -> None:
        """Raises ConversionError when any of the lists is not empty."""
        problem = cls(where, **lists)
        if any(
            (
                problem.missing,
                problem.unexpected,
                problem.duplicate,
                problem.misshapen,
                problem.different,
            )
        ):
            raise problem


class PlanError(LdmJaxError, ValueError):
    """A plan that cannot be made: an unknown topology, or a missing compiler."""


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
