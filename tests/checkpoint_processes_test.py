"""Checkpoints of processes that are killed, and of several processes together."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax.numpy as jnp

from lm import checkpoint


def run_python(code, *arguments):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**environment, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


SAVE_FOR_EVER = """
import sys
import jax, jax.numpy as jnp
from lm import checkpoint
assert "orbax" not in sys.modules  # it would delay every start
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=2)
step, arrays = 0, {name: jnp.zeros((64, 1024)) for name in "abcd"}
if checkpoints.latest() is not None:
    arrays, run = checkpoints.restore(arrays)
    step = run.step
while True:
    step, arrays = step + 1, jax.tree.map(lambda x: x + 1, arrays)
    checkpoints.save(step, arrays, {}, {})
    print(step, flush=True)
"""


def test_killed_while_saving_the_last_published_checkpoint_is_whole(tmp_path):
    rng = random.Random(0)
    latest, target = 0, {name: jnp.zeros((64, 1024)) for name in "abcd"}
    for _ in range(3):
        child = run_python(SAVE_FOR_EVER, tmp_path)
        while not (line := child.stdout.readline()).strip().isdecimal():
            assert line, "the child ended"
        started = int(line)
        for _ in range(rng.randrange(1, 5)):
            started = int(child.stdout.readline())
        time.sleep(rng.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        lines = []
        checkpoints = checkpoint.Checkpoints(
            tmp_path, read_only=True, report=lines.append
        )
        arrays, run = checkpoints.restore(target)
        assert not lines
        # `save` returns before it publishes, but after it published the one before.
        assert run.step >= started - 1 > latest - 1
        assert all((x == run.step).all() for x in arrays.values())
        latest = run.step


TWO_PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
directory, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
from lm import checkpoint
mesh = jax.make_mesh((4,), ("data",))
def place(x, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
w = np.arange(64.0, dtype=np.float32).reshape(8, 8)
state = {"w": place(w, "data"), "b": place(w, None, "data"), "n": place(np.float32(3))}
target = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in state.items()}
checkpoints = checkpoint.Checkpoints(directory, report=lambda line: print("REPORT", line))
for step in (1, 2, 3):
    checkpoints.save(step, state, {"k": step}, {"file": b"abc"})
checkpoints.wait()
target["w"] = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(mesh, P(None, "data")))
for harm in (None, checkpoint.record.read_checked, checkpoint.backend.read_arrays):
    if harm is not None and index == 1:  # what one process alone finds damaged
        def fail(*args, what=harm, **kwargs):
            if str(args[0]).split("/")[-2 if what.__name__ == "read_arrays" else -1] == step:
                raise OSError("unreadable")
            return what(*args, **kwargs)
        step = str(max(checkpoints.steps()))
        module = sys.modules[harm.__module__]
        setattr(module, harm.__name__, fail)
    arrays, run = checkpoints.restore(target)
    for shard in arrays["w"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), w[shard.index])
    print("RESTORED", run.step, flush=True)
checkpoints.save(4, state, {}, {})
checkpoints.close()
print("STEPS", checkpoints.steps())
"""


def test_two_processes_save_and_restore_and_fall_back_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [run_python(TWO_PROCESSES, tmp_path, port, i) for i in range(2)]
    outputs = [child.communicate(timeout=100)[0] for child in children]
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
        steps = [line for line in output.splitlines() if line.startswith("RESTORED")]
        assert steps == ["RESTORED 3", "RESTORED 2", "RESTORED 1"], output
        assert "STEPS [1, 4]" in output
    assert "3 is damaged: another process could not read it" in outputs[0]
    assert "3 is damaged: unreadable" in outputs[1]
    assert (tmp_path / "3.damaged").exists()
    assert "4" in os.listdir(tmp_path)
    lines = (tmp_path / "4" / "run" / "FILES").read_text()
    assert "arrays/ocdbt.process_1/manifest.ocdbt" in lines
