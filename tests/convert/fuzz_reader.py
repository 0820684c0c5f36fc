"""Fuzzes the reader: `python tests/convert/fuzz_reader.py [--mutations 3000] [--seed 0]`.

Prints a summary and exits with status 1 at the first crash (anything but ReaderError), executed
code or opened file (seen through Python's audit events), hang over 10 s or 1 GB of memory. The file
that caused it is kept, and its path is printed.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import hostile
import mutations

from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.errors import ReaderError

DATA = Path(__file__).parent / "data"
WATCHED = (
    "os.",
    "subprocess.",
    "socket.",
    "exec",
    "compile",
    "import",
    "ctypes.",
    "shutil.",
    "pty.",
    "open",
)


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--also", type=Path, nargs="*", default=[], help="further checkpoints to mutate"
    )
    args = parser.parse_args()
    good = [
        file.read_bytes()
        for file in [*sorted(DATA.glob("*.ckpt")), *sorted(DATA.glob("*.bin")), *args.also]
    ]
    path = Path(tempfile.mkdtemp()) / "mutant"
    reading, events = False, []

    def audit(event: str, details: tuple) -> None:
        if (
            reading
            and event.startswith(WATCHED)
            and not (event == "open" and str(details[0]) == str(path))
        ):
            events.append((event, details))

    path.write_bytes(hostile.GOOD_ZIP)
    with open_checkpoint(path) as checkpoint:
        checkpoint.tensors["weight"].numpy()  # triggers late imports of numpy
    sys.addaudithook(audit)
    before, slowest, outcomes, reasons = peak_mib(), 0.0, Counter(), Counter()
    for number, data in enumerate(mutations.mutants(args.mutations, args.seed, good)):
        path.write_bytes(data)
        start, problem, reading = time.process_time(), None, True
        try:
            with open_checkpoint(path) as checkpoint:
                for tensor in checkpoint.tensors.values():
                    tensor.numpy()
            outcomes["read"] += 1
        except ReaderError as error:
            outcomes["refused"] += 1
            reasons[" ".join(str(error).split(": ")[-1].split()[:5])] += 1
            if not str(error).isprintable() or len(str(error)) > 600:
                problem = "a message of more than a line"
        except BaseException as error:
            problem = f"crash: {type(error).__name__}: {error}"
        reading = False
        slowest = max(slowest, took := time.process_time() - start)
        if events or took > 10 or peak_mib() - before > 1024:
            problem = f"events {events}, {took:.1f} s, {peak_mib() - before} MiB"
        if problem:
            sys.exit(f"mutation {number} (seed {args.seed}), {path}: {problem}")
    for reason, count in reasons.most_common(25):
        print(f"  {count:6d}  {reason}")
    print(
        f"{args.mutations} mutations: {outcomes['read']} still readable, "
        f"{outcomes['refused']} refused, 0 crashes, 0 hangs (slowest {slowest:.2f} s), "
        f"0 runs of code, peak memory +{peak_mib() - before} MiB"
    )


if __name__ == "__main__":
    main()
