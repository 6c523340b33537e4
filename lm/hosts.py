"""Several processes that are one run: how they meet, through jax's coordination service.

The service lives in process 0. jax aborts a process that does not reach it or is refused;
here such a process ends with one line instead.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from lm.config import ConfigError

FAILED, WRONG_USE, LOST = 1, 2, 76  # exit codes; LOST: another process was lost
_SOUGHT = (
    "Slurm (SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_PROCID, SLURM_LOCALID), "
    "Cloud TPU (libtpu with TPU_WORKER_HOSTNAMES or the metadata server), Kubernetes "
    "(KUBERNETES_SERVICE_HOST and the package kubernetes), Open MPI (OMPI_MCA_orte_hnp_uri)"
)


def check(coordinator: str, processes: int | None, process: int | None) -> None:
    """Checks the flags of a run of several processes against each other.

    Raises:
        ConfigError: some are missing, or contradict each other.
    """
    given = {"--processes": processes, "--process_id": process}
    named = [f"{flag}={value}" for flag, value in given.items() if value is not None]
    if not coordinator:
        if named:
            raise ConfigError(
                f"{' '.join(named)} without --coordinator=HOST:PORT, the address of process 0"
            )
        return
    if coordinator == "auto":
        if named:
            raise ConfigError(
                f"--coordinator=auto takes the number of processes from the cluster; drop "
                f"{' '.join(named)}, or name the coordinator's HOST:PORT"
            )
        return
    if processes is None or process is None:
        raise ConfigError(
            "--coordinator=HOST:PORT needs --processes=N and --process_id=I"
        )
    _, _, port = coordinator.rpartition(":")
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d+", coordinator) or not (
        0 < int(port) < 65536
    ):
        raise ConfigError(
            f"--coordinator={coordinator}: expected HOST:PORT with a port up to 65535, or auto"
        )
    if processes < 1:
        raise ConfigError(f"--processes={processes}: expected 1 or more")
    if not 0 <= process < processes:
        raise ConfigError(
            f"--process_id={process}: {processes} processes are numbered 0 to "
            f"{processes - 1}; correct it, or --processes={processes}"
        )


def connect(
    coordinator: str,
    processes: int | None,
    process: int | None,
    *,
    wait: int,
    heartbeat: int,
) -> None:
    """Meets the other processes, or ends this one with a line that says why not.

    Args:
        coordinator: what `check` found right.
        wait: seconds for the others to come.
        heartbeat: seconds that `Lookout` allows; jax's own limit, which is met by an abort,
            lies beyond it.
    """
    auto = coordinator == "auto"
    if process == 0:
        _require_free(coordinator)
    me = "this process" if auto else f"process {process} of {processes}"
    met = threading.Event()
    waiting = (met, wait, me, "" if auto else coordinator, process)
    threading.Thread(target=_wait, args=waiting, daemon=True).start()
    options: Any = {
        "initialization_timeout": wait + 60,  # ours is first, jax aborts
        "heartbeat_timeout_seconds": 2 * heartbeat + 30,
    }
    try:
        with on_abort(ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _refused(me))):
            if auto:
                jax.distributed.initialize(**options)
            else:
                # The flags say all: jax would restrict the devices by what else it finds.
                options["cluster_detection_method"] = "deactivate"
                jax.distributed.initialize(coordinator, processes, process, **options)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        line = " ".join(str(error).split())
        if auto and "coordinator_address should be defined" in line:
            line = f"no cluster was found; looked for {_SOUGHT}"
        fix = "name --coordinator=HOST:PORT --processes=N --process_id=I instead"
        raise ConfigError(f"--coordinator={coordinator}: {line}; {fix}") from error
    finally:
        met.set()


def _require_free(coordinator: str) -> None:
    """Checks that this machine can listen at the coordinator's port.

    gRPC would share the port with another run there, and each wait for the other's processes.
    """
    port = int(coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"--coordinator={coordinator}: process 0 cannot listen at port {port} "
                f"({error.strerror}); choose another port for all processes"
            ) from None


def _refused(me: str) -> None:
    say(
        f"the coordinator refused {me}: its --process_id is taken, or --processes differs "
        "between the processes (jax's lines above tell)"
    )
    os._exit(WRONG_USE)


def _wait(
    met: threading.Event, seconds: int, me: str, address: str, process: int | None
) -> None:
    """Says after a while what is waited for, and ends the process when it is too long."""
    notice = min(15, seconds / 2)
    if met.wait(notice):
        return
    say(f"{me} has waited {notice:g} s: {_missing(address, process)}")
    if met.wait(seconds - notice):
        return
    say(
        f"{me} gave up after train.connect_seconds={seconds}: {_missing(address, process)}"
    )
    os._exit(FAILED)


def _missing(address: str, process: int | None) -> str:
    """Says who has not come, as far as this process can know."""
    if process == 0 or not address:
        return "some of the others have not come; start all, each with its --process_id"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        why = error.strerror or "it does not answer"
        return f"no coordinator at {address} ({why}); start process 0 there"
    return f"the coordinator at {address} waits for others; start them all"


@contextlib.contextmanager
def on_abort(handler: Any) -> Iterator[None]:
    """Has SIGABRT, which C++ raises for fatal errors, call a C function inside."""
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    before = libc.signal(signal.SIGABRT, handler)
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, ctypes.c_void_p(before))


def say(text: str) -> None:
    """Prints a line on stderr; what a thread prints before it ends the process."""
    # A progress bar that is cut off leaves the cursor hidden.
    end = "\x1b[?25h" if sys.stderr.isatty() else ""
    print(f"lm: {text}{end}", file=sys.stderr, flush=True)
