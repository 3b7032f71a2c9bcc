"""Functions that take turns: each in a thread of its own, one of all running at a time.

A function so written pauses in the middle of calls that know nothing of it, such as a model's forward or autograd's
backward, and goes on where it was. What PyTorch keeps by thread (gradient mode, autocast, hooks of saved tensors)
stays each one's own; what is the process's (random numbers, buffers) is the caller's to look after.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

_STOP = object()


class Stopped(BaseException):
    """Ends a function at its pause. No Exception: nobody's code takes it for an error."""


class Turn:
    """One of the functions.

    Args:
        body: called at the first `go`, in the new thread; what it calls may call `pause`.
        name: of the thread.
    """

    def __init__(self, body: Callable[[], None], name: str) -> None:
        self._body: Callable[[], None] | None = body
        self._context = contextvars.copy_context()
        self._go_on: SimpleQueue[Any] = SimpleQueue()
        self._came: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        # a daemon, so that Python can end where even `stop` was interrupted
        self._thread = threading.Thread(target=self._context.run, args=(self._run,), name=name, daemon=True)
        self._is_stopped = False
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
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go_on.put(value)
        self.place, error = self._came.get()
        if error is not None:
            try:
                self._thread.join()
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
        if self._thread.ident is not None:
            self._go_on.put(_STOP)
            self._thread.join()

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
        self._came.put((None, error))
        del error
