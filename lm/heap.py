"""Memory that a process takes: the C heap under XLA's CPU backend, and a share of a GPU."""

import ctypes
import glob
import os

TAKEN = 0.92  # of a GPU; the rest is for its driver, NCCL, and what kernels work in
_SHARE = "XLA_CLIENT_MEM_FRACTION"
_SETTINGS = ((-8, 1), (-4, 0), (-1, -1))  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD


def keep() -> None:
    """Lets glibc keep freed memory where the CPU computes; to be called before jax is imported.

    XLA's CPU backend allocates its buffers anew in each step. Pages that go back to the system
    and are faulted in again take a quarter of a small model's step. Does nothing where there is
    an accelerator (its host wants its memory for data) or another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(
        glob.glob(f"/dev/{name}") for name in ("nvidia[0-9]*", "accel*", "vfio/[0-9]*")
    ):
        return
    for option, value in _SETTINGS:
        mallopt(option, value)


def take() -> None:
    """Lets jax take `TAKEN` of a GPU for arrays, unless the environment says another share.

    To be called before jax looks for devices; its own default is three quarters.
    """
    if not os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"):  # the name it had before
        os.environ.setdefault(_SHARE, str(TAKEN))
