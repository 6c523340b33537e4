"""Llama 3's 8B shape with rows of 128k tokens, on 128 TPU v5p chips: seq 8 x fsdp 16."""

import dataclasses

from experiments import llama_8b
from lm.experiment import Eval, EvalSet, Experiment, Train
from lm.nn.rope import Rope
from lm.optim import Cosine
from lm.sharding import MeshConfig


def experiment() -> Experiment:
    """Returns 8.0 G parameters, 4 M tokens a step, 20 G tokens of C4."""
    short = llama_8b.experiment()
    return dataclasses.replace(
        short,
        name="llama_8b_128k",
        about="Llama 3 8B with a context of 128k tokens, split over devices",
        model=dataclasses.replace(
            short.model, positions=Rope(base=8_000_000.0), remat="full"
        ),
        data=dataclasses.replace(short.data, length=131_072),
        optim=dataclasses.replace(
            short.optim, learning_rate=1e-4, schedule=Cosine(warmup=200)
        ),
        mesh=MeshConfig(data=1, fsdp=16, seq=8),
        train=Train(steps=5000, batch_size=32, accumulate=2),
        eval=Eval(every=1000, sets=(EvalSet(batches=2),)),
        target="v5p:4x4x8",
    )
