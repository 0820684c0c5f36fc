"""Times the first picture of a new process, and a queue under the requests of several callers.

    python -m benchmarks.serving [--model emoji] [--steps 20] [--batch 8] [--callers 8]

The first part starts two processes with one folder of programs: the first compiles, the second
loads. The second part compares one request at a time with a queue that batches them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

FIRST = """
import json, sys, time
began = time.perf_counter()
import jax
import ldm_jax
traced = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, took, **_: traced.append(event) if "jaxpr_trace" in event else None)
ldm_jax.use_cores()
model, folder, steps = sys.argv[1:]
pipe = ldm_jax.load(model, programs=folder)
loaded = time.perf_counter()
pipe(["red apple, noto style"], steps=int(steps))
done = time.perf_counter()
pipe(["red apple, noto style"], steps=int(steps))
print(json.dumps({"load": loaded - began, "first picture": done - loaded,
                  "second picture": time.perf_counter() - done, "traced": len(traced)}))
"""


def first_pictures(model: str, steps: int) -> list[dict[str, float]]:
    """Seconds of a process that compiles and of one that finds its program."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST, model, folder, str(steps)]
        runs = [subprocess.run(command, check=True, capture_output=True) for _ in range(2)]
    return [json.loads(run.stdout) for run in runs]


def queue(model: str, steps: int, batch: int, callers: int, each: int) -> dict[str, float]:
    """Pictures a second and seconds a picture, one by one and batched."""
    import ldm_jax

    ldm_jax.use_cores()
    pipe = ldm_jax.load(model)
    request = ldm_jax.Request(prompts="red apple, noto style", steps=steps)
    for count in (1, batch):
        pipe.warmup("red apple, noto style", steps=steps, batch=count)
        list(pipe.batches(ldm_jax.Request(prompts="", steps=steps, batch=count)))
    began = time.perf_counter()
    for _ in range(each * 2):
        list(pipe.batches(request))
    alone = (time.perf_counter() - began) / (each * 2)
    waited: list[float] = []

    def call(server: Any) -> None:
        for _ in range(each):
            start = time.perf_counter()
            server.submit(request).result()
            waited.append(time.perf_counter() - start)

    with ldm_jax.serve(pipe, batch=batch) as server:
        threads = [threading.Thread(target=call, args=(server,)) for _ in range(callers)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - began
    return {
        "one by one, pictures/s": 1 / alone,
        "queue, pictures/s": callers * each / took,
        "one picture alone, s": alone,
        "queue, median s": float(np.median(waited)),
        "queue, 95th percentile s": float(np.quantile(waited, 0.95)),
    }


def main() -> None:
    """Prints both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--each", type=int, default=3, help="requests of each caller")
    args = parser.parse_args()
    for name, run in zip(
        ("compiles", "loads"), first_pictures(args.model, args.steps), strict=True
    ):
        print(name, {key: round(value, 2) for key, value in run.items()})
    found = queue(args.model, args.steps, args.batch, args.callers, args.each)
    print({key: round(value, 3) for key, value in found.items()})


if __name__ == "__main__":
    main()
