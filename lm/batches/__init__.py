"""Objectives as data: what a batch of each holds, row i a pure function of (seed, i).

    Causal          each token from those before it             text
    Prefix          the second part of a document               text
    Masked          hidden tokens from both sides               text
    SpanCorruption  runs of tokens that were cut out            text
    Seq2Seq         a text from another                         two fields
    Sft             an answer after a prompt                    two fields
    Classification  the label of a text                         two fields

A batch is a dict of arrays of a shape that the config fixes. In each of them `weights` is 1
where there is something to predict, `targets` says what, and rows that fill up the last
batch of an evaluation are all 0. What a model reads is `tokens`, and for an encoder that
stands before a decoder `inputs`. The losses are `lm.objectives`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import grain
import jax
import numpy as np

from lm.batches import classes, masked, pairs, prefix, spans
from lm.batches.causal import Causal, CrossEntropy
from lm.batches.classes import Classification
from lm.batches.masked import Masked
from lm.batches.pairs import Seq2Seq, Sft
from lm.batches.prefix import Prefix
from lm.batches.spans import SpanCorruption
from lm.config import ConfigError, kind
from lm.data import loader, packing
from lm.data.loader import Data
from lm.data.store import Store
from lm.data.tokenizer import Tokenizer

__all__ = ["CrossEntropy", "Objective"]

Objective: TypeAlias = (
    Causal | Prefix | Masked | SpanCorruption | Seq2Seq | Sft | Classification
)
TWO_FIELDS = (Seq2Seq, Sft, Classification)
ANSWERED = (Seq2Seq, Sft)  # whose second text a model can be asked for

_EVALUATION = 0  # the seed of what is drawn at random where nothing is trained


def added(objective: Objective) -> int:
    """Returns how many ids the model's vocabulary has above the tokenizer's."""
    return getattr(objective, "added", 0)


def written(objective: Objective, data: Data) -> int:
    """Returns the tokens of a row in which something is predicted; `data.length`, but where a
    decoder writes beside the rows that an encoder reads.

    Raises:
        ConfigError: one line with what to set.
    """
    if isinstance(objective, Seq2Seq):
        return objective.target_length
    if isinstance(objective, SpanCorruption):
        return objective.sizes(data.length, data.isolate)[1]
    return data.length


def check(objective: Objective, data: Data) -> None:
    """Checks that the objective can make rows of such data.

    Raises:
        ConfigError: one line with what to set.
    """
    name = kind(type(objective))
    if isinstance(objective, SpanCorruption):
        objective.sizes(data.length, data.isolate)
    if not isinstance(objective, TWO_FIELDS):
        return
    if data.packing != "documents":
        raise ConfigError(
            f"objective={name} takes whole documents; set data.packing=documents"
        )
    if not data.isolate:
        raise ConfigError(
            f"objective={name} keeps its documents apart; set data.isolate=true"
        )


def row(objective: Objective, data: Data) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a training row, without its text."""
    T = written(objective, data)
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    if isinstance(objective, SpanCorruption | Seq2Seq):
        names = ("inputs", "input_segments", "input_positions")
        found = dict.fromkeys(names, ((data.length,), np.int32))
    for name in ("tokens", "segments", "positions", "targets"):
        found[name] = (T,), np.int32
    found |= {"weights": ((T,), np.float32), "index": ((), np.uint32)}
    if isinstance(objective, Classification):
        found |= {"targets": ((), np.int32), "weights": ((), np.float32)}
    else:
        found["bytes"] = (), np.int32
    return {k: jax.ShapeDtypeStruct(*v) for k, v in found.items()}


def tokenizer(objective: Objective, data: Data, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer: its vocabulary and the ids that the objective adds are the model's."""
    words = getattr(objective, "words", None)
    more = added(objective)
    try:
        return loader.tokenizer(data, vocab_size - more, words)
    except ConfigError as error:
        if not more:
            raise
        name = kind(type(objective))
        raise ConfigError(
            f"{error}, and {more} more, which objective={name} adds to the tokenizer's"
        ) from error


def stores(
    objective: Objective, data: Data, coder: Tokenizer, split: str = ""
) -> list[Store]:
    """Returns `loader.stores` after a look at their fields.

    Raises:
        ConfigError: a source with more or fewer fields than the objective takes.
    """
    wanted = 2 if isinstance(objective, TWO_FIELDS) else 1
    found = loader.stores(data, coder, split, getattr(objective, "words", None))
    for spec, part in zip(data.source, found, strict=True):
        if len(part.fields) != wanted:
            fix = (
                "name two, as in jsonl:GLOB#prompt+answer"
                if wanted == 2
                else "name one"
            )
            raise ConfigError(
                f"data.source={spec}: objective={kind(type(objective))} takes documents of "
                f"{wanted} fields, this one has {len(part.fields)} "
                f"({', '.join(part.fields)}); {fix}"
            )
    return found


def examples(
    objective: Objective, data: Data, parts: list[Store], coder: Tokenizer, seed: int
) -> grain.MapDataset:
    """Returns the endless training examples, shuffled, each with its `index`."""
    if isinstance(objective, TWO_FIELDS):
        return loader.mixture(
            *(data, parts, seed),
            lambda part, own: _records(objective, data, part, coder).shuffle(own),
        )
    rows = loader.examples(_text(objective, data), parts, seed)
    change = _change(objective, data, parts[0], coder, seed)
    return rows if change is None else rows.map_with_index(change)


def evaluation(
    objective: Objective,
    data: Data,
    part: Store,
    coder: Tokenizer,
    stride: int | None = None,
) -> grain.MapDataset:
    """Returns the finite examples, of which none has a target in common with another.

    Raises:
        ConfigError: a stride, which is for `Causal`.
    """
    if stride is not None and not isinstance(objective, Causal):
        raise ConfigError(
            f"eval.sets: stride={stride} is for objective=Causal; leave it out with "
            f"{kind(type(objective))}"
        )
    if isinstance(objective, TWO_FIELDS):
        rows: Any = _records(objective, data, part, coder)
        return rows.map_with_index(loader.numbered)
    rows = loader.evaluation(_text(objective, data), part, stride)
    change = _change(objective, data, part, coder, _EVALUATION)
    return rows if change is None else rows.map_with_index(change)


def asked(
    objective: Objective, data: Data, part: Store, coder: Tokenizer
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns of each document that rows hold the ids given and those of the text wanted."""
    rows: Any = _records(objective, data, part, coder)
    return [rows.asked(number) for number in rows.kept.tolist()]


def _text(objective: Objective, data: Data) -> Data:
    """Returns the data with as many tokens of text a row as the objective reads."""
    if not isinstance(objective, SpanCorruption):
        return data
    text, _ = objective.sizes(data.length, data.isolate)
    return dataclasses.replace(data, length=text)


def _change(
    objective: Objective, data: Data, part: Store, coder: Tokenizer, seed: int
) -> Callable[[int, packing.Row], packing.Row] | None:
    """Returns what becomes of row i of text; any store of the tokenizer's does as `part`."""
    if isinstance(objective, Prefix):
        return functools.partial(prefix.rows, part, seed)
    if isinstance(objective, Masked):
        begins = masked.word_begins(coder) if objective.whole_words else None
        return functools.partial(masked.rows, objective, part, begins, seed)
    if isinstance(objective, SpanCorruption):
        _, targets = objective.sizes(data.length, data.isolate)
        shape = (data.length, targets)
        return functools.partial(spans.rows, objective, part, shape, data.isolate, seed)
    return None


def _records(objective: Any, data: Data, part: Store, coder: Tokenizer) -> Any:
    if isinstance(objective, Seq2Seq):
        return pairs.Pairs(objective, part, data.length)
    if isinstance(objective, Sft):
        return pairs.Answers(objective, part, data.length)
    return classes.Texts(objective, part, data.length, coder, data.cleaning)
