"""Stored weights of a pipeline gathered once a step: what is sent when, and what it holds."""

import functools

import hlo
import jax
import pytest
import toy

from lm import train
from lm.plan import collectives, communication, minimum, placement

WIDE = ["model.layers=4", "model.dim=64", "model.ffn.hidden=256", "model.tied=false"]
MESH = ["mesh.pipe=2", "mesh.data=2", "mesh.fsdp=2", "pipeline.microbatches=2"]


@functools.cache
def compiled(gather):
    prog = toy.program(*WIDE, *MESH, f"pipeline.gather={gather}")
    return prog, communication.compiled(prog)


def over_fsdp(gather):
    """Collectives over fsdp that move more than scalars and gradients of norms."""
    prog, program = compiled(gather)
    found = hlo.collectives(program.as_text(), prog.layout.mesh)
    return [c for c in found if "fsdp" in c.axes and c.bytes > 4096]


def test_no_tick_sends_over_fsdp():
    looped = {c.kind for c in over_fsdp("tick") if c.looped}
    assert {"all-gather", "reduce-scatter"} <= looped
    once = over_fsdp("step")
    assert {c.kind for c in once} == {"all-gather", "reduce-scatter"}
    assert not any(c.looped for c in once)


def test_a_step_gathers_and_reduces_what_the_formula_says():
    prog, _ = compiled("step")
    needed = minimum.totals(minimum.of(prog))
    sent = collectives.totals(over_fsdp("step"))
    for key, size in sent.items():
        assert size == pytest.approx(needed[key], rel=1e-6), key
    assert sum(k == "all-gather" for k, _ in sent) == 1


def test_whole_weights_and_gradients_are_held_and_counted():
    """What the compiled step holds more is at least what the run's first lines say, and at most
    twice that: XLA's CPU backend keeps a second copy of what goes through a loop."""
    prog, step = compiled("step")
    _, tick = compiled("tick")
    state = train.abstract_state(prog)
    whole = placement.gathered_bytes(prog)
    entries = sum(x.size for x in jax.tree.leaves(state.params))
    assert 0.9 * entries < whole / 4 * 2 < entries  # fp32 here; half is on a stage
    assert "weights gathered for a step" in placement.lines(prog, state)[0]
    more = [m.memory_analysis().temp_size_in_bytes for m in (step, tick)]
    said = whole + whole // 2  # gradients were there, in shares
    assert said < more[0] - more[1] < 2 * said, (more, said)
