"""Ctrl-C and SIGTERM as requests to save and end, instead of sudden deaths.

| signal | from | exit code of a command that saved and ended |
|---|---|---|
| SIGINT | Ctrl-C | 130 |
| SIGTERM | schedulers, before they take the machine away (preemption) | 143 |
"""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

_MESSAGES = {
    signal.SIGINT: b"\nCtrl-C: finishing the step, then saving.\n",
    signal.SIGTERM: b"\nSIGTERM: finishing the step, then saving.\n",
}


class StopSignals:
    """Catches the first SIGINT or SIGTERM; a context manager.

    A second Ctrl-C interrupts as usual. A second SIGTERM changes nothing: launchers
    pass on what the scheduler has sent to the process as well. Where Python allows no
    signal handlers, outside the main thread, nothing is caught. The handler that
    `jax.distributed.initialize` sets for SIGTERM is replaced.

    Attributes:
        caught: The first signal, None before it.
    """

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Start to catch."""
        if threading.current_thread() is threading.main_thread():
            for number in _MESSAGES:
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the handlers back."""
        for number, handler in self._previous.items():
            self._restore(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if received == signal.SIGINT:
            self._restore(received, self._previous[received])
        if self.caught is None:
            self.caught = received
            # A handler may interrupt a print: only a bare write is safe in it.
            os.write(sys.__stderr__.fileno(), _MESSAGES[received])

    @staticmethod
    def _restore(number: signal.Signals, handler: object) -> None:
        # A handler that is not Python's, such as JAX's, reads as None.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
