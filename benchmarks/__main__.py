"""All benchmarks: `python -m benchmarks [--quick] [--only NAME,...]`, or with `--gpu`.

Prints one section in Markdown for `benchmarks/RESULTS.md`. A part that fails says so in
one line and the others go on; the exit code is then 1.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "torch")


def step(quick: bool) -> str:
    from benchmarks import contest

    return contest.report(quick)


def loss_memory(quick: bool) -> str:
    from benchmarks import loss_memory

    return loss_memory.report(quick)


def loader(quick: bool) -> str:
    from benchmarks import loader

    if quick:
        loader.COPIES = loader.ROUNDS = 1
    with contextlib.redirect_stdout(io.StringIO()) as out:
        loader.main()
    return f"```text\n{out.getvalue().strip()}\n```"


def checkpoint(quick: bool) -> str:
    from benchmarks import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        result = checkpoint.measure(path, *((5, 1) if quick else (200, 5)))
    return (
        f"State of {result.megabytes:.0f} MiB: stall {result.stall * 1e3:.1f} ms ÷ "
        f"synchronous save {result.synchronous * 1e3:.0f} ms = {result.ratio:.3f}; "
        f"restore with checksums {result.restore * 1e3:.0f} ms."
    )


def startup(quick: bool) -> str:
    from benchmarks import startup

    return startup.report(quick)


def compilation(quick: bool) -> str:
    from benchmarks import compile as compilation

    return compilation.report(quick)


PARTS: dict[str, tuple[str, str, Callable[[bool], str]]] = {
    "step": ("Step of a small GPT", "contest", step),
    "loss": ("Memory of the loss", "loss_memory", loss_memory),
    "loader": ("Loader and token store", "loader", loader),
    "checkpoint": ("Stall of a checkpoint", "checkpoint", checkpoint),
    "startup": ("Start to first step", "startup", startup),
    "compile": ("Compile time by depth", "compile", compilation),
}


def heading(arguments: Sequence[str], module: str = "benchmarks") -> str:
    """Returns what a result means nothing without: date, command, hardware, versions."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    command = " ".join([f"python -m {module}", *arguments])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return "\n".join(
        [
            f"## {datetime.date.today().isoformat()}: `{command}`",
            "",
            f"- Hardware: {_processor()}, {_cores()} cores, load {load:.1f} at the start",
            f"- Versions: {', '.join(versions)}; {platform.system()}",
        ]
    )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor() -> str:
    """Returns the processor's name; Linux keeps it in /proc/cpuinfo."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts asked for; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--gpu" in given:
        from benchmarks import gpu

        return gpu.main([a for a in given if a != "--gpu"])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes, seconds")
    parser.add_argument("--only", default=",".join(PARTS), metavar="NAME,...")
    parser.add_argument("--gpu", action="store_true", help="what needs a GPU instead")
    flags = parser.parse_args(given)
    chosen = flags.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only={','.join(unknown)}: expected some of {', '.join(PARTS)}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(heading(given), flush=True)
    failed = False
    for name in chosen:
        title, module, part = PARTS[name]
        began = time.perf_counter()
        try:
            text = part(flags.quick)
        except Exception as error:  # one part must not cost the others
            failed = True
            text = (
                f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
        seconds = time.perf_counter() - began
        print(f"\n### {title} (`python -m benchmarks.{module}`, {seconds:.0f} s)\n")
        print(text, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
