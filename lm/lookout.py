"""How the loss of one of several processes is noticed, and the others end.

Two threads in each process watch: `_talk` tells jax's coordination service that the process
lives and at which step it is, and `_guard` ends it when another is lost. Process 0 judges
from what all tell; the others judge process 0, where the service lives.

A thread that waits in a collective cannot be interrupted, so a process ends by os._exit:
after writing the stacks of its threads to WORKDIR/stacks, with one line and hosts.LOST.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import pathlib
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax._src import distributed  # the only way to the service's keys

from lm import hosts
from lm.config import ConfigError

STACKS = "stacks"  # in a work directory
_GRACE = 5.0  # seconds for the others to find an error of all by themselves
_BOARD = "lm/hosts"  # keys in the coordination service


def _client() -> Any:
    return distributed.global_state.client


def _wait_for(key: str, seconds: float) -> str:
    """Returns what is told under a key as soon as it is, or "" after so many seconds."""
    try:
        return _client().blocking_key_value_get(key, int(seconds * 1000))
    except RuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return ""
        raise


class _Steps:
    """When steps began, and whether the next is overdue."""

    def __init__(self, seconds: float):
        self.step = 0  # the last that began
        self._seconds, self._longest = seconds, 0.0
        self._since: float | None = None  # when it began; None: any time may pass

    @property
    def resting(self) -> bool:
        return self._since is None

    def enter(self, step: int) -> None:
        now = time.monotonic()
        if self._since is not None:
            self._longest = max(self._longest, now - self._since)
        self.step, self._since = step, now

    def rest(self) -> None:
        self._since = None

    def still(self) -> float:
        """Returns the seconds since the last step began, if that is too long, else 0."""
        since = self._since
        passed = 0.0 if since is None else time.monotonic() - since
        # Twice: a process that is silent is found to be so first.
        return passed if passed > max(2 * self._seconds, 10 * self._longest) else 0.0


class Lookout:
    """Ends this process, with a line that names the lost one, when it cannot go on.

    Used as a context manager around all work of several processes. Alone it does nothing.

    A process is lost when it gives no sign of life for `seconds` (it was killed or
    stopped, its host or the network is down), when it failed, or when it stays behind while
    steps should advance: none for twice `seconds` and ten times the longest so far.

    Args:
        workdir: where `stacks/process-N.txt` goes.
        seconds: without a sign of life.
    """

    def __init__(self, workdir: str, seconds: float):
        self._folder = epath.Path(workdir) / STACKS
        self._seconds = seconds
        state = distributed.global_state  # jax itself would start the devices
        self._me, self._count = state.process_id, state.num_processes
        self._began = time.monotonic()
        self._steps = _Steps(seconds)
        self._seen: dict[int, tuple[int, float]] = {}  # last beat, and when it was new
        self._told: dict[int, dict[str, Any]] = {}  # what came with the last beat
        self._failed_at: float | None = None
        self._answered = self._began  # when the coordination service last did
        self._verdict = ""  # who is lost, in words
        self._lost: list[int] = []  # of whom no farewell will come
        self._leaving = False  # this process ends by itself
        self._over = threading.Event()

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self._count > 1

    def enter(self, step: int) -> None:
        """Says that step number `step` begins, and that steps should advance now."""
        self._steps.enter(step)

    def rest(self) -> None:
        """Says that what comes (compilation, evaluation, a save) may take any time."""
        self._steps.rest()

    def __enter__(self) -> "Lookout":
        if self.several:
            self._abort = contextlib.ExitStack()
            # jax aborts at once when process 0 is gone. sleep(6), safe in a handler of
            # signal 6, holds the abort up until `_guard` has ended the process.
            self._abort.enter_context(hosts.on_abort(ctypes.CDLL(None).sleep))
            for work in (self._talk, self._guard, self._hold_on):
                threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self.several:
            return
        self._steps.rest()
        if error is None:
            self._part("done")
            # All stay until all are done: a loss meanwhile is noticed as before.
            while not self._over.wait(0.05):
                pass
            self._abort.close()

    def agree(self, experiment: Mapping[str, Any]) -> None:
        """Checks that this process was started with the experiment of process 0.

        Raises:
            ConfigError: it was not; the text names the fields.
        """
        if not self.several:
            return
        mine = {path: repr(value) for path, value in experiment.items()}
        if self._me == 0:
            _client().key_value_set(f"{_BOARD}/experiment", json.dumps(mine))
            return
        while not (found := _wait_for(f"{_BOARD}/experiment", 1)):
            pass  # `_guard` ends this if process 0 is lost
        first = json.loads(found)
        differ = [
            f"{path} is {mine.get(path)} here, {first.get(path)} in process 0"
            for path in {**first, **mine}
            if mine.get(path) != first.get(path)
        ]
        if differ:
            raise ConfigError(
                f"process {self._me} was started with another experiment: "
                f"{'; '.join(differ[:5])}; start all with the same options"
            )

    def explain(self) -> None:
        """Waits until an error that another process may have caused is explained.

        Does not return if one is lost: `_guard` ends this process.
        """
        until = time.monotonic() + self._seconds + 2 * self._interval + 2
        while self._verdict or time.monotonic() < until:
            time.sleep(0.1)

    def fail(self, line: str) -> None:
        """Tells the others that this process fails; process 0 waits until they know."""
        self._leaving = True
        self._steps.rest()
        self._part(f"failed: {line}")
        until = time.monotonic() + 2 * _GRACE
        while self._me == 0 and time.monotonic() < until and not self._alone():
            time.sleep(0.1)

    @property
    def _interval(self) -> float:
        return min(10.0, max(0.2, self._seconds / 10))

    def _part(self, how: str) -> None:
        """Tells how this process ends, if there is anyone to tell."""
        with contextlib.suppress(RuntimeError):
            _client().key_value_set(f"{_BOARD}/end/{self._me}", how, True)

    def _ended(self) -> dict[int, str]:
        found = _client().key_value_dir_get(f"{_BOARD}/end/")
        return {int(key.rpartition("/")[2]): how for key, how in found}

    def _alone(self) -> bool:
        try:
            return len({*self._ended(), *self._lost}) == self._count
        except RuntimeError:
            return True

    def _talk(self) -> None:
        """Tells of this process, hears of the others, until the end or a verdict."""
        beat = failures = 0
        while not self._over.is_set():
            beat += 1
            try:
                self._tell(beat)
                said = self._judge() if self._me == 0 else self._hear_first()
                if said and not self._verdict:
                    _client().key_value_set(f"{_BOARD}/verdict", said, True)
                said = _wait_for(f"{_BOARD}/verdict", self._interval)
                self._answered, failures = time.monotonic(), 0
            except RuntimeError as error:
                failures += 1
                said = ""
                if failures > 2:
                    cause = str(error).partition("\n")[0].partition(":")[0]
                    self._without_first(f"is gone ({cause})")
                    return
                time.sleep(0.3)
            if said == "done":
                self._over.set()
            elif said and not self._leaving:
                self._verdict = said
                return
            elif said:  # which is why this process leaves: the others may not know yet
                time.sleep(self._interval)

    def _hold_on(self) -> None:
        """Keeps a connection to process 0: its end tells at once that the process died.

        jax notices in the same way, and its abort is held up for seconds.
        """
        address = distributed.global_state.coordinator_address or ""
        host, _, port = address.rpartition(":")
        where = (host.strip("[]"), int(port))
        while self._me and not self._over.is_set():
            try:
                with socket.create_connection(where, timeout=10) as held:
                    held.settimeout(None)
                    while held.recv(4096):  # the service's greeting; later, it hangs up
                        pass
            except ConnectionRefusedError:
                if not self._over.wait(0.2):  # it may have ended as it should
                    self._without_first("is gone (killed, or failed)")
                return
            except OSError:  # out of reach: `_guard` decides
                self._over.wait(1)

    def _tell(self, beat: int) -> None:
        mine = {
            "beat": beat,
            "step": self._steps.step,
            "still": self._steps.still(),
            "resting": self._steps.resting,
            "host": socket.gethostname(),
        }
        key = f"{_BOARD}/beat/{self._me}"
        _client().key_value_set(key, json.dumps(mine), True)

    def _hear_first(self) -> str:
        """Returns "" or that process 0 is lost, whose service may outlive its Python."""
        value = _wait_for(f"{_BOARD}/beat/0", self._interval)
        return self._silent({0: json.loads(value)} if value else {}, [0])

    def _judge(self) -> str:
        """Returns "", "done", or who is lost."""
        ended = self._ended()
        failed = {i: how for i, how in ended.items() if how != "done"}
        if failed:  # in all, perhaps: they have a while to tell it themselves
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at < min(_GRACE, self._seconds):
                return ""
            first = min(failed)
            return f"process {first} {failed[first]}"
        if len(ended) == self._count:
            return "done"
        found = _client().key_value_dir_get(f"{_BOARD}/beat/")
        beats = {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}
        left = [i for i in range(self._count) if i not in ended]
        return self._silent(beats, left) or self._behind(left)

    def _silent(self, beats: dict[int, dict[str, Any]], who: list[int]) -> str:
        """Notes the signs of life of `who`, and says which of them have stopped."""
        now = time.monotonic()
        for i in who:
            beat = beats.get(i, {"beat": 0})
            if i not in self._seen or self._seen[i][0] != beat["beat"]:
                self._seen[i] = (beat["beat"], now)
            self._told[i] = beat
        lost = [i for i in who if now - self._seen[i][1] > self._seconds]
        if not lost:
            return ""
        self._lost = lost
        was = "was" if len(lost) == 1 else "were"
        return (
            f"{self._names(lost)} gave no sign of life for {self._seconds:g} s (killed or "
            f"stopped, or out of reach); {was} at step {self._told[lost[0]].get('step', 0)}"
        )

    def _behind(self, who: list[int]) -> str:
        """Says which processes stay behind, if steps do not advance."""
        still = [self._told[i].get("still", 0.0) for i in who]
        if not any(still):
            return ""
        steps = {i: self._told[i].get("step", 0) for i in who}
        first = min(steps.values())
        last = [i for i in who if steps[i] == first]
        if any(self._told[i].get("resting") for i in last):
            return ""  # the others wait for a save, say
        what = f"no step was done for {max(still):.0f} s"
        if len(last) == len(who):
            return f"{what}; all processes are in step {first}"
        return f"{what}: {self._names(last)} hangs after step {first}, others are ahead"

    def _names(self, who: list[int]) -> str:
        shown = [f"{i} ({self._told[i].get('host', 'never heard of')})" for i in who]
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        return f"process{'es' * (len(who) > 1)} {', '.join(shown[:8])}{more}"

    def _guard(self) -> None:
        """Ends this process when another is lost."""
        while not self._over.wait(0.1):
            if self._leaving:
                continue
            silence = time.monotonic() - self._answered
            if not self._verdict and silence > self._seconds + 2 * self._interval:
                self._without_first(
                    f"has not answered for {silence:.0f} s (stopped, or out of reach)"
                )
            if self._verdict:
                self._leave()

    def _without_first(self, how: str) -> None:
        """Decides that process 0 is lost, and with it the service."""
        self._lost = [0]
        self._verdict = self._verdict or f"process 0, the coordinator, {how}"

    def _leave(self) -> None:
        stacks = self._dump()
        hosts.say(
            f"process {self._me} of {self._count} stops: {self._verdict}; stacks are in "
            f"{stacks}; start all processes again to go on from the newest checkpoint"
        )
        if 0 not in self._lost:
            told = threading.Thread(target=self._farewell, daemon=True)
            told.start()
            told.join(_GRACE)
        os._exit(hosts.LOST)

    def _farewell(self) -> None:
        """Tells that this process ends; the first one stays until the others know why."""
        self._part(f"left: {self._verdict}")
        until = time.monotonic() + min(_GRACE, self._seconds)
        while self._me == 0 and not self._alone() and time.monotonic() < until:
            time.sleep(0.1)

    def _dump(self) -> str:
        """Writes the Python stacks of all threads; returns where."""
        name = f"process-{self._me}.txt"
        remote = "://" in str(self._folder)
        here = pathlib.Path(tempfile.mkdtemp() if remote else self._folder)
        try:
            here.mkdir(parents=True, exist_ok=True)
            with open(here / name, "w") as file:
                file.write(f"{time.ctime()}: {self._verdict}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f"no file ({error.strerror})"
        if remote:  # it may hang, too
            copy = (self._folder / name).write_text
            text = (here / name).read_text()
            work = threading.Thread(target=copy, args=(text,), daemon=True)
            work.start()
            work.join(_GRACE)
        return str((here if remote else self._folder) / name)
