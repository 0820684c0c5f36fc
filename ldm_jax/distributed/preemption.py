"""Signals that stop a run, or save it, at the same step on all processes."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

STOPPED = os.EX_TEMPFAIL  # exit status of a run that has saved and can be started again


class Preemption:
    """Notices a request to stop (SIGTERM, or the cluster's notice) or to save (SIGUSR1)."""

    def __init__(self) -> None:
        self._stop = self._save = False

    @contextlib.contextmanager
    def watch(self) -> Iterator["Preemption"]:
        """Handles both signals inside.

        Under jax.distributed its own handler notices SIGTERM and informs the other processes.
        """

        def stop(*_: Any) -> None:
            self._stop = True

        def save(*_: Any) -> None:
            self._save = True

        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                handlers[signal.SIGUSR1] = save
            if jax.process_count() == 1:
                handlers[signal.SIGTERM] = stop
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to stop after ``step``.

        Every process calls it at every step, and all get the same answer.
        """
        if jax.process_count() == 1:
            return self._stop
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def save_wanted(self, meeting: bool) -> bool:
        """Whether any process got the signal to save since the last True.

        Several processes agree where ``meeting`` is True, which must be at the same steps on all.
        It makes them wait for one another, and so is not for every step.
        """
        wanted = self._save
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if not meeting:
                return False
            wanted = bool(np.any(multihost_utils.process_allgather(np.array(wanted))))
        if wanted:
            self._save = False
        return wanted
