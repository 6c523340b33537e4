"""Bytes of collectives, however XLA writes them, and the formulas of what must be sent, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax import lax
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.config import ConfigError
from lm.plan import collectives, communication, minimum, target, topology
from lm.sharding import MeshConfig

MESH = sharding.abstract_layout(MeshConfig(data=2, tensor=4), 8).mesh

TEXT = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%later (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %moved = bf16[8,16]{1,0} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%body (s: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %s = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%s), index=1
  %y = f32[4]{0} constant({1, 2, 3, 4})
  %gathers = ((bf16[8,16]{1,0}, /*index=1*/f32[4]{0}), (bf16[32,16]{1,0}, f32[16]{0})) all-gather-start(%x, %y), replica_groups=[2,4]<=[8], dimensions={0}
  %gathered = (bf16[32,16]{1,0}, f32[16]{0}) all-gather-done(%gathers)
  %go = ((bf16[8,16]{1,0}), bf16[8,16]{1,0}, s32[]) async-start(%x), calls=%later
  %gone = bf16[8,16]{1,0} async-done(%go), calls=%later
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %gone)
}

%test (s: (s32[], bf16[8,16])) -> pred[] {
  %s.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (w: bf16[8,16]) -> f32[] {
  %w = bf16[8,16]{1,0} parameter(0)
  %start = (s32[], bf16[8,16]{1,0}) tuple(%zero, %w)
  %loop = (s32[], bf16[8,16]{1,0}) while(%start), condition=%test, body=%body
  %sends = (bf16[8,16]{1,0}, bf16[8,16]{1,0}) collective-permute-start(%w), source_target_pairs={{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}
  %came = bf16[8,16]{1,0} collective-permute-done(%sends)
  %share = ((bf16[8,16]{1,0}), bf16[4,16]{1,0}) reduce-scatter-start(%w), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={0}, to_apply=%add
  %shared = bf16[4,16]{1,0} reduce-scatter-done(%share)
  ROOT %all = f32[] all-reduce(%one), replica_groups={}, to_apply=%add
  %one = f32[] constant(1)
}
"""  # noqa: E501


def test_loops_pairs_and_tuples_are_counted():
    """A loop whose condition alone says that it runs five times; 256 bytes of bf16[8,16]."""
    found = {c.kind: c for c in collectives.read(TEXT, MESH)}
    assert {k: (set(c.axes), c.times) for k, c in found.items()} == {
        "all-gather": ({"tensor"}, 5),
        "all-to-all": ({"tensor"}, 5),
        "collective-permute": ({"data"}, 1),
        "reduce-scatter": ({"data"}, 1),
        "all-reduce": ({"data", "tensor"}, 1),
    }
    assert found["all-gather"].by_dtype() == {"bf16": 5 * 3 * 256, "f32": 5 * 3 * 16}
    assert found["all-to-all"].bytes == 5 * 256 * 3 / 4
    assert found["collective-permute"].bytes == 256
    assert found["reduce-scatter"].bytes == 128
    assert found["all-reduce"].bytes == 2 * 4 * 7 / 8
    assert [k for k, c in found.items() if c.looped] == ["all-to-all", "all-gather"]


def test_a_loop_of_unknown_length_has_no_bytes():
    text = TEXT.replace("direction=LT", "direction=NE")
    (gather,) = [c for c in collectives.read(text, MESH) if c.kind == "all-gather"]
    with pytest.raises(ValueError, match="loop of unknown length"):
        _ = gather.bytes


def test_a_permute_from_nobody_is_refused():
    text = TEXT.replace(
        "all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}",
        "collective-permute(%p), source_target_pairs={}",
    )
    assert text != TEXT
    with pytest.raises(ValueError, match="by zeros"):
        collectives.read(text, MESH)


def test_loops_in_loops_multiply():
    """A compiled program: a sum over tensor, three times in each of two rounds."""
    on = toy.layout(MeshConfig(data=2, tensor=4))

    def total(x):
        def once(x, _):
            return lax.psum(x, "tensor") * 0.1, None

        def inner(x, _):
            return lax.scan(once, x, length=3)[0], None

        return lax.scan(inner, x, length=2)[0]

    with sharding.use(on):
        spec = P("data", "tensor")
        run = functools.partial(jax.shard_map, in_specs=spec, out_specs=spec)
        x = jax.device_put(np.ones((8, 16), np.float32), sharding.shard(on, spec))
        text = jax.jit(run(total, check_vma=False)).lower(x).compile().as_text()
    (found,) = collectives.read(text, on.mesh)
    assert (found.kind, found.times, found.looped) == ("all-reduce", 6, True)
    assert found.bytes == 6 * 2 * 3 / 4 * 4 * 4 * jnp.float32(0).nbytes


def needed(*sets):
    """Returns the minimum by kind, axes and reason of a model of two layers, D 32, F 64, V 320."""
    prog = toy.program("model.attention.qk_norm=false", "model.dtype=bfloat16", *sets)
    return {(t.what, t.kind, *t.axes): 0 for t in minimum.of(prog)}, prog


def summed(what, *sets):
    """Returns the bytes of a reason, by kind."""
    _, prog = needed(*sets)
    found: dict[str, float] = {}
    for t in minimum.of(prog):
        if t.what == what:
            found[t.kind] = found.get(t.kind, 0) + t.bytes
    return found


LAYER = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64  # query and out, key and value, swiglu


def test_fsdp_gathers_once_or_twice_and_scatters_once():
    """Bytes of bf16 weights of two layers, less the eighth that is there."""
    once = 2 * LAYER * 2 * 7 / 8
    assert summed("weights: layers", "mesh.fsdp=8") == {"all-gather": once}
    twice = summed("weights: layers", "mesh.fsdp=8", "model.remat=full")
    assert twice == {"all-gather": 2 * once}
    assert summed("gradients: layers", "mesh.fsdp=8") == {"reduce-scatter": once}
    parts = summed("gradients: layers", "mesh.fsdp=8", "train.accumulate=2")
    assert parts == {"reduce-scatter": 2 * once}


def test_replicas_reduce_in_bf16_at_once_or_in_fp32_at_the_end():
    once = summed("gradients: layers", "mesh.data=8")
    assert once == {"all-reduce": 2 * LAYER * 2 * 2 * 7 / 8}
    for parts in (2, 1):  # sixteen rows
        sets = ("mesh.data=4", "mesh.tensor=2", f"train.accumulate={parts}")
        item, share = (4 if parts > 1 else 2), LAYER * 2 / 2
        expected = {"all-reduce": share * item * 2 * 3 / 4}
        assert summed("gradients: layers", *sets) == expected


def test_tensor_reduces_four_times_a_layer():
    """Of 16 rows of 16 tokens in bf16; sequence parallelism moves as much."""
    act = 16 * 16 * 32 * 2
    plain = summed("tensor: layers", "mesh.tensor=2")
    assert plain == {"all-reduce": 2 * 4 * 2 * act / 2}
    split = summed("tensor: layers", "mesh.tensor=2", "mesh.sequence_parallel=true")
    assert sum(split.values()) == sum(plain.values())
    again = summed("tensor: layers", "mesh.tensor=2", "model.remat=full")
    assert again == {"all-reduce": 2 * 5 * 2 * act / 2}


def test_a_pipeline_sends_in_every_tick():
    """1F1B of 4 microbatches on 2 stages: 5 ticks of each kind, of 4 rows."""
    sets = ("mesh.pipe=2", "pipeline.microbatches=4")
    act = 4 * 16 * 32 * 2
    assert summed("stages", *sets) == {"collective-permute": 10 * act}
    assert summed("stages: ends", *sets) == {"all-reduce": (4 + 5) * act}


def test_experts_send_there_and_back():
    """8 experts, 2 a token, 5 slots of a row each (1.25 x 4): 80 slots a row, 2 rows a device."""
    sets = ("mesh.expert=8", "model.ffn=Moe", "model.ffn.hidden=32")
    assert toy.experiment(*sets).model.ffn.room(16) == 5
    slots = 2 * 8 * 5 * 32 * 2
    assert summed("experts", *sets) == {"all-to-all": 2 * 4 * slots * 7 / 8}


TWO = [
    *("model=EncoderDecoder", "model.layers=2", "model.encoder_layers=2"),
    *("objective=Seq2Seq", "objective.target_length=8", "data.packing=documents"),
]


def test_two_stacks_send_what_each_of_them_does():
    """16 rows of 16 tokens that are read and 8 that are written, in bf16."""
    read, written = 16 * 16 * 32 * 2, 16 * 8 * 32 * 2
    sums = 2 * (4 * read + 6 * written)  # layers; those that write attend twice
    assert summed("tensor: layers", *TWO, "mesh.tensor=2") == {"all-reduce": sums}
    assert summed("tensor: looked at", *TWO, "mesh.tensor=2") == {"all-reduce": read}
    assert summed("lookup", *TWO, "mesh.tensor=2") == {"all-reduce": read + written}
    both = [*TWO, "mesh.pipe=2", "pipeline.schedule=gpipe", "pipeline.microbatches=4"]
    tick = (read + written) / 4
    assert summed("stages", *both) == {"collective-permute": 2 * 5 * tick}
    assert summed("stages: ends", *both) == {"all-reduce": (4 + 5) * tick}
    assert summed("stages: looked at", *both) == {"all-reduce": 2 * read}  # fp32
    keys = summed("keys", *TWO, "mesh.seq=2", "model.attention.context=gather")
    whole = 2 * (2 * read + 8 * 16 * 16) + 2 * written + 8 * 16 * 8
    assert keys == {"all-gather": 2 * 2 * whole / 2}


def test_two_stacks_on_stages_send_what_is_compiled():
    """The program that runs on four CPUs, over every mesh axis and by every kind."""
    sets = [*TWO, "mesh.pipe=2", "mesh.tensor=2", "pipeline.schedule=gpipe"]
    prog = toy.program(*sets, "model.dim=64", "pipeline.microbatches=2")
    found = collectives.read(communication.compiled(prog).as_text(), prog.layout.mesh)
    rows = communication.compare(prog, found)
    for row in rows:
        assert row.sent == pytest.approx(row.needed, rel=0.02), rows


def test_devices_that_share_a_state_wait_at_every_token():
    sets = ("model=Recurrent", "model.layers=2", "mesh.tensor=2")
    _, prog = needed(*sets)
    (there, back) = (t for t in minimum.of(prog) if t.waits)
    size = 2 * 16 * 16 * 32 * 2  # two layers, 16 rows of 16 tokens
    assert (there.kind, there.bytes, there.waits) == ("all-gather", size / 2, 2 * 16)
    assert (back.kind, back.bytes, back.waits) == ("all-reduce", 2 * size, 2 * 16)


def test_tokens_without_drops_are_counted_as_in_balance():
    sets = ("mesh.expert=8", "model.ffn=Moe", "model.ffn.dispatch=Dropless")
    prog = toy.program(*sets)
    rows = prog.experiment.train.batch_size // 8 * prog.experiment.data.length
    chosen = 2 * rows * prog.experiment.model.ffn.top_k * prog.experiment.model.dim
    layers = prog.experiment.model.layers
    assert summed("experts", *sets) == {"all-to-all": layers * 4 * chosen * 7 / 8}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h100", ("expected v5p:4x4x4", "h100:8x8 (hosts x GPUs)")),
        ("h10:8", ("no chip 'h10'", "h100")),
        ("h100:two", ("expected v5p:4x4x4",)),
        ("h100:3x4", ("expected hosts x GPUs of each like h100:4x8",)),
        ("2*h100:8", ("expected hosts x GPUs of each like h100:4x8",)),
        ("v5e:3x3", ("v5e has no slice of 3x3", "2x2, 2x4")),
        ("v5p:8x4x4", ("v5p has no slice of 8x4x4", "rising multiples of 4")),
        ("v5p:16x24x24", ("at most 6144 chips",)),
        ("cpu:2x2", ("expected cpu and devices, like cpu:8",)),
    ],
)
def test_a_target_that_is_none_is_refused(name, words):
    with toy.refused(*words):
        target.read(name)


@pytest.mark.parametrize(
    ("name", "devices", "hosts"),
    [
        ("h100:8", 8, 1),
        ("h100:64x8", 512, 64),
        ("v5p:4x4x4", 64, 16),
        ("2*v5e:16x16", 512, 128),
        ("v6e:4x4", 16, 4),
        ("v6e:1x1", 1, 1),
        ("V6E:2x4", 8, 2),
        ("cpu:8", 8, 1),
    ],
)
def test_a_target_knows_its_devices(name, devices, hosts, given_cpu):
    found = target.read(name)
    assert (found.devices, found.hosts) == (devices, hosts)


def test_a_topology_without_its_plugin_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with toy.refused("h100:8", "is not installed", "pip install 'lm[plan-gpu]'"):
        topology.devices("h100:8")
    with pytest.raises(ConfigError, match=r"libtpu is not installed.*lm\[plan-tpu\]"):
        topology.devices("v5e:2x4")
