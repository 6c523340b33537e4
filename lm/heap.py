"""The C heap under XLA's CPU backend."""

import ctypes
import glob

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
