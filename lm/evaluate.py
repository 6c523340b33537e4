"""Scores of a model on held-out text, over the mesh, every token counted once."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lm import batches, metrics
from lm.data import loader
from lm.data.tokenizer import Tokenizer
from lm.experiment import EvalSet, Experiment
from lm.train import Params, Program

AHEAD = 4  # batches that may wait on the device


def stores(experiment: Experiment, coder: Tokenizer) -> dict[str, list[loader.Store]]:
    """Returns the tokenized text of each evaluation set, by its name."""
    return {
        s.name: batches.stores(experiment.objective, _data(experiment, s), coder)
        for s in experiment.eval.sets
    }


def _data(experiment: Experiment, chosen: EvalSet) -> loader.Data:
    source = chosen.source or experiment.data.source
    return dataclasses.replace(
        experiment.data, source=source, split=chosen.split, weights=()
    )


def score(
    prog: Program,
    step: Callable[[Params, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Params,
    parts: Sequence[loader.Store],
    chosen: EvalSet,
    coder: Tokenizer,
) -> dict[str, float]:
    """Returns `loss` (nats a token), `perplexity`, `bits_per_byte`, `accuracy` and `tokens`.

    `accuracy` is the fraction of scored tokens that the model holds for the likeliest.

    Args:
        prog: the program.
        step: its `train.make_eval_step`.
        params: the weights.
        parts: the set's stores.
        chosen: the set.
        coder: the tokenizer.
    """
    data, sharding = prog.experiment.data, prog.batch_sharding()
    sums: list[dict[str, jax.Array]] = []
    for part in parts:
        dataset = batches.evaluation(
            prog.experiment.objective, data, part, coder, chosen.stride
        )
        made = loader.batches(
            dataset,
            sizes=prog.experiment.eval_size(),
            rows=lambda size: loader.local_rows(sharding, size),
            threads=data.threads,
            prefetch=data.prefetch,
        )
        for count, batch in enumerate(made):
            if chosen.batches is not None and count >= chosen.batches:
                break
            if len(sums) >= AHEAD:
                jax.block_until_ready(sums[-AHEAD])
            sums.append(step(params, loader.to_devices(batch, sharding)))
    fetched = jax.device_get(sums)
    nll, tokens, text, correct = (
        float(np.sum([np.float64(s[k]) for s in fetched]))
        for k in ("nll", "tokens", "bytes", "correct")
    )
    loss = nll / max(tokens, 1)
    result = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "accuracy": correct / max(tokens, 1),
        "tokens": int(tokens),
    }
    bits = metrics.bits_per_byte(loss, tokens, text)
    return result if bits is None else {**result, "bits_per_byte": bits}
