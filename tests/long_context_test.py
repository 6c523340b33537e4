"""128k tokens in a row: a step of the 1B model fits H100s that share the row."""

import pytest

from lm import config
from lm.experiment import load
from lm.plan import communication, topology
from lm.program import program

HBM = 80e9  # bytes of an H100
ROW = 131_072  # tokens

pytestmark = pytest.mark.compile


def test_a_row_of_128k_tokens_fits_eight_h100s():
    try:
        devices = topology.devices("h100:8")
    except config.ConfigError as error:
        pytest.skip(str(error))
    experiment = config.override(
        load("llama_1b"),
        [
            *("mesh.fsdp=1", "mesh.seq=8", f"data.length={ROW}"),
            *("train.batch_size=1", "train.accumulate=1", "eval.batch_size=1"),
        ],
    )
    prog = program(experiment, topology.sharding.make_layout(experiment.mesh, devices))
    memory = communication.compiled(prog).memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert held < 0.4 * HBM, f"{held / 1e9:.1f} GB"
