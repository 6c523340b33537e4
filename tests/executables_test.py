"""Executables on disk: found again by all that they were made from, and by nothing less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.experimental.compilation_cache import compilation_cache

from lm import executables, train

MADE_FROM = {"function": "f"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty compilation cache: jax's own, with a folder for executables."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path / executables.FOLDER
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def _double(args, made_from=MADE_FROM, devices=None):
    """Returns the executable of x -> 2 x, and whether it had to be compiled."""
    compiled = []

    def compiles():
        compiled.append(True)
        return jax.jit(lambda x: 2 * x).lower(*args).compile()

    return executables.ready(
        compiles, args, devices or jax.devices()[:1], made_from
    ), bool(compiled)


def test_the_second_start_compiles_nothing(cache):
    x = jnp.arange(6.0)
    _, compiled = _double((x,))
    assert compiled
    double, compiled = _double((x,))
    assert not compiled
    np.testing.assert_array_equal(double(x), 2 * np.arange(6.0))
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: {"args": (jnp.arange(7.0),)},
        lambda patch: {"args": (jnp.arange(6),)},
        lambda patch: {"made_from": {"function": "g"}},
        lambda patch: patch.setattr(executables, "source", lambda: "other code"),
        lambda patch: patch.setenv("XLA_FLAGS", "--xla_of_another_kind"),
        lambda patch: patch.setattr(executables, "_instructions", lambda: "fewer"),
        lambda patch: patch.setattr(executables, "PACKAGES", ("jax",)),
    ],
    ids=["shape", "dtype", "experiment", "code", "options", "machine", "versions"],
)
def test_another_origin_is_another_executable(cache, monkeypatch, change):
    usual = {"args": (jnp.arange(6.0),), "made_from": MADE_FROM}
    _double(**usual)
    assert not _double(**usual)[1]
    assert _double(**usual | (change(monkeypatch) or {}))[1]


def test_a_damaged_one_is_made_anew(cache):
    x = jnp.arange(6.0)
    _double((x,))
    (path,) = cache.iterdir()
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    double, compiled = _double((x,))
    assert compiled
    np.testing.assert_array_equal(double(x), 2 * np.arange(6.0))


def test_one_that_jax_had_is_not_written_again(cache):
    x = jnp.arange(6.0)
    _double((x,))
    (path,) = cache.iterdir()
    path.unlink()  # jax's own entry of the same program stays
    jax.clear_caches()
    for _ in range(2):
        double, compiled = _double((x,))
        assert compiled
        np.testing.assert_array_equal(double(x), 2 * np.arange(6.0))
    assert not list(cache.iterdir())


def test_only_the_last_ones_stay(cache, monkeypatch):
    monkeypatch.setattr(executables, "KEPT", 2)
    for i in range(4):
        _double((jnp.arange(float(i + 1)),))
    assert len(list(cache.iterdir())) == 2


def test_none_for_several_cpu_devices_or_without_a_cache(cache):
    for _ in range(2):
        assert _double((jnp.arange(6.0),), devices=jax.devices())[1]
    jax.config.update("jax_compilation_cache_dir", None)
    assert _double((jnp.arange(6.0),))[1]
    assert not cache.exists()


def test_a_state_and_a_step_from_disk_are_bitwise_the_same(cache):
    key, results = jax.random.key(1), []
    for _ in range(2):
        prog = toy.program("mesh.data=1")
        state = train.make_init(prog).ready(key)(key)
        batch = toy.place(prog, toy.batch())
        state, metrics = train.make_train_step(prog).ready(state, batch)(state, batch)
        results.append(jax.device_get((state, metrics)))
    assert len(list(cache.iterdir())) == 2
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_backend_that_cannot_keep_them_trains_nevertheless(cache, monkeypatch):
    def refuse(*_):
        raise RuntimeError("PjRt: serialization is not implemented")

    monkeypatch.setattr(executables.serialize_executable, "serialize", refuse)
    double, compiled = _double((jnp.arange(6.0),))
    assert compiled
    np.testing.assert_array_equal(double(jnp.ones(6)), 2)
    assert not cache.exists() or not list(cache.iterdir())
