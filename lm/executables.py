"""Compiled programs kept on disk, so that the next start neither traces nor compiles them.

jax's own cache saves the compilation, but a program has to be traced and lowered again to be
found in it: for a small model two thirds of the time from the start to the first step. An
executable here is found by all that it was made from instead: the experiment, the mesh, the
arguments' types, the code of this package, versions, devices and options of the compiler.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import platform
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

KEPT = 64  # files; older ones go
FOLDER = "executables"  # within jax's compilation cache
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
OPTIONS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # environment variables of the compilers
HIT = (
    "/jax/compilation_cache/cache_hits"  # jax's event for a program from its own cache
)


def ready(
    compiled: Callable[[], Any],
    args: Any,
    devices: Sequence[Any],
    made_from: Mapping[str, str],
) -> Callable[..., Any]:
    """Returns the executable of these arguments: the kept one, or `compiled()`, which is then kept.

    Nothing is kept without a compilation cache, if jax found the program in it, in one of several
    processes, or for several CPU devices (an executable that is loaded again has lost the order of
    its collectives there).

    Args:
        compiled: traces and compiles.
        args: what the executable will be called with; arrays or their shapes.
        devices: that it runs on.
        made_from: what else it depends on besides the arguments, this package and the machine.
    """
    path = _path(args, devices, made_from)
    if path is None:
        return compiled()
    # Damaged, not for this machine, out of reach: whatever is wrong, it is made anew.
    with contextlib.suppress(Exception):
        return _load(path, devices)
    with _events() as seen:
        executable = compiled()
    if HIT in seen:
        return executable  # one that was read cannot be written: XLA leaves its kernels out
    # A full disk, or a backend that cannot: the next start compiles again.
    with contextlib.suppress(Exception):
        _keep(path, executable)
    return executable


@contextlib.contextmanager
def _events() -> Iterator[set[str]]:
    """Collects the events that jax tells of."""
    seen: set[str] = set()

    def listen(event: str, **_: Any) -> None:
        seen.add(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _path(
    args: Any, devices: Sequence[Any], made_from: Mapping[str, str]
) -> pathlib.Path | None:
    """Where the executable is or would be; None if it is not to be kept."""
    root = jax.config.values["jax_compilation_cache_dir"]
    leaves, tree = jax.tree.flatten(args)
    cpus = len(devices) > 1 and devices[0].platform == "cpu"
    if not root or "://" in root or cpus or jax.process_count() > 1:
        return None
    types = [(str(jax.typeof(x)), str(x.sharding)) for x in leaves]
    here = ([d.id for d in devices], _machine(devices[0]), source())
    whole = (types, str(tree), here, sorted(made_from.items()))
    key = hashlib.sha256(repr(whole).encode()).hexdigest()
    return pathlib.Path(root) / FOLDER / key


def _machine(device: Any) -> tuple[Any, ...]:
    """Versions, options and the kind of device that an executable depends on."""
    return (
        device.device_kind,
        jax.device_count(),
        device.client.platform_version,
        platform.python_version(),
        versions(),
        [os.environ.get(name, "") for name in OPTIONS],
        sorted((name, str(value)) for name, value in jax.config.values.items()),
        _instructions() if device.platform == "cpu" else "",
    )


def versions(packages: Sequence[str] = ()) -> list[str]:
    """Returns those of the packages that programs are made by, and of more of them."""
    return [importlib.metadata.version(name) for name in (*PACKAGES, *packages)]


def _instructions() -> str:
    """The instruction sets of this CPU, which others may lack."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return found[2] if found else platform.processor()


@functools.cache
def source(but: Collection[str] = ()) -> str:
    """Returns a hash of the package's code, without these files."""
    root, digest = pathlib.Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name not in but:
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _load(path: pathlib.Path, devices: Sequence[Any]) -> Callable[..., Any]:
    whole = path.read_bytes()
    digest, body = whole[:32], whole[32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{path}: damaged")
    payload, in_tree, out_tree = pickle.loads(body)
    executable = serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, devices[0].client, devices
    )
    with contextlib.suppress(OSError):  # a cache that others share may be read-only
        os.utime(path)  # used, so not among the oldest
    return executable


def _keep(path: pathlib.Path, executable: Any) -> None:
    """Publishes the executable atomically, and lets the oldest ones go."""
    body = pickle.dumps(serialize_executable.serialize(executable))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(hashlib.sha256(body).digest() + body)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    files = sorted(path.parent.iterdir(), key=lambda f: f.stat().st_mtime)
    for old in files[:-KEPT]:
        old.unlink(missing_ok=True)
