"""Pipeline schedules, as tables: order, bubble and memory are those of theory."""

import numpy as np
import pytest
import toy

from lm.models import timetable
from lm.models.timetable import IDLE, Pipeline

CASES = [
    ("gpipe", 2, 1, 1),
    ("gpipe", 4, 6, 1),
    ("1f1b", 2, 1, 1),
    ("1f1b", 4, 3, 1),
    ("1f1b", 4, 16, 1),
    ("1f1b", 8, 32, 1),
    ("interleaved", 2, 2, 2),
    ("interleaved", 2, 8, 2),
    ("interleaved", 4, 8, 3),
    ("interleaved", 4, 16, 2),
]


@pytest.fixture(params=CASES, ids=str)
def table(request):
    return timetable.make(*request.param)


def ticks(jobs, s):
    """Returns {job: tick} of a stage, each job once."""
    found = {int(j): t for t, j in enumerate(jobs[:, s]) if j != IDLE}
    assert len(found) == (jobs[:, s] != IDLE).sum()
    return found


def test_every_stage_does_every_job_once_each_way(table):
    for s in range(table.stages):
        for jobs in (table.forward, table.backward):
            assert sorted(ticks(jobs, s)) == list(range(table.jobs))


def test_a_result_is_used_by_the_neighbour_one_tick_after_it_was_made(table):
    """For it is not kept on the way: a stage has room for one."""
    P, v = table.stages, table.rounds
    forward = [ticks(table.forward, s) for s in range(P)]
    backward = [ticks(table.backward, s) for s in range(P)]
    for job in range(table.jobs):
        m, r = divmod(job, v)
        for s in range(P):
            if s or r:
                before = forward[s - 1][job] if s else forward[-1][m * v + r - 1]
                assert forward[s][job] == before + 1
            if s < P - 1 or r < v - 1:
                after = (
                    backward[s + 1][job] if s < P - 1 else backward[0][m * v + r + 1]
                )
                assert backward[s][job] == after + 1
            assert backward[s][job] >= forward[s][job] + (s < P - 1 or r < v - 1)


def test_the_bubble_is_that_of_theory(table):
    P, M, v = table.stages, table.microbatches, table.rounds
    assert table.bubble == pytest.approx((P - 1) / (v * M + P - 1))


def test_kept_inputs_are_as_few_as_stated_and_never_written_over(table):
    P, M, v = table.stages, table.microbatches, table.rounds
    gpipe = (table.backward[0] == IDLE).all() and table.head_slots == M
    bound = (
        M if gpipe and v == 1 and table.head_slots > 1 else min(v * M, 2 * v * P - 1)
    )
    assert table.slots <= bound
    for s in range(P):
        slots: dict[int, int] = {}
        for t in range(len(table.forward)):
            if (job := int(table.forward[t, s])) != IDLE:
                slot = int(table.forward_slot[t, s])
                assert slot not in slots
                slots[slot] = job
            if (job := int(table.backward[t, s])) != IDLE:
                assert slots.pop(int(table.backward_slot[t, s])) == job
        assert not slots


def test_loops_hold_all_ticks_and_leave_out_only_what_no_stage_does(table):
    kinds = [
        phase.kinds
        for loop in table.loops
        for _ in range(loop.times)
        for phase in loop.phases
        for _ in range(phase.ticks)
    ]
    assert len(kinds) == len(table.forward)
    last = table.rounds - 1
    for t, kind in enumerate(kinds):
        assert ("F" in kind) >= (table.forward[t] != IDLE).any()
        assert ("B" in kind) >= (table.backward[t] != IDLE).any()
        leaving = table.forward[t, -1]
        assert ("H" in kind) >= (leaving != IDLE and leaving % table.rounds == last)


def test_interleaving_makes_the_bubble_smaller_and_1f1b_the_memory():
    gpipe, one = timetable.make("gpipe", 4, 32), timetable.make("1f1b", 4, 32)
    two = timetable.make("interleaved", 4, 32, 2)
    assert gpipe.bubble == one.bubble > two.bubble
    assert (gpipe.slots, one.slots) == (32, 7)


def test_the_picture_is_this():
    assert timetable.make("1f1b", 2, 3).picture() == (
        "stage 0  F  0 1 2 . .\n"
        "         B  . . 0 1 2\n"
        "stage 1  F  . 0 1 2 .\n"
        "         B  . 0 1 2 .\n"
    )


@pytest.mark.parametrize(
    ("layers", "stages", "rounds"), [(30, 4, 1), (7, 2, 2), (8, 2, 4), (5, 4, 1)]
)
def test_no_layer_is_dropped_and_chunks_follow_each_other(layers, stages, rounds):
    places = timetable.placement(layers, stages, rounds)
    chunks = places.swapaxes(0, 1).reshape(stages * rounds, -1)
    kept = chunks[chunks != IDLE]
    np.testing.assert_array_equal(kept, np.arange(layers))
    counts = (chunks != IDLE).sum(1)
    assert counts.max() - counts.min() <= 1


def test_wrong_pipelines_are_refused():
    with toy.refused("interleaved needs pipeline.rounds"):
        Pipeline(schedule="interleaved")
    with toy.refused("pipeline.rounds=2", "interleaved"):
        Pipeline(rounds=2)
    with toy.refused("pipeline.microbatches=6", "mesh.pipe=4", "use 4 or 8"):
        Pipeline(schedule="interleaved", rounds=2, microbatches=6).count(4)
    with toy.refused("model.layers=3", "4 chunks", "mesh.pipe=4"):
        timetable.placement(3, 4)
