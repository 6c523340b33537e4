"""Llama 3's 70B shape on 512 TPU v5p chips or H100s: fsdp 64 x tensor 8."""

import dataclasses

from experiments import llama_8b
from lm.experiment import Experiment, Train
from lm.nn.ffn import Mlp
from lm.sharding import MeshConfig


def experiment() -> Experiment:
    """Returns 70.6 G parameters, 4 M tokens a step, 1.4 T tokens of C4."""
    small = llama_8b.experiment()
    return dataclasses.replace(
        small,
        name="llama_70b",
        about="Llama 3 70B: 80 layers of 8192, 8 kv heads, head of its own",
        model=dataclasses.replace(
            small.model,
            layers=80,
            dim=8192,
            heads=64,
            ffn=Mlp.Config(hidden=28_672, activation="swiglu"),
            remat="full",
        ),
        optim=dataclasses.replace(small.optim, learning_rate=1.5e-4),
        mesh=MeshConfig(data=1, fsdp=64, tensor=8, sequence_parallel=True),
        train=Train(steps=335_000, batch_size=512),
        target="v5p:8x8x8, h100:64x8",
    )
