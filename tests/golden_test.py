"""The two kinds of golden file: every experiment's resolved config, one short loss curve."""

import pytest
import runs

from lm import config, experiment, loop

# Other versions of jax and XLA, and other processors, round and fuse in other ways.
CURVE = 1e-4


@pytest.mark.parametrize("name", experiment.names())
def test_the_resolved_config_is_as_agreed(golden, name):
    leaves = config.flatten(experiment.load(name))
    text = "".join(f"{path}={value}\n" for path, value in leaves.items())
    assert text == golden(f"{name}.txt", text)


def test_a_seeded_run_has_the_losses_that_it_had(golden, tmp_path):
    result = runs.small(tmp_path)
    assert result.code == loop.DONE, result.err
    found = runs.losses(tmp_path)
    text = "".join(f"{step} {loss:.6f}\n" for step, loss in found.items())
    lines = golden("tiny.losses", text).splitlines()
    stored = {int(step): float(loss) for step, loss in map(str.split, lines)}
    assert found == pytest.approx(stored, rel=CURVE)
