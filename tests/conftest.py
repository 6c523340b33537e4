"""What every test runs under: eight emulated CPU devices, checked types, a warm cache."""

import gc
import os
import pathlib
import platform
import re
from collections.abc import Callable

import pytest
import typecheck

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "jax"
GOLDEN = ROOT / "tests" / "golden"
DEVICES = 8

# Before any module of lm is imported: shapes and types of its functions are checked.
typecheck.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="run each test function once, with the first of its parameters",
    )
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden anew instead of comparing with it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets jax up before a test module can start a backend."""
    on_gpu = re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr") or "")
    if not on_gpu:
        os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start, too
    import jax

    if not on_gpu:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES)
        # Collectives of two programs in flight on emulated devices may wait for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        os.environ["XLA_FLAGS"] = " ".join(_flags(jax.__version_info__))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if not on_gpu:
        _keep_programs_of_several_devices_out_of_the_cache()


def _keep_programs_of_several_devices_out_of_the_cache() -> None:
    """On CPU an executable from the cache has lost the order of its collectives.

    Two of them that wait for nothing else then run at once, on each device in an order of its
    own, and are mistaken for each other or wait for ever (jaxlib 0.10.2 and 0.12.0).
    """
    from jax._src import compilation_cache

    put = compilation_cache.put_executable_and_time

    def put_of_one_device(key, name, executable, *rest):
        # One for devices that are not here has none, and cannot be loaded either.
        devices = getattr(executable, "local_devices", list)()
        if len(devices) == 1:
            put(key, name, executable, *rest)

    compilation_cache.put_executable_and_time = put_of_one_device


def _flags(version: tuple[int, ...]) -> list[str]:
    """XLA's options for the CPU that compile three times as fast; the code is slower."""
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
    if version < (0, 11):  # later versions do not know it
        flags.append("--xla_cpu_use_fusion_emitters=false")
    if platform.machine() in ("x86_64", "AMD64"):
        # Without fused multiply-add, how XLA groups operations changes no bit.
        flags.append("--xla_cpu_max_isa=AVX")
    return flags


def pytest_collection_finish() -> None:
    """Has fewer garbage collections: tracing makes many objects, and a sixth of it was those."""
    gc.collect()
    gc.freeze()  # modules and tests stay
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if not config.getoption("--quick"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], str]:
    """Returns `stored(name, text)`: what tests/golden/NAME holds.

    With --update-golden it writes `text` there first; `make golden` does that.
    """

    def stored(name: str, text: str) -> str:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing: run `make golden`"
        return path.read_text(encoding="utf-8")

    return stored


@pytest.fixture
def given_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of the CPU for plans, which else measure it (seconds); chips_test.py measures."""
    from lm.plan import cpu

    here = cpu.Rates(products=1e11, reach=0.9, copies=4e10, other=1e10, start=1e-5)
    monkeypatch.setattr(cpu, "rates", lambda: here)
