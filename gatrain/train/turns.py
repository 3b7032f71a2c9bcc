"""Functions that take turns: each in a thread, one of all running at a time.

A function so written pauses in the middle of calls that know nothing of it, such as a model's forward or autograd's
backward, and goes on where it was. What PyTorch keeps by thread (gradient mode, autocast, hooks of saved tensors)
stays each one's own; what is the process's (random numbers, buffers) is the caller's to look after.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

_STOP, _ENDED = object(), object()


class Stopped(BaseException):
    """Ends a function at its pause. No Exception: nobody's code takes it for an error."""


class Threads:
    """Threads that are kept from one use to the next, and end with this object.

    The plans that cuDNN makes for convolutions, and the handles of cuBLAS, belong to a thread: in a new one each
    convolution of each pass is planned anew, which takes the host longer than the GPU the convolution.
    """

    def __init__(self) -> None:
        self._jobs: list[SimpleQueue[Callable[[], None] | None]] = []
        weakref.finalize(self, _end, self._jobs)

    def run(self, nth: int, job: Callable[[], None]) -> None:
        """Let the ``nth`` thread run ``job``, which raises nothing, after what it runs now."""
        while len(self._jobs) <= nth:
            jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
            # a daemon, so that Python can end where even `Turn.stop` was interrupted
            threading.Thread(target=_work, args=(jobs,), name=f"gatrain-turn-{nth}", daemon=True).start()
            self._jobs.append(jobs)
        self._jobs[nth].put(job)


def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job


def _end(queues: list[SimpleQueue[Callable[[], None] | None]]) -> None:
    for jobs in queues:
        jobs.put(None)


class Turn:
    """One of the functions.

    Args:
        body: called at the first `go`, in a thread; what it calls may call `pause`.
        threads: where.
        nth: which of them; no other function that is under way has it.
    """

    def __init__(self, body: Callable[[], None], threads: Threads, nth: int) -> None:
        self._body: Callable[[], None] | None = body
        self._context = contextvars.copy_context()
        self._go_on: SimpleQueue[Any] = SimpleQueue()
        self._came: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._start: Callable[..., None] | None = functools.partial(threads.run, nth)
        self._is_stopped = self._is_under_way = False
        self.place: Any = None
        """What it paused with; None once it has ended."""

    def go(self, value: Any = None) -> Any:
        """Let it run until it pauses or ends.

        Args:
            value: what its `pause` returns.

        Returns:
            `place`.

        Raises:
            BaseException: what it raised, with its traceback.
        """
        if self._is_under_way:
            self._go_on.put(value)
        else:
            self._is_under_way = True
            assert self._start is not None
            self._start(functools.partial(self._context.run, self._run))
            self._start = None  # a graph may keep this for longer than the threads are wanted
        place, error = self._came.get()
        self._is_under_way = place is not _ENDED
        self.place = place if self._is_under_way else None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return self.place

    def pause(self, place: Any) -> Any:
        """In the thread: wait until it may go on. Gives what `go` was called with.

        Raises:
            Stopped: it may not.
        """
        if not self._is_stopped:  # code that ends it may come here once more
            self._came.put((place, None))
            value = self._go_on.get()
            if value is not _STOP:
                return value
        raise Stopped

    def stop(self) -> None:
        """End it at its pause, and wait until it has ended."""
        self._is_stopped = True
        if self._is_under_way:
            self._go_on.put(_STOP)
            while self._came.get()[0] is not _ENDED:
                pass
            self._is_under_way = False

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            assert self._body is not None
            self._body()
        except Stopped:
            pass
        except BaseException as raised:
            error = raised
        self._body = None
        self._came.put((_ENDED, error))
        del error
