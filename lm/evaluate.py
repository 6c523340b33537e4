"""Scores of a model on held-out text, over the mesh, every token and text counted once."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from lm import batches, generate, metrics, plot
from lm.data import loader, packing
from lm.data.tokenizer import Tokenizer
from lm.experiment import EvalSet, Experiment
from lm.scores import classes, texts
from lm.train import Params, Program

AHEAD = 4  # batches that may wait on the device


def stores(experiment: Experiment, coder: Tokenizer) -> dict[str, list[loader.Store]]:
    """Returns the tokenized text of each evaluation set, by its name.

    Raises:
        ConfigError: also where a package is missing that `eval.scores` need.
    """
    texts.require(experiment.eval.scores)
    return {
        s.name: batches.stores(experiment.objective, _data(experiment, s), coder)
        for s in experiment.eval.sets
    }


def _data(experiment: Experiment, chosen: EvalSet) -> loader.Data:
    source = chosen.source or experiment.data.source
    return dataclasses.replace(
        experiment.data, source=source, split=chosen.split, weights=()
    )


def of_set(
    prog: Program,
    step: Callable[[Params, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Params,
    parts: Sequence[loader.Store],
    chosen: EvalSet,
    coder: Tokenizer,
    workdir: str,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Returns all that is said of a set: what `score` does, and the scores of `written`.

    Process 0 leaves in `workdir` what a person looks at: the texts that were written in
    `texts/NAME.jsonl`, or which classes were taken for which in `confusion/NAME.png`.
    """
    values, counts = score(prog, step, params, parts, chosen, coder)
    if counts is not None and jax.process_index() == 0:
        path = epath.Path(workdir) / "confusion" / f"{chosen.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        labels: Any = getattr(prog.experiment.objective, "labels", ())
        title = f"{prog.experiment.name}, {chosen.name}"
        plot.confusion(counts.tolist(), labels, path, title)
    if not prog.experiment.eval.scores:
        return values
    scores, rows = written(prog, params, parts, coder, report)
    if jax.process_index() == 0:
        path = epath.Path(workdir) / "texts" / f"{chosen.name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines))
    return {**values, **scores}


def score(
    prog: Program,
    step: Callable[[Params, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Params,
    parts: Sequence[loader.Store],
    chosen: EvalSet,
    coder: Tokenizer,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Returns `loss` (nats a token), `perplexity`, `bits_per_byte`, `accuracy` and `tokens`.

    Of `Classification`, the loss of a text and the scores of classes, see `scores.classes`,
    and the counts [C, C] that they are made of; else None.
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
    if fetched and "confusion" in fetched[0]:
        return _of_classes(prog.experiment.objective, fetched)
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
    return (result if bits is None else {**result, "bits_per_byte": bits}), None


def written(
    prog: Program,
    params: Params,
    parts: Sequence[loader.Store],
    coder: Tokenizer,
    report: Callable[[str], None],
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Returns the `eval.scores` of texts that the model writes, and these texts.

    The model is asked for the second text of `eval.texts` documents of the set, given the
    first, as `generate` says, for one text each. What it is compared with is the second
    text as the tokenizer decodes it: every byte of it, but for tokenizers that change text.

    Args:
        prog: the program.
        params: the weights.
        parts: the set's stores.
        coder: the tokenizer.
        report: takes a line for the user where texts are cut short.

    Returns:
        `texts` (how many) and the scores, see `scores.texts`; and for each text `source`,
        `reference` and `text`. Both are the same on every host.
    """
    experiment = prog.experiment
    asked = [
        pair
        for part in parts
        for pair in batches.asked(experiment.objective, experiment.data, part, coder)
    ]
    if experiment.eval.texts is not None:
        drawn = packing.shuffled(len(asked), "texts")[: experiment.eval.texts]
        asked = [asked[i] for i in sorted(drawn.tolist())]
    config = dataclasses.replace(experiment.generate, samples=1)
    given = [ids for ids, _ in asked]
    found = generate.continued(prog, params, coder, given, config, report)
    rows = [
        {"source": coder.decode(a), "reference": coder.decode(b), "text": one}
        for (a, b), (one,) in zip(asked, found, strict=True)
    ]
    pairs = [row["text"] for row in rows], [row["reference"] for row in rows]
    return {"texts": len(rows), **texts.scores(experiment.eval.scores, *pairs)}, rows


def _of_classes(
    objective: Any, fetched: list[dict[str, Any]]
) -> tuple[dict[str, float], np.ndarray]:
    """Returns `loss` (nats a text) and the scores of classes, and their counts."""
    counts = np.sum([np.rint(s["confusion"]).astype(np.int64) for s in fetched], 0)
    nll = float(np.sum([np.float64(s["nll"]) for s in fetched]))
    found = classes.scores(counts, objective.labels)
    return {"loss": nll / max(int(counts.sum()), 1), **found}, counts
