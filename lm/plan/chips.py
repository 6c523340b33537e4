"""What chips can do at best: the denominators of MFU. Adding a chip is adding a row."""

import time
from typing import Any

import jax
import jax.numpy as jnp

# Dense bf16 operations a second of one device, by a part of jax's `device_kind`; first match wins.
PEAK = {
    "TPU v6": 918e12,  # cloud.google.com/tpu/docs/v6e
    "TPU v5p": 459e12,  # cloud.google.com/tpu/docs/v5p
    "TPU v5 lite": 197e12,  # cloud.google.com/tpu/docs/v5e
    "TPU v5e": 197e12,  # cloud.google.com/tpu/docs/v5e
    "TPU v5": 459e12,  # jax's name of a v5p
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "B200": 2250e12,  # NVIDIA Blackwell architecture brief, dense
    "H200": 989e12,  # NVIDIA H200 data sheet, SXM, dense
    "H100 PCIe": 756e12,  # NVIDIA H100 data sheet, PCIe, dense
    "H100": 989e12,  # NVIDIA H100 data sheet, SXM, dense
    "A100": 312e12,  # NVIDIA A100 data sheet, dense
}


def peak_flops(device: Any, devices: int) -> float | None:
    """Returns the best operations a second of one of `devices` devices; None if unknown.

    A CPU is measured on the spot (a tenth of a second), in fp32; emulated devices share it.
    """
    if device.platform == "cpu":
        return _measured() / devices
    return next(
        (peak for name, peak in PEAK.items() if name in device.device_kind), None
    )


def _measured(size: int = 1024, rounds: int = 5) -> float:
    """Returns the rate of the best of a few fp32 matrix products on the CPU."""
    device = jax.local_devices(backend="cpu")[0]
    a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = min(_seconds(product, a) for _ in range(rounds))
    return 2 * size**3 / best


def _seconds(f, a) -> float:
    start = time.perf_counter()
    f(a).block_until_ready()
    return time.perf_counter() - start
