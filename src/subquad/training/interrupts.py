"""Ctrl-C and SIGTERM during a run: finish the step, save, then stop."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """While entered, the first SIGINT or SIGTERM is only noted (``received``); a second one acts as before.

    Signals that the process ignores stay ignored. Outside the main thread, where python cannot take signals, nothing is
    changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def raise_received(self, message: str) -> None:
        """KeyboardInterrupt after a SIGINT; SystemExit after a SIGTERM, with the status that shells give it, 143."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(message)
        if self.received == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
