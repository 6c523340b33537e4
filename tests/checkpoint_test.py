"""Checkpoints: equal on every mesh, whole or absent, and never loaded wrong."""

import json
import os
import pathlib
import random
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import checkpoint, trees
from lm.checkpoint import backend, record
from lm.config import ConfigError

META = {"examples": 7, "config": {"model": {"layers": 2}}}
FILES = {"tokenizer.model": bytes(range(256))}
NOT_READ = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
)  # Orbax writes them for itself


def make_state(mesh, spec, seed=0):
    """A train state in small: parameters, Adam, scalars; `spec` shards the matrices."""
    rng = np.random.default_rng(seed)
    gain = np.ones(4, jnp.bfloat16)
    layers = {"w": rng.standard_normal((4, 8, 16), np.float32), "gain": gain}
    params = {"embed": rng.standard_normal((8, 16), np.float32), "layers": layers}
    moments = [jax.tree.map(lambda x, i=i: x * i, params) for i in (2, 3)]
    adam = optax.ScaleByAdamState(np.int32(3), *moments)
    state = {"step": np.int32(3), "params": params, "opt": (adam, optax.EmptyState())}

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, spec if x.ndim > 1 else P()))

    return jax.tree.map(place, state)


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def raw(tree):
    return {path: np.asarray(x).tobytes() for path, x in trees.flatten(tree).items()}


def save(directory, states, **options):
    """Saves {step: state} and returns the directory."""
    checkpoints = checkpoint.Checkpoints(directory, keep=99, **options)
    for step, state in states.items():
        checkpoints.save(step, state, META, FILES)
    checkpoints.close()
    return pathlib.Path(directory)


def content(directory):
    paths = (path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "tensor"))


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory, mesh):
    """(directory, state of step 10, state of step 20); copy it before changing it."""
    states = {10: make_state(mesh, P("data"), 1), 20: make_state(mesh, P("data"), 2)}
    directory = save(tmp_path_factory.mktemp("two") / "saved", states)
    return directory, states[10], states[20]


@pytest.fixture
def two(two_saved, tmp_path):
    directory, first, second = two_saved
    shutil.copytree(directory, tmp_path / "copy")
    return tmp_path / "copy", first, second


def test_a_checkpoint_is_the_same_from_every_mesh_and_restores_onto_any(tmp_path, mesh):
    other = jax.make_mesh((2, 4), ("x", "y"))
    one = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    state = make_state(mesh, P("data", "tensor"))
    target = abstract(make_state(other, P("y", "x")))
    restored = []
    for name, (source, goal) in {
        "whole": (make_state(mesh, P()), target),
        "sharded": (state, target),
        "alone": (make_state(one, P()), abstract(state)),
    }.items():
        directory = save(tmp_path / name, {5: source})
        checkpoints = checkpoint.Checkpoints(directory, read_only=True)
        arrays, run = checkpoints.restore(goal)
        assert jax.tree.structure(arrays) == jax.tree.structure(goal)
        same = jax.tree.map(lambda a, b: a.sharding == b.sharding, arrays, goal)
        assert all(jax.tree.leaves(same))
        assert (run.step, run.files) == (5, FILES)
        assert run.meta == {"step": 5, **META}
        assert checkpoints.read_run() == run
        restored.append((raw(arrays), (directory / "5/run/arrays.json").read_bytes()))
    assert restored[0] == restored[1] == restored[2]
    assert restored[0][0] == raw(state)
    table = json.loads(restored[0][1])
    assert table["params/layers/gain"]["dtype"] == "bfloat16"
    assert table["opt/0/mu/layers/w"]["shape"] == [4, 8, 16]


def test_a_target_over_an_abstract_mesh_is_bound_to_the_mesh_in_use(two_saved, mesh):
    directory, _, second = two_saved
    concrete = abstract(second["params"])
    checkpoints = checkpoint.Checkpoints(directory, read_only=True)
    with jax.set_mesh(mesh):
        target = {"params": jax.eval_shape(lambda tree: tree, concrete)}
        arrays, _ = checkpoints.restore(target, partial=True)
    assert raw(arrays["params"]) == raw(second["params"])
    sharding = arrays["params"]["embed"].sharding
    assert sharding.mesh == mesh
    assert sharding.is_equivalent_to(concrete["embed"].sharding, 2)
    with pytest.raises(ValueError, match="set_mesh"):
        checkpoints.restore(target, partial=True)


def test_donating_the_state_while_it_is_being_saved_changes_nothing(
    tmp_path, mesh, monkeypatch
):
    monkeypatch.setattr(backend, "_SHARED_BYTES", 1)  # replicas write slices each
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    ones = {name: np.ones((256, 512), np.float32) for name in "abcdefgh"}
    for name, spec in (("whole", P()), ("sharded", P("data", "tensor"))):
        state = add(jax.device_put(ones, NamedSharding(mesh, spec)))
        target = abstract(state)
        checkpoints = checkpoint.Checkpoints(tmp_path / name)
        for step in range(3):
            checkpoints.save(step, state, {}, {})
            for _ in range(5):
                state = add(state)
        checkpoints.wait()
        for step in range(3):
            arrays, _ = checkpoints.restore(target, step)
            assert all((x == 2 + 5 * step).all() for x in arrays.values())
        checkpoints.close()


def test_the_newest_and_every_nth_are_kept(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, keep_period=30)
    assert checkpoints.latest() is None
    for step in range(10, 80, 10):
        checkpoints.save(step, {"a": jnp.ones(3)}, {}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [30, 60, 70]
    assert checkpoints.latest() == 70
    checkpoints.close()


def test_a_step_is_saved_once_and_never_behind_a_newer_one(tmp_path):
    save(tmp_path, {5: {"a": jnp.ones(3)}})
    before = content(tmp_path)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(5, {"a": jnp.zeros(3)}, {}, {})
    with pytest.raises(checkpoint.CheckpointError, match=r"4 .* 5 is there"):
        checkpoints.save(4, {"a": jnp.zeros(3)}, {}, {})
    checkpoints.close()
    assert content(tmp_path) == before


def damaged(data, rng):
    """The ways to harm a file: None stands for a deleted one."""
    at = rng.randrange(len(data))
    flipped = bytearray(data)
    flipped[at] ^= 1 << rng.randrange(8)
    return {"flip": bytes(flipped), "cut": data[:at], "empty": b"", "deleted": None}


def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(two, capfd):
    directory, first, second = two
    rng = random.Random(0)
    target = abstract(first["params"]["layers"])
    wanted = {10: raw(first["params"]["layers"]), 20: raw(second["params"]["layers"])}
    for name, data in content(directory / "20").items():
        path = directory / "20" / name
        for harm, bad in damaged(data, rng).items():
            path.unlink() if bad is None else path.write_bytes(bad)
            lines = []
            checkpoints = checkpoint.Checkpoints(
                directory, read_only=True, report=lines.append
            )
            arrays, run = checkpoints.restore(
                {"params": {"layers": target}}, partial=True
            )
            path.write_bytes(data)
            assert raw(arrays["params"]["layers"]) == wanted[run.step], (name, harm)
            assert run.files == FILES
            if path.name in NOT_READ:
                assert run.step == 20
                assert not lines
                continue
            assert run.step == 10, (name, harm)
            assert len(lines) == 2
            assert f"{directory}/20 is damaged: {name} is" in lines[0]
            assert lines[1] == "using checkpoint 10 instead of 20"
            assert "\n" not in "".join(lines)
    assert capfd.readouterr().err == ""


def test_a_flipped_bit_in_a_large_file_is_found_by_the_digests(
    tmp_path, monkeypatch, mesh, capfd
):
    monkeypatch.setattr(record, "_HASHED_BYTES", -1)  # the files of arrays are "large"
    value = jax.random.normal(jax.random.key(0), (64, 64))
    state = {"a": value, "b": {"c": jax.device_put(value + 1, jax.devices()[0])}}
    directory = save(tmp_path / "run", {10: state, 20: state})
    needle = np.asarray(state["b"]["c"]).tobytes()
    path, data = next(
        (directory / "20" / name, data)
        for name, data in content(directory / "20").items()
        if needle in data
    )
    for offset in (0, 1, len(needle) // 2, len(needle) - 1):
        flipped = bytearray(data)
        flipped[data.index(needle) + offset] ^= 16
        path.write_bytes(flipped)
        lines = []
        checkpoints = checkpoint.Checkpoints(
            directory, read_only=True, report=lines.append
        )
        arrays, run = checkpoints.restore(abstract(state))
        assert run.step == 10
        assert raw(arrays) == raw(state)
        assert lines[0].endswith("20 is damaged: not the values that were saved: b/c")
    path.write_bytes(data[: len(data) // 2])
    checkpoints = checkpoint.Checkpoints(directory, read_only=True, report=lines.append)
    assert checkpoints.restore(abstract(state))[1].step == 10
    assert capfd.readouterr().err == ""


def test_with_no_whole_checkpoint_left_nothing_is_changed(two):
    directory, first, _ = two
    for step in (10, 20):
        path = directory / str(step) / "run" / "tokenizer.model"
        path.write_bytes(path.read_bytes()[:-1])
    before = content(directory)
    checkpoints = checkpoint.Checkpoints(directory, report=lambda line: None)
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"every checkpoint in .* is damaged: 20 .*, 10 ",
    ) as error:
        checkpoints.restore(abstract(first))
    assert "\n" not in str(error.value)
    checkpoints.close()
    assert content(directory) == before


def test_training_on_from_an_older_checkpoint_sets_the_damaged_one_aside(two):
    directory, first, second = two
    (directory / "20/run/meta.json").unlink()
    harmed = content(directory / "20")
    lines = []
    checkpoints = checkpoint.Checkpoints(directory, report=lines.append)
    assert checkpoints.restore(abstract(first))[1].step == 10
    assert checkpoints.latest() == 10
    for step in (15, 20):
        checkpoints.save(step, second, META, FILES)
    checkpoints.wait()
    assert checkpoints.steps() == [10, 15, 20]
    assert content(directory / "20.damaged") == harmed
    assert lines[-1] == "the damaged checkpoint 20 is now named 20.damaged"
    arrays, run = checkpoints.restore(abstract(first))
    assert (run.step, raw(arrays)) == (20, raw(second))
    checkpoints.close()


def test_a_checkpoint_asked_for_by_step_is_that_one_or_an_error(two):
    directory, first, _ = two
    checkpoints = checkpoint.Checkpoints(
        directory, read_only=True, report=lambda line: None
    )
    arrays, run = checkpoints.restore(abstract(first), step=10)
    assert (run.step, raw(arrays)) == (10, raw(first))
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint 15.*: 10, 20"):
        checkpoints.restore(abstract(first), step=15)
    (directory / "20/run/meta.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"run/meta\.json is missing"):
        checkpoints.restore(abstract(first), step=20)


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(two_saved):
    directory, first, _ = two_saved
    target = abstract(first)
    target["params"] = {
        "embed": jax.ShapeDtypeStruct((5, 7), jnp.bfloat16),
        "head": jax.ShapeDtypeStruct((5,), jnp.float32),
    }
    lines = []
    checkpoints = checkpoint.Checkpoints(directory, read_only=True, report=lines.append)
    with pytest.raises(ConfigError) as error:
        checkpoints.restore(target)
    assert str(error.value) == (
        f"checkpoint {directory}/20 is of another model:"
        " params/embed is float32[8, 16] there and bfloat16[5, 7] here;"
        " not in it: params/head;"
        " only in it: params/layers/gain, params/layers/w"
    )
    assert lines == []


def test_a_half_written_checkpoint_is_ignored_and_cleaned_up(two):
    directory, first, _ = two
    half = directory / "30.orbax-checkpoint-tmp"
    shutil.copytree(directory / "20", half)
    assert checkpoint.Checkpoints(directory, read_only=True).latest() == 20
    assert half.exists()
    checkpoints = checkpoint.Checkpoints(directory)
    assert checkpoints.latest() == 20
    checkpoints.save(30, first, META, FILES)
    checkpoints.close()
    assert sorted(path.name for path in directory.iterdir()) == ["10", "20", "30"]


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written") as error:
        checkpoint.Checkpoints(tmp_path / "file" / "run")
    assert str(tmp_path / "file" / "run") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_read_only_directory_is_left_as_it_is(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "none", read_only=True)
    assert checkpoints.latest() is None
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint in .*none"):
        checkpoints.read_run()
    checkpoints.close()
    assert not (tmp_path / "none").exists()


@pytest.fixture
def small_disk(tmp_path):
    """(directory, function that fills the disk, function that frees it)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = os.geteuid() == 0 and not subprocess.call(
        mount, stderr=subprocess.DEVNULL
    )
    if mounted:
        junk = disk / "junk"
        yield disk / "run", lambda: junk.write_bytes(bytes(2**20)), junk.unlink
        subprocess.run(["umount", "-l", str(disk)], check=True)
    else:  # no file may grow: not the same error, but the same place
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

        yield disk / "run", lambda: limit(2**17), lambda: limit(soft)
        limit(soft)


def test_a_full_disk_is_one_line_and_costs_no_older_checkpoint(small_disk, capfd):
    directory, fill, free = small_disk
    state = {"a": jax.random.normal(jax.random.key(0), (2, 256, 256))}
    checkpoints = checkpoint.Checkpoints(directory)
    checkpoints.save(1, state, META, FILES)
    checkpoints.wait()
    before = content(directory)
    fill()
    for _ in range(2):
        checkpoints.save(2, state, META, FILES)
        with pytest.raises(checkpoint.CheckpointError, match="no space left") as error:
            checkpoints.wait()
        assert f"checkpoint 2 could not be saved in {directory}" in str(error.value)
        assert "the newest whole one is 1" in str(error.value)
        assert "\n" not in str(error.value)
        assert content(directory) == before
    free()
    checkpoints.save(3, state, META, FILES)
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]
    assert raw(checkpoints.restore(abstract(state))[0]) == raw(state)
    assert capfd.readouterr().err == ""
