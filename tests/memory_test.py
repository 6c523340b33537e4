"""What a plan says of memory is what compilers say: of state exactly, of a step within 10 %."""

import math

import jax
import pytest
import toy

from lm import train
from lm.experiment import load, names
from lm.plan import memory, target
from lm.program import program


def there(tree):
    """Returns the bytes of a device's shards, from the shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def shipped(name):
    """Returns a shipped experiment on a target that it fits."""
    chosen = load(name)
    sizes = chosen.mesh.sizes().values()
    count = max(8, math.prod(abs(n) for n in sizes))
    gpus = target.read(f"h100:{count // 8}x8")
    return program(chosen, gpus.layout(chosen.mesh))


@pytest.mark.parametrize("name", names())
def test_state_is_that_of_the_step_to_the_byte(name):
    prog = shipped(name)
    found = memory.state(prog)
    expected = train.abstract_state(prog)
    assert found.parameters == there(expected.params)
    assert found.parameters + found.optimizer == there(expected)
    assert found.batch == there(train.abstract_batch(prog))
    whole = memory.memory(prog)
    assert whole.total > found.parameters + found.optimizer + found.batch


MESHES = {
    "fsdp 4 x tensor 2": ["mesh.fsdp=4", "mesh.tensor=2", "optim.ema=0.99"],
    "zero1": ["mesh.data=8", "mesh.zero1=true"],
}


@pytest.mark.parametrize("mesh", MESHES)
def test_state_is_what_a_compiled_step_takes(mesh):
    sets = ["mesh.data=1", "optim.algorithm=AdamW", "model.dim=64", "model.heads=8"]
    prog = toy.program(*sets, "train.batch_size=32", "model.kv_heads=8", *MESHES[mesh])
    step = train.make_train_step(prog)
    lowered = step.lower(train.abstract_state(prog), train.abstract_batch(prog))
    taken = lowered.compile().memory_analysis().argument_size_in_bytes
    found = memory.state(prog)
    total = found.parameters + found.optimizer + found.batch
    assert total == pytest.approx(taken, rel=0.005)
