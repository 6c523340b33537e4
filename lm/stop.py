"""A wish to stop, told by a signal: the loop saves and ends instead of being cut off."""

import contextlib
import os
import signal
import types
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Stop:
    """Listens for SIGTERM and SIGINT; a second signal is not caught.

    With several processes jax's coordination service tells all of them at which step to
    stop, so that none waits for another in a collective.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals inside."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if jax.process_count() > 1:
            numbers = [signal.SIGINT]  # SIGTERM is caught by the coordination service
        before = {number: signal.signal(number, self._caught) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _caught(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Returns whether to stop after `step`: in all processes or in none."""
        if jax.process_count() == 1:
            return bool(self.name)
        if multihost_utils.reached_preemption_sync_point(step):
            self.name = self.name or "a signal to one of the processes"
            return True
        return False
