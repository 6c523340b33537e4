"""What a run says of the bytes on a device is what lies there."""

import jax
import pytest
import toy
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from lm import config, experiment, train
from lm.nn import ffn
from lm.plan import make, placement, target
from lm.terminal import size

MESHES = {
    "fsdp x tensor": ["mesh.fsdp=4", "mesh.tensor=2"],
    "pipe x data, zero1": [
        "mesh.pipe=2", "mesh.data=4", "mesh.zero1=true", "pipeline.microbatches=2",
    ],
    "seq": ["mesh.seq=8", "mesh.data=1"],
}  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES)
def test_the_bytes_said_are_those_on_a_device(mesh):
    prog = toy.program(*MESHES[mesh], "optim.algorithm=AdamW")
    state = toy.start(prog)
    device = jax.devices()[0]

    def there(tree):
        shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
        return sum(s.data.nbytes for s in shards if s.device == device)

    assert placement.held(train.abstract_state(prog).params) == there(state.params)
    line = placement.lines(prog, state)[0]
    assert f"parameters {size(there(state.params))}," in line
    assert f"optimizer {size(there(state.opt_state))}," in line


def test_large_copies_are_named_with_their_axis():
    wide = ["model.dim=512", "model.ffn.hidden=1024", "model.layers=2"]
    (line,) = placement.copies(toy.program(*wide, "mesh.seq=8", "mesh.data=1"))
    assert line.startswith("copied along seq 8: ")
    assert "layers/ffn/up_df 4.19 MB" in line
    assert "norm" not in line
    assert not placement.copies(toy.program(*wide, "mesh.data=8"))
    assert not placement.copies(toy.program(*wide, "mesh.fsdp=8"))


def test_a_plan_says_how_attention_is_computed_and_what_packed_rows_cost():
    chosen = experiment.load("llama_1b")

    def said(isolate):
        one = config.override(chosen, [f"data.isolate={isolate}"])
        prog = train.program(one, target.read("h100:8").layout(one.mesh))
        return make._attention(prog)

    assert said("true") == ("Attention: blockwise; cudnn with data.isolate=false.",)
    assert said("false") == ("Attention: cudnn.",)


def test_a_sharding_that_does_not_fit_names_the_parameters(monkeypatch):
    einsum = ffn.einsum
    wrong = P(None, None, "fsdp")
    monkeypatch.setattr(ffn, "einsum", lambda *given: reshard(einsum(*given), wrong))
    prog = toy.program("mesh.fsdp=2", "mesh.tensor=4")
    with toy.refused("lm/nn/ffn.py:", "with Mlp's up_df, gate_df", "mesh.fsdp=2"):
        make.checked(prog)
