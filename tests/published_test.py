"""Published runs beside what a plan predicts for them: `pytest -s tests/published_test.py`.

Their kernels and policies of what is kept are not this project's; each row has the policy nearest
to the published one. It is times that are compared: whether such a policy fits here is not asked.
"""

import dataclasses

import pytest

from lm.data.loader import Data
from lm.data.tokenizer import SentencePiece
from lm.experiment import Experiment, Train
from lm.models.transformer import Transformer
from lm.nn.ffn import Mlp
from lm.plan import make, target
from lm.sharding import MeshConfig

TIERS = "maxtext.readthedocs.io, models: optimized models tiering"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run that was published with its MFU, every key of a row counted."""

    name: str
    target: str
    mfu: float
    source: str
    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    length: int
    rows: int  # of a device
    mesh: MeshConfig
    remat: str


RUNS = (
    Run(
        name="Llama2-7B", target="h100:8", mfu=0.538, source="FSDP 8, 2 rows a GPU",
        layers=32, dim=4096, heads=32, kv_heads=32, hidden=11_008, vocab=32_000,
        length=4096, rows=2, mesh=MeshConfig(data=1, fsdp=8), remat="attention",
    ),
    Run(
        name="Llama2-70B", target="v5p:8x8x8", mfu=0.654, source=TIERS,
        layers=80, dim=8192, heads=64, kv_heads=8, hidden=28_672, vocab=32_000,
        length=4096, rows=4, mesh=MeshConfig(data=1, fsdp=512), remat="attention",
    ),
    Run(
        name="32B", target="v5p:4x4x4", mfu=0.715, source="MaxText, configs/v5p/32b.sh",
        layers=32, dim=8192, heads=64, kv_heads=64, hidden=28_672, vocab=32_000,
        length=2048, rows=7, mesh=MeshConfig(data=1, fsdp=16, tensor=4), remat="dots",
    ),
    Run(
        name="Llama3.1-70B", target="v6e:16x16", mfu=0.5033, source=TIERS,
        layers=80, dim=8192, heads=64, kv_heads=8, hidden=28_672, vocab=128_256,
        length=8192, rows=2, mesh=MeshConfig(data=1, fsdp=256), remat="full",
    ),
)  # fmt: skip


def _experiment(run: Run, devices: int) -> Experiment:
    return Experiment(
        name=run.name,
        model=Transformer.Config(
            layers=run.layers,
            dim=run.dim,
            heads=run.heads,
            kv_heads=run.kv_heads,
            vocab_size=run.vocab,
            ffn=Mlp.Config(hidden=run.hidden),
            tied=False,
            remat=run.remat,
        ),
        data=Data(
            source=("tfds:c4/en",),
            length=run.length,
            isolate=False,
            tokenizer=SentencePiece(),
        ),
        mesh=run.mesh,
        train=Train(batch_size=run.rows * devices),
    )


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_run_is_near_what_is_predicted(run):
    wanted = target.read(run.target)
    plan = make.plan(_experiment(run, wanted.devices), wanted)
    high, low = (
        plan.speed.mfu_full * plan.time.step / t
        for t in (plan.time.low, plan.time.high)
    )
    print(f"{run.name} on {run.target}: {run.mfu:.1%} published ({run.source}), "
          f"{plan.speed.mfu_full:.1%} predicted, {low:.1%} to {high:.1%}; "
          f"limited by {plan.time.limit}; {plan.memory.total / 2**30:.0f} GiB")  # fmt: skip
    assert low <= run.mfu <= high
