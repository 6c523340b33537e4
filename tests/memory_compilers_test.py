"""What a plan says of a step's memory is what the compilers of H100s and TPUs say, within 10 %.

Minutes for each: what they said is kept under the cache directory.
"""

import pytest
import toy

from lm import config
from lm.plan import compiling, memory, target, topology
from lm.program import program

# So large that what a device holds beside large arrays does not matter.
MODEL = [
    *("model.layers=8", "model.dim=1024", "model.heads=16", "model.kv_heads=8"),
    *("model.attention.qk_norm=false", "data.tokenizer=SentencePiece"),
    *("model.vocab_size=32768", "data.length=2048", "data.isolate=true"),
    *("mesh.data=1", "optim.algorithm=AdamW", "optim.weight_decay=0.1"),
    "optim.clip_norm=1.0",
]
DENSE = ["model.ffn.hidden=4096"]
CELLS = {
    "data 8, none": [*DENSE, "mesh.data=8", "model.remat=none", 16],
    "data 8, attention": [*DENSE, "mesh.data=8", "model.remat=attention", 32],
    "fsdp 8, full": [*DENSE, "mesh.fsdp=8", "model.remat=full", 64],
    "fsdp 4 x tensor 2, full": [
        *(*DENSE, "mesh.fsdp=4", "mesh.tensor=2", "model.remat=full"),
        64,
    ],
    "fsdp 4 x tensor 2, sequence": [
        *(*DENSE, "mesh.fsdp=4", "mesh.tensor=2", "model.remat=attention"),
        *("mesh.sequence_parallel=true", 32),
    ],
    "pipe 2 x fsdp 4": [*DENSE, "mesh.pipe=2", "mesh.fsdp=4", "model.remat=full", 64],
    "seq 2 x fsdp 4": [
        *(*DENSE, "mesh.seq=2", "mesh.fsdp=4", "model.remat=attention"),
        32,
    ],
    "expert 8": [
        *("model.ffn=Moe", "model.ffn.hidden=2048", "mesh.expert=8"),
        *("model.remat=full", 32),
    ],
}
SHARE = 0.1
# XLA for TPUs fuses more of blockwise attention than a jaxpr shows, and adds a chunk's gradients
# where they are kept: the plan says too much.
MORE = {("v5e", "seq 2 x fsdp 4"): 0.18, ("v5e", "pipe 2 x fsdp 4"): 0.16}
CHIPS = [
    pytest.param("h100:8", marks=pytest.mark.compile),
    pytest.param("v5e:2x4", marks=[pytest.mark.tpu_compile, pytest.mark.timeout(1500)]),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_holds_what_its_compiler_says(cell, chip):
    wanted = target.read(chip)
    try:
        topology.check(wanted)
    except config.ConfigError as error:
        pytest.skip(str(error))
    *sets, rows = CELLS[cell]
    sizes = [f"train.batch_size={rows}", f"eval.batch_size={rows}"]
    chosen = toy.experiment(*MODEL, *sets, *sizes)
    found = compiling.compiled(chosen, wanted)
    planned = memory.memory(program(chosen, wanted.layout(chosen.mesh)))
    assert not found.refusal
    share = MORE.get((wanted.chip.name, cell), SHARE)
    assert planned.total == pytest.approx(found.total, rel=share)
    state = planned.parameters + planned.optimizer + planned.activations["ids"]
    assert state == pytest.approx(found.arguments, rel=0.005)
