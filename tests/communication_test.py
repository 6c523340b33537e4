"""What a train step sends is what theory says: compiled for eight H100s, which need not be here.

XLA's CPU backend misleads: it forms no reduce-scatter and widens bf16. `make communication` prints
the table of docs/parallelism.md.
"""

import functools
import math
from typing import Any

import jax
import pytest
import toy

from lm import config, train, trees
from lm.experiment import load
from lm.plan import collectives, communication, minimum, topology
from lm.program import program

try:
    DEVICES: Any = topology.devices("h100:8")
    MISSING = ""
except config.ConfigError as error:
    DEVICES, MISSING = [], str(error)

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]

# Wide enough that norms, scalars and ids do not matter, and no two sizes are equal by chance.
MODEL = [
    *("model.layers=4", "model.dim=1024", "model.heads=16", "model.kv_heads=8"),
    *("model.ffn.hidden=4096", "model.attention.qk_norm=false", "model.remat=full"),
    *("data.tokenizer=SentencePiece", "model.vocab_size=8192"),
    *("data.length=1024", "data.isolate=false", "mesh.data=1"),
    *("train.batch_size=64", "optim.algorithm=AdamW"),
]
MOE = ["model.ffn=Moe", "model.ffn.hidden=2048", "mesh.expert=8"]
MESHES = {
    "data 8": ["mesh.data=8"],
    "data 8, zero1": ["mesh.data=8", "mesh.zero1=true"],
    "data 8, accumulate 4": ["mesh.data=8", "train.accumulate=4"],
    "fsdp 8": ["mesh.fsdp=8"],
    "fsdp 8, no remat, head not tied": [
        "mesh.fsdp=8",
        "model.remat=none",
        "model.tied=false",
    ],
    "fsdp 8, no remat": ["mesh.fsdp=8", "model.remat=none"],
    "fsdp 8, accumulate 4": ["mesh.fsdp=8", "train.accumulate=4"],
    "fsdp 8, head not tied": ["mesh.fsdp=8", "model.tied=false"],
    "data 2 x fsdp 4": ["mesh.data=2", "mesh.fsdp=4"],
    "tensor 8": ["mesh.tensor=8"],
    "tensor 8, no remat": ["mesh.tensor=8", "model.remat=none"],
    "tensor 8, sequence": ["mesh.tensor=8", "mesh.sequence_parallel=true"],
    "fsdp 4 x tensor 2": ["mesh.fsdp=4", "mesh.tensor=2"],
    "pipe 4": ["mesh.pipe=4"],
    "pipe 2 x tensor 4, sequence": [
        *("mesh.pipe=2", "mesh.tensor=4", "mesh.sequence_parallel=true"),
    ],
    "pipe 4 x data 2": ["mesh.pipe=4", "mesh.data=2"],
    "pipe 4 x fsdp 2": ["mesh.pipe=4", "mesh.fsdp=2"],
    "pipe 4 x fsdp 2, gathered once": [
        "mesh.pipe=4",
        "mesh.fsdp=2",
        "pipeline.gather=step",
    ],
    "seq 8, ring": [
        "mesh.seq=8",
        "model.attention.context=ring",
        "model.remat=attention",
    ],
    "seq 8, gather": ["mesh.seq=8", "model.attention.context=gather"],
    "expert 8": MOE,
    "expert 4 x fsdp 2": [*MOE, "mesh.expert=4", "mesh.fsdp=2"],
}
# Of the same width; two stacks of other lengths.
SIZES = [
    *("model.dim=1024", "model.heads=16", "model.layers=2", "model.ffn.hidden=4096"),
    *("model.vocab_size=8192", "model.dropout=0", "model.remat=full", "mesh.data=1"),
    *("train.batch_size=64", "eval.batch_size=64", "optim.algorithm=AdamW"),
]
T5 = [
    *(*SIZES, "model.encoder_layers=2", "data.length=1024"),
    *("objective.target_length=512", "model.scan=true", "pipeline.schedule=gpipe"),
]
BERT = [*SIZES, "data.length=512", "model.positions.length=512"]
LSTM = [s for s in SIZES if "heads" not in s and "ffn" not in s]
OTHERS = {
    "two stacks: fsdp 8": ("translate_en_es", [*T5, "mesh.fsdp=8"]),
    "two stacks: tensor 8, sequence": (
        "translate_en_es",
        [*T5, "mesh.tensor=8", "mesh.sequence_parallel=true"],
    ),
    "two stacks: pipe 2 x fsdp 4": (
        "translate_en_es",
        [*T5, "mesh.pipe=2", "mesh.fsdp=4", "model.norms=before"],
    ),
    "two stacks: seq 8, ring": (
        "translate_en_es",
        [*T5, "mesh.seq=8", "model.attention.context=ring", "model.remat=attention"],
    ),
    "encoder: tensor 8": ("bert_tiny", [*BERT, "mesh.tensor=8"]),
    # XLA made zeros of this one's activations once, see `program.WRONG_PASS`.
    "two stacks: pipe 2 x tensor 4, sequence": (
        "translate_en_es",
        [*T5, "mesh.pipe=2", "mesh.tensor=4", "mesh.sequence_parallel=true"],
    ),
    "encoder: pipe 2 x fsdp 4": ("bert_tiny", [*BERT, "mesh.pipe=2", "mesh.fsdp=4"]),
    "recurrent: tensor 8": (
        "shakespeare_lstm",
        [*LSTM, "data.length=512", "model.mixer.hidden=1024", "mesh.tensor=8"],
    ),
}
ALL = [*MESHES, *OTHERS]
SHARE = 1.05  # of the minimum, norms' gradients, ids and scalars included
# Where gradients are reduced whole in the loop over layers and cut into shares after it, as XLA
# does over two axes of the batch at once.
CUT = {"expert 4 x fsdp 2"}


def programs(mesh: str) -> Any:
    """Returns the program of a mesh, on the devices that are not here."""
    model = MODEL if "expert" not in mesh else [s for s in MODEL if "ffn" not in s]
    if mesh in OTHERS:
        name, sets = OTHERS[mesh]
        chosen = config.override(load(name), sets)
    else:
        chosen = config.override(toy.BASE, [*model, *MESHES[mesh]])
    count = math.prod(chosen.mesh.sizes().values())
    layout = topology.sharding.make_layout(chosen.mesh, DEVICES[:count])
    return program(chosen, layout)


@functools.cache
def sent(mesh: str) -> tuple[Any, list[collectives.Collective]]:
    """Returns a program and the collectives of its compiled step."""
    prog = programs(mesh)
    text = communication.compiled(prog).as_text()
    return prog, collectives.read(text, prog.layout.mesh)


@pytest.mark.parametrize("mesh", ALL)
def test_a_step_sends_what_it_has_to(mesh):
    """In all, and over every mesh axis; no kind of collective is there that has no reason."""
    prog, found = sent(mesh)
    rows = communication.compare(prog, found)
    table = communication.table(rows, mesh, 0)
    if mesh in CUT:
        assert communication.ratio(rows) <= SHARE, table
        assert any(not r.needed and r.kind == "all-reduce" for r in rows), table
        return
    assert communication.ratio(rows) <= SHARE, table
    total = sum(r.sent for r in rows)
    for axes in {r.axes for r in rows}:
        here = [r for r in rows if r.axes == axes]
        extra = sum(r.sent for r in here) - sum(r.needed for r in here)
        assert extra <= (SHARE - 1) * total, table
    for row in rows:
        assert row.needed or row.sent <= 0.01 * total, table
        # Nothing is sent in parts that the reader does not see.
        assert row.sent >= 0.999 * row.needed, table


@pytest.mark.parametrize("mesh", ALL)
def test_weights_are_gathered_in_the_dtype_of_compute(mesh):
    """ZeRO-1 gathers fp32 parameters once a step, and a router's scores are fp32."""
    _, found = sent(mesh)
    total = sum(c.bytes for c in found)
    gathered = sum(
        c.by_dtype().get("f32", 0.0) for c in found if c.kind == "all-gather"
    )
    assert gathered <= 0.01 * total or "zero1" in mesh


@pytest.mark.parametrize("mesh", ALL)
def test_only_experts_send_all_to_all(mesh):
    _, found = sent(mesh)
    kinds = {c.kind for c in found}
    assert ("all-to-all" in kinds) == ("expert" in mesh)
    assert "ragged-all-to-all" not in kinds


def test_without_drops_tokens_move_by_ragged_all_to_all():
    """To the experts and back, forward and backward; XLA's CPU backend has none to test."""
    sets = [*MODEL, *MOE, "model.ffn.dispatch=Dropless", "model.layers=1"]
    chosen = config.override(toy.BASE, sets)
    prog = program(chosen, topology.sharding.make_layout(chosen.mesh, DEVICES))
    text = communication.compiled(prog).as_text()
    assert text.count(" ragged-all-to-all-start(") == 4


@pytest.mark.parametrize("mesh", ["data 8", "data 8, accumulate 4", "seq 8, ring"])
def test_no_gradient_is_reduced_twice(mesh):
    """Entries reduced are those of the parameters, an embedding that is also the head once."""
    prog, found = sent(mesh)
    sizes = {"bf16": 2, "f32": 4}
    reduced = sum(
        c.times * size / sizes[dtype]
        for c in found
        if c.kind == "all-reduce"
        for dtype, size in c.operands
        if dtype in sizes
    )
    params = sum(math.prod(x.shape) for x in prog.shapes.values())
    assert params <= reduced <= params + 1000


def test_gradients_of_layers_are_reduced_to_the_stored_shares():
    """Of weights that are joined before they are used too: no all-reduce but of norms."""
    for mesh in ("fsdp 8", "fsdp 8, accumulate 4", "fsdp 4 x tensor 2"):
        _, found = sent(mesh)
        over = [c for c in found if c.kind == "all-reduce" and "fsdp" in c.axes]
        assert sum(c.bytes for c in over) < 0.01 * sum(c.bytes for c in found), mesh


def test_the_state_of_a_topology_is_abstract():
    """A mesh of devices that are not here has shardings like any other."""
    prog = programs("fsdp 8")
    leaves = jax.tree.leaves(train.abstract_batch(prog))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    assert {d.platform for d in prog.layout.mesh.devices.flat} <= {"gpu", "cuda"}
    assert prog.layout.platform == "gpu"
    assert trees.flatten(minimum.totals(minimum.of(prog)))


if __name__ == "__main__":  # `make communication`
    head = (
        "| mesh | what | needed, MB | sent, MB | sent / needed |\n|---|---|---|---|---|"
    )
    print(f"jax {jax.__version__}, {DEVICES[0].device_kind if DEVICES else MISSING}")
    print(head)
    for name in ALL if DEVICES else ():
        print(communication.table(communication.compare(*sent(name)), name), flush=True)
