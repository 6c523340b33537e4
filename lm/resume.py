"""What a run may change when it goes on from its checkpoint, and what it may not."""

import fnmatch
from collections.abc import Mapping
from typing import Any

from lm import config
from lm import experiment as experiments
from lm.config import ConfigError
from lm.data.tokenizer import Tokenizer
from lm.experiment import Experiment

FIXED = {  # pattern of config paths: why they are fixed
    "model.*": "the weights are of another model",
    "data.length": "an example's number would mean another text",
    "data.packing": "an example's number would mean another text",
    "objective.kind": "an example's number would mean another text",
    "objective.long": "an example's number would mean another text",
    "objective.labels*": "the numbers of labels would mean others",
    "data.tokenizer*": "token ids would mean other text",
    "optim.algorithm*": "its state is of another kind",
    "optim.state_dtype": "its state has another dtype",
    "optim.ema": "the average would begin in the middle",
    "train.seed": "the order of the data would change",
}
FREE = (  # exceptions to FIXED
    "model.remat",
    "model.scan",
    "model.dropout",
    "model.dtype",
    "model.init_std",
    "model.attention.implementation",
    "model.attention.context",
    "model.ffn.dispatch*",
    "model.ffn.balance",
    "model.ffn.z_loss",
    "model.ffn.gate.rate",
    "optim.algorithm.b?",
    "optim.algorithm.eps",
    "optim.algorithm.momentum",
)
QUIET = (
    "name",
    "about",
    "generate.*",
    "train.log_every",
    "train.compilation_cache",
    "train.heartbeat_seconds",
    "train.connect_seconds",
    "target",
)


def changes(stored: Mapping[str, Any], now: Experiment) -> list[str]:
    """Returns a line for each field that the stored config has otherwise, all of them allowed.

    Raises:
        ConfigError: fields that may not change, with both values.
    """
    before = experiments.stored(stored, "the checkpoint's config")
    found = config.diff(before, now)
    refused, allowed = [], []
    for path, old, new in found:
        line = f"{path}: {old!r} → {new!r}"
        if any(fnmatch.fnmatch(path, pattern) for pattern in QUIET):
            continue
        why = next((w for p, w in FIXED.items() if fnmatch.fnmatch(path, p)), None)
        if why and not any(fnmatch.fnmatch(path, pattern) for pattern in FREE):
            refused.append(f"{line} ({why})")
        else:
            allowed.append(line)
    if refused:
        fix = "restore them, or use another --workdir"
        if not any(line.startswith("model.") for line in refused):
            fix += "; --set train.init_from=DIR takes the weights alone to it"
        raise ConfigError(
            f"the checkpoint is of another run: {'; '.join(refused)}; {fix}"
        )
    return allowed


def same_tokenizer(stored: str, coder: Tokenizer) -> None:
    """Checks the fingerprint in a checkpoint against the tokenizer in use.

    Raises:
        ConfigError: they differ.
    """
    if stored != coder.fingerprint:
        raise ConfigError(
            f"the tokenizer ({coder.fingerprint[:12]}) differs from the checkpoint's "
            f"({stored[:12]}): the text or data.tokenizer changed; restore them, or use another "
            "--workdir"
        )
