"""What chips can do at best, with a source beside every number. Adding a chip is adding a row.

Peaks are those of dense products; a multiply-add is two operations. Bytes a second of a link are
those that a chip receives, over all its ports, while it sends as many: half of what vendors call
bidirectional.
"""

import dataclasses
import os
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm import heap

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A device of one kind, and the host that it is in."""

    name: str
    kinds: tuple[str, ...]  # parts of jax's `device_kind`
    platform: Literal["tpu", "gpu", "cpu"]
    bf16: float  # operations a second
    reach: float  # share of it that large products have been seen to take
    fp8: float  # the same; bf16's where it has none of its own
    int8: float
    hbm: int  # bytes that programs can have, without `reserved`
    bandwidth: float  # of the HBM, bytes a second
    torus: int  # dimensions of the torus that near links form; 0: a switch joins a host
    links: float  # bytes a second over all near links
    network: float  # bytes a second for a chip between hosts (GPUs) or slices (TPUs)
    watts: float | None  # at full load; None: not published
    host_chips: int
    host_ram: int  # bytes
    largest: int  # chips that near links join at most
    start: float = 0.0  # seconds that a kernel takes however small; 0: not counted
    reserved: int = 0  # bytes of HBM that the runtime keeps, or does not take
    sources: dict[str, str]

    @property
    def link(self) -> str:
        """Name of its near links."""
        return {"tpu": "ici", "gpu": "nvlink", "cpu": "memory"}[self.platform]

    @property
    def far(self) -> str:
        """Name of what joins hosts of GPUs, or slices of TPUs."""
        return {"tpu": "dcn", "gpu": "network", "cpu": "memory"}[self.platform]

    @property
    def link_ways(self) -> int:
        """Near links to different neighbours; of a switch 1."""
        return max(2 * self.torus, 1)


def _memory(there: float, left: float | None = None) -> dict[str, int]:
    """Returns the HBM of a chip, in GiB, as programs find it."""
    left = heap.TAKEN * there if left is None else left
    return {"hbm": round(left * GIB), "reserved": round((there - left) * GIB)}


# Of TPUs, XLA says how much "available HBM" there is when a program is too large.
SAID = "said by libtpu 0.0.42"
TPU = "docs.cloud.google.com/tpu/docs/"
# Chips of a virtual machine, which is what JAX calls a host; two of them share a board of eight.
HOSTS = "libtpu's topology has so many chips a process"
WATTS_7X = "blog.google, Ironwood: nearly 10 MW for a pod of 9216"
WATTS_V6E = "twice 7x's operations a joule less: blog.google, Ironwood, fp8 peak a watt"
WATTS_V5P = (
    "assumed, not published: v4's operations a joule, the chip of the same class"
)
WATTS_V5E = "67 % fewer operations a joule than v6e: cloud.google.com/blog, Trillium"
H100_SHEET = "NVIDIA H100 data sheet, SXM, dense"
H200_SHEET = "NVIDIA H200 data sheet, SXM, dense"
A100_SHEET = "NVIDIA A100 data sheet, SXM 80 GB, dense"
MAMF = "github.com/stas00/ml-engineering, maximum achievable matmul FLOPS"
NOT_TAKEN = "lm/heap.py: what lm leaves to drivers and libraries"
ASSUMED = "assumed, not published; tests/published_test.py compares with published runs"
B200_SHEET = "NVIDIA Blackwell architecture brief, HGX B200, dense"

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", kinds=("TPU v4",), platform="tpu",
            bf16=275 * TERA, fp8=275 * TERA, int8=275 * TERA,
            reach=0.9, **_memory(32, 30.5), bandwidth=1200 * GIGA,
            torus=3, links=300 * GIGA, network=6.25 * GIGA,
            watts=192, host_chips=4, host_ram=407 * 10**9, largest=4096,
            sources={
                "reach": ASSUMED,
                "bf16 int8 hbm bandwidth watts largest": f"{TPU}v4",
                "reserved": f"{SAID}, of each of two cores",
                "fp8": "computed in bf16",
                "torus links": f"{TPU}system-architecture-tpu-vm: 2400 Gb/s, 3D torus",
                "network": "as v5p, the chip of the same class: not published",
                "host_chips host_ram": f"{TPU}v4: ct4p-hightpu-4t",
            },
        ),
        Chip(
            name="v5e", kinds=("TPU v5 lite", "TPU v5e"), platform="tpu",
            bf16=197 * TERA, fp8=197 * TERA, int8=393 * TERA,
            reach=0.9, **_memory(16, 15.75), bandwidth=819 * GIGA,
            torus=2, links=200 * GIGA, network=3.125 * GIGA,
            watts=155, host_chips=4, host_ram=192 * 10**9, largest=256,
            sources={
                "reach": ASSUMED,
                "bf16 int8 hbm bandwidth torus largest": f"{TPU}v5e",
                "reserved": SAID,
                "fp8": "computed in bf16",
                "links": f"{TPU}v5e: 400 GB/s bidirectional",
                "network": f"{TPU}v6e: hosts of 8 with 2 x 100 Gb/s",
                "watts": WATTS_V5E,
                "host_chips host_ram": f"{TPU}v5e: ct5lp-hightpu-4t; {HOSTS}",
            },
        ),
        Chip(
            name="v5p", kinds=("TPU v5p", "TPU v5"), platform="tpu",
            bf16=459 * TERA, fp8=459 * TERA, int8=918 * TERA,
            reach=0.9, hbm=95 * GIB, bandwidth=2765 * GIGA,
            torus=3, links=600 * GIGA, network=6.25 * GIGA,
            watts=320, host_chips=4, host_ram=448 * 10**9, largest=6144,
            sources={
                "reach": ASSUMED,
                "bf16 fp8 hbm bandwidth torus largest": f"{TPU}v5p",
                "reserved": f"{SAID}: 95.74 GiB are left, all that is published",
                "int8": "cloud.google.com/blog, TPU v5p: 918 TOPS",
                "links": f"{TPU}v5p: 1200 GB/s bidirectional",
                "network": f"{TPU}v5p: 50 Gb/s a chip",
                "host_chips host_ram": f"{TPU}v5p: ct5p-hightpu-4t",
                "watts": WATTS_V5P,
            },
        ),
        Chip(
            name="v6e", kinds=("TPU v6",), platform="tpu",
            bf16=918 * TERA, fp8=918 * TERA, int8=1836 * TERA,
            reach=0.9, **_memory(32, 31.25), bandwidth=1640 * GIGA,
            torus=2, links=400 * GIGA, network=12.5 * GIGA,
            watts=432, host_chips=4, host_ram=720 * 10**9, largest=256,
            sources={
                "reach": ASSUMED,
                "bf16 fp8 int8 hbm bandwidth torus largest": f"{TPU}v6e",
                "reserved": SAID,
                "links": f"{TPU}v6e: 800 GB/s bidirectional",
                "network": f"{TPU}v6e: 100 Gb/s a chip",
                "watts": WATTS_V6E,
                "host_chips host_ram": f"{TPU}v6e: ct6e-standard-4t; {HOSTS}",
            },
        ),
        Chip(
            name="7x", kinds=("TPU7x", "TPU v7"), platform="tpu",
            bf16=2307 * TERA, fp8=4614 * TERA, int8=4614 * TERA,
            reach=0.9, **_memory(192, 187.5), bandwidth=7380 * GIGA,
            torus=3, links=600 * GIGA, network=12.5 * GIGA,
            watts=1085, host_chips=4, host_ram=960 * 10**9, largest=9216,
            sources={
                "reach": ASSUMED,
                "bf16 fp8 hbm bandwidth largest": f"{TPU}tpu7x",
                "reserved": "assumed, the share of v6e",
                "int8": "as fp8: not published",
                "torus": f"{TPU}tpu7x: like v5p",
                "links": f"{TPU}tpu7x: 1200 GB/s bidirectional",
                "network": f"{TPU}tpu7x: 100 Gb/s a chip",
                "watts": WATTS_7X,
                "host_chips host_ram": f"{TPU}tpu7x: a VM of 4",
            },
        ),
        Chip(
            name="a100", kinds=("A100",), platform="gpu",
            bf16=312 * TERA, fp8=312 * TERA, int8=624 * TERA,
            reach=0.87, **_memory(80), bandwidth=2039 * GIGA,
            torus=0, links=300 * GIGA, network=25 * GIGA,
            watts=400, host_chips=8, host_ram=2 * 10**12, largest=8,
            sources={
                "reach": MAMF,
                "bf16 int8 hbm bandwidth watts": A100_SHEET,
                "fp8": "computed in bf16",
                "torus links largest": f"{A100_SHEET}: 600 GB/s bidirectional, a switch",
                "network host_chips host_ram": "NVIDIA DGX A100: 200 Gb/s a GPU, 2 TB",
                "reserved": NOT_TAKEN,
            },
        ),
        Chip(
            name="h100", kinds=("H100",), platform="gpu",
            bf16=989 * TERA, fp8=1979 * TERA, int8=1979 * TERA,
            reach=0.8, **_memory(84_929_347_584 / GIB), bandwidth=3350 * GIGA,
            torus=0, links=450 * GIGA, network=50 * GIGA,
            watts=700, host_chips=8, host_ram=2 * 10**12, largest=8,
            sources={
                "reach": MAMF,
                "bf16 fp8 int8 bandwidth watts": H100_SHEET,
                "hbm": "device_memory_size of lm/plan/cards/h100.txtpb",
                "torus links largest": f"{H100_SHEET}: 900 GB/s bidirectional, a switch",
                "network host_chips host_ram": "NVIDIA DGX H100: 400 Gb/s a GPU, 2 TB",
                "reserved": NOT_TAKEN,
            },
        ),
        Chip(
            name="h200", kinds=("H200",), platform="gpu",
            bf16=989 * TERA, fp8=1979 * TERA, int8=1979 * TERA,
            reach=0.8, **_memory(141e9 / GIB), bandwidth=4800 * GIGA,
            torus=0, links=450 * GIGA, network=50 * GIGA,
            watts=700, host_chips=8, host_ram=2 * 10**12, largest=8,
            sources={
                "reach": f"{MAMF}: as h100",
                "bf16 fp8 int8 hbm bandwidth watts": H200_SHEET,
                "torus links largest": f"{H200_SHEET}: 900 GB/s bidirectional, a switch",
                "network host_chips host_ram": "NVIDIA DGX H200: 400 Gb/s a GPU, 2 TB",
                "reserved": NOT_TAKEN,
            },
        ),
        Chip(
            name="b200", kinds=("B200",), platform="gpu",
            bf16=2250 * TERA, fp8=4500 * TERA, int8=4500 * TERA,
            reach=0.78, **_memory(180e9 / GIB), bandwidth=8000 * GIGA,
            torus=0, links=900 * GIGA, network=50 * GIGA,
            watts=1000, host_chips=8, host_ram=2 * 10**12, largest=8,
            sources={
                "reach": MAMF,
                "bf16 fp8 int8 bandwidth watts": B200_SHEET,
                "hbm": "docs.nvidia.com/dgx/dgxb200-user-guide: 1,440 GB for eight",
                "torus links largest": f"{B200_SHEET}: 1.8 TB/s bidirectional, a switch",
                "network host_chips host_ram": "NVIDIA DGX B200: 400 Gb/s a GPU, 2 TB",
                "reserved": NOT_TAKEN,
            },
        ),
    )
}  # fmt: skip
SLOWER = {"H100 PCIe": 756 * TERA}  # NVIDIA H100 data sheet, PCIe, dense
MEASURED = "measured"
LARGE = (8192, 8192, 8192)  # a product that reaches what a GPU or a TPU can
LONG = 2**28  # entries of a copy that no cache holds


def peak_flops(device: Any, devices: int) -> float | None:
    """Returns the best operations a second of one of `devices` devices; None if unknown.

    A CPU is measured on the spot (a tenth of a second), in fp32; emulated devices share it.
    """
    if device.platform == "cpu":
        return product_rate() / devices
    return peak(device.device_kind)


def peak(device_kind: str) -> float | None:
    """Returns the bf16 operations a second of jax's `device_kind`; None if unknown."""
    slower = next((p for name, p in SLOWER.items() if name in device_kind), None)
    chip = known(device_kind)
    return slower or (chip.bf16 if chip else None)


def known(device_kind: str) -> Chip | None:
    """Returns the chip of jax's `device_kind`, None where it has no row."""
    fits = [(k, c) for c in CHIPS.values() for k in c.kinds if k in device_kind]
    return max(fits, key=lambda fit: len(fit[0]), default=(None, None))[1]


def measured(chip: Chip, device: Any) -> Chip:
    """Returns the chip as `device` has it: its memory, and the rates that it reaches (seconds).

    Of a kind there are variants with less memory or a lower peak, and no two clocks are the same.
    """
    rate = product_rate(LARGE, device, jnp.bfloat16)
    best = max(peak(device.device_kind) or chip.bf16, rate)
    stats = device.memory_stats() or {}
    there = (
        {"hbm": stats["bytes_limit"], "reserved": 0} if "bytes_limit" in stats else {}
    )
    single = {f: why for fields, why in chip.sources.items() for f in fields.split()}
    found = ("reach", "bandwidth", "host_chips", "host_ram", *there)
    return dataclasses.replace(
        chip,
        bf16=best,
        reach=rate / best,
        fp8=chip.fp8 * best / chip.bf16,
        int8=chip.int8 * best / chip.bf16,
        bandwidth=copy_rate(LONG, device),
        host_chips=jax.local_device_count(),
        host_ram=ram(),
        sources={**single, **dict.fromkeys(found, MEASURED)},
        **there,
    )


def ram() -> int:
    """Bytes of this host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def product_rate(
    shape: tuple[int, int, int] = (1024, 1024, 1024),
    device: Any = None,
    dtype: Any = jnp.float32,
) -> float:
    """Returns operations a second of the best of a few products, on the CPU if on no `device`."""
    rows, inner, columns = shape
    a, b = (_ones(s, device, dtype) for s in ((rows, inner), (inner, columns)))
    return 2 * rows * inner * columns / least(jax.jit(jnp.matmul), a, b)


def copy_rate(size: int = 2**25, device: Any = None) -> float:
    """Returns bytes a second read and written by the best of a few copies, as `product_rate`."""
    a, times = _ones((size,), device), 4

    def copies(a: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, a: a + 1, a)

    return times * 2 * a.nbytes / least(jax.jit(copies), a)


def _ones(shape: tuple[int, ...], device: Any = None, dtype: Any = jnp.float32) -> Any:
    device = device or jax.local_devices(backend="cpu")[0]
    return jnp.ones(shape, dtype, device=device)


def least(f: Any, *given: Any, rounds: int = 5) -> float:
    """Seconds of the best of a few calls."""
    f(*given).block_until_ready()
    return min(_seconds(f, *given) for _ in range(rounds))


def _seconds(f: Any, *given: Any) -> float:
    start = time.perf_counter()
    f(*given).block_until_ready()
    return time.perf_counter() - start
