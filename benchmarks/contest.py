"""The small GPT's step: bare JAX against `lm`, PyTorch eager and `torch.compile`.

`python -m benchmarks.contest [--quick] [--rounds N]`. Every contestant starts from equal
weights and trains on the same batch, so that their losses must be equal, step by step.
"""

import argparse
import importlib.util
from collections.abc import Callable

from benchmarks import gpt as small
from benchmarks import timing

EQUAL = 1e-4  # relative difference of losses above which contestants differ in maths
TOY = small.Gpt(layers=2, dim=64, heads=2, vocab=512, length=64, batch=2)


def toy_bare() -> Callable[[], float]:
    from benchmarks import bare

    return bare.factory(TOY)


def toy_lm() -> Callable[[], float]:
    from benchmarks import step

    return step.factory(TOY)


def toy_eager() -> Callable[[], float]:
    from benchmarks import torch_gpt

    return torch_gpt.factory(gpt=TOY)


FULL = {
    "bare JAX": "benchmarks.bare:factory",
    "lm": "benchmarks.step:factory",
    "torch eager": "benchmarks.torch_gpt:eager",
    "torch.compile": "benchmarks.torch_gpt:compiled",
}
QUICK = {
    "bare JAX": "benchmarks.contest:toy_bare",
    "lm": "benchmarks.contest:toy_lm",
    "torch eager": "benchmarks.contest:toy_eager",
}


def run(quick: bool = False, rounds: int = 10) -> dict[str, timing.Timing]:
    """Times all contestants, those with PyTorch only where it is installed."""
    chosen = QUICK if quick else FULL
    if importlib.util.find_spec("torch") is None:
        chosen = {name: f for name, f in chosen.items() if "torch" not in name}
    contestants = {n: timing.Contestant(factory=f) for n, f in chosen.items()}
    return timing.run(contestants, rounds=2 if quick else rounds)


def difference(timings: dict[str, timing.Timing]) -> float:
    """Returns the largest relative difference from the first contestant's losses."""
    first = next(iter(timings.values())).values
    return max(
        abs(a - b) / abs(a)
        for t in timings.values()
        for a, b in zip(first, t.values, strict=True)
    )


def report(quick: bool = False, rounds: int = 10) -> str:
    """Returns the table, in Markdown, and whether the losses are equal.

    Raises RuntimeError if they are not.
    """
    timings = run(quick, rounds)
    worst = difference(timings)
    losses = ", ".join(f"{name} {t.values[-1]:.6f}" for name, t in timings.items())
    if worst > EQUAL:
        raise RuntimeError(f"losses differ by {worst:.1e}, more than {EQUAL}: {losses}")
    lines = [timing.table(timing.summary(timings)), ""]
    lines += [f"Losses of the last step: {losses}; equal to {worst:.1e} at every step."]
    if "torch eager" not in timings:
        lines += [
            "PyTorch is not installed: pip install -e '.[bench]' compares with it."
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--rounds", type=int, default=10)
    print(report(**vars(parser.parse_args())))
