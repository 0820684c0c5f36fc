"""A queue that samples the requests of several callers together.

A batch takes hardly longer than one picture on an accelerator, so pictures that several people wait
for are put into one. Requests share a batch if they share a program and its steps; prompts, seeds,
guidance and pictures are rows of their own.
"""

import dataclasses
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import RequestError
from ldm_jax.sampling.pipeline import Job, Pipeline
from ldm_jax.sampling.request import Request

Part = tuple["_Pending", range]  # some pictures of a request


@dataclasses.dataclass(eq=False)
class _Pending:
    """A request in the queue.

    Attributes:
      job: Its checked arrays; a batch of it has as many pictures as the server's.
      future: What the caller waits for.
      images: Its pictures, uint8 [n, H, W, 3], zeros where they are not finished.
      started: Pictures that are in a batch, finished or not.
      finished: Pictures that are finished.
    """

    job: Job
    future: "Future[np.ndarray]"
    images: np.ndarray
    started: int = 0
    finished: int = 0


class Server:
    """Batches requests on a thread of its own; made by `serve`.

    Every batch has ``batch`` rows, of which those without a picture are computed for nothing. So a
    picture never depends on what else was requested: the same program computes it, and a row of a
    batch depends on itself alone.
    """

    def __init__(self, pipe: Pipeline, *, batch: int = 8, wait: float = 0.02, limit: int = 256):
        """Starts the thread; `serve` explains the arguments."""
        if pipe.refiner is not None:
            raise RequestError("a server takes no refiner: load the model without one")
        devices = pipe.mesh.devices.size
        if batch < 1 or batch % devices:
            raise RequestError(f"batch must be a multiple of the {devices} devices, not {batch}")
        if wait < 0 or limit < 1:
            raise RequestError(f"wait must be at least 0 and limit at least 1: {wait}, {limit}")
        self.pipe, self.batch, self.wait, self.limit = pipe, batch, wait, limit
        self._groups: dict[Any, deque[_Pending]] = {}
        self._waiting = 0  # pictures that are in no batch yet
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="ldm_jax server", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> "Future[np.ndarray]":
        """Queues a request; its result is uint8 [n, H, W, 3].

        `Future.cancel` takes it out of the queue as long as none of its pictures is in a batch.

        Raises:
          RequestError: The model does not take the request, or too many pictures wait.
        """
        if request.progress_every:
            raise RequestError("a server returns finished pictures: leave progress_every out")
        job = self.pipe.job(dataclasses.replace(request, batch=self.batch))
        n = len(job.inputs.seeds)
        future: Future[np.ndarray] = Future()
        pending = _Pending(job, future, np.zeros((n, *job.keep, 3), np.uint8))
        with self._changed:
            if self._closed:
                raise RequestError("the server is closed")
            if self._waiting + n > self.limit:
                raise RequestError(
                    f"{self._waiting} pictures wait already, and {self.limit} may: try later"
                )
            self._groups.setdefault(_group(job), deque()).append(pending)
            self._waiting += n
            self._changed.notify()
        return future

    def close(self) -> None:
        """Finishes what is queued, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self) -> None:
        while (parts := self._next()) is not None:
            self._serve(parts)

    def _serve(self, parts: list[Part]) -> None:
        try:
            self._sample(parts)
        except RequestError as error:
            if len(parts) == 1:
                self._drop(parts[0][0], error)
            else:  # the others do not fail for the one whose picture is not finite
                for part in parts:
                    self._serve([part])
        except Exception as error:  # `Future.result` raises it in each caller's thread
            for pending, _ in parts:
                self._drop(pending, error)

    def _next(self) -> list[Part] | None:
        """Waits for pictures; returns those of the next batch, None when the server is closed.

        The group whose first request is the oldest is served first.
        """
        with self._changed:
            while not self._groups:
                if self._closed:
                    return None
                self._changed.wait()
            group = next(iter(self._groups))
            until = time.monotonic() + self.wait
            while self._rows(group) < self.batch and not self._closed:
                if (left := until - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            return self._take(group)

    def _rows(self, group: Any) -> int:
        return sum(len(p.images) - p.started for p in self._groups[group])

    def _take(self, group: Any) -> list[Part]:
        queue = self._groups.pop(group)  # what remains is queued behind the other groups
        chosen: list[Part] = []
        room = self.batch
        while queue and room:
            pending = queue[0]
            if pending.started == 0 and not pending.future.set_running_or_notify_cancel():
                self._waiting -= len(pending.images)
                queue.popleft()
                continue
            count = min(room, len(pending.images) - pending.started)
            chosen.append((pending, range(pending.started, pending.started + count)))
            pending.started += count
            self._waiting -= count
            room -= count
            if pending.started == len(pending.images):
                queue.popleft()
        if queue:
            self._groups[group] = queue
        return chosen

    def _sample(self, parts: list[Part]) -> None:
        if not parts:  # all were cancelled
            return
        jobs, places = [pending.job for pending, _ in parts], [chosen for _, chosen in parts]
        (made,) = self.pipe.run(_merged(jobs, places))
        start = 0
        for pending, chosen in parts:
            pending.images[chosen.start : chosen.stop] = made.images[start : start + len(chosen)]
            start += len(chosen)
            pending.finished += len(chosen)
            if pending.finished == len(pending.images) and not pending.future.done():
                pending.future.set_result(pending.images)

    def _drop(self, pending: _Pending, error: Exception) -> None:
        """Ends a request with an error, and takes the rest of its pictures out of the queue."""
        with self._changed:
            self._waiting -= len(pending.images) - pending.started
            pending.started = len(pending.images)
            for group, queue in list(self._groups.items()):
                if pending in queue:
                    queue.remove(pending)
                if not queue:
                    del self._groups[group]
            if not pending.future.done():
                pending.future.set_exception(error)


def serve(pipe: Pipeline, *, batch: int = 8, wait: float = 0.02, limit: int = 256) -> Server:
    """Starts a queue that samples the requests of several callers together.

    >>> with ldm_jax.serve(pipe, batch=8) as server:
    ...     futures = [server.submit(ldm_jax.Request(prompts=p, steps=20)) for p in prompts]
    ...     images = [future.result() for future in futures]

    Args:
      pipe: The pipeline; `Pipeline.warmup` with the same ``batch`` compiles its programs before.
      batch: Pictures in every batch.
      wait: Seconds that an incomplete batch waits for further requests.
      limit: Pictures that may wait; a request for more is refused.

    Raises:
      RequestError: An argument is out of range.
    """
    return Server(pipe, batch=batch, wait=wait, limit=limit)


def _merged(jobs: list[Job], places: list[range]) -> Job:
    """Returns a job of some pictures of each of these jobs, which are of one group."""
    rows = [
        jax.tree.map(lambda a, chosen=chosen: a[chosen.start : chosen.stop], job.inputs)
        for job, chosen in zip(jobs, places, strict=True)
    ]
    inputs = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    return dataclasses.replace(jobs[0], inputs=inputs)


def _group(job: Job) -> Any:
    """What requests share that can be in one batch."""
    leaves, tree = jax.tree.flatten(job.inputs)
    return (
        job.sampler,
        job.config,
        job.keep,
        tree,
        tuple((a.shape[1:], a.dtype.str) for a in leaves),
        _bytes(job.steps),
    )


def _bytes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(a), np.asarray(a).tobytes()) for a in leaves)
