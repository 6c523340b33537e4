"""Experts in seconds, for tests and for trying things out."""

import dataclasses

from experiments import tiny
from lm.experiment import Experiment
from lm.nn.moe import Moe


def experiment() -> Experiment:
    """Returns `tiny` with eight experts a layer, of which a token meets two."""
    base = tiny.experiment()
    experts = Moe.Config(experts=8, top_k=2, hidden=64)
    return dataclasses.replace(
        base,
        name="moe_tiny",
        about="seconds on a laptop: tiny with eight experts, two a token",
        model=dataclasses.replace(base.model, ffn=experts),
        target="cpu:1",
    )
