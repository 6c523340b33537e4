"""Pairs of texts: sequence to sequence, and the answers to prompts.

Shapes: T tokens of `data.length`, U of `objective.target_length`.
"""

import dataclasses

import numpy as np

from lm.batches.causal import CrossEntropy
from lm.batches.records import Limit, Long, Records, lengths
from lm.config import ConfigError
from lm.data.packing import Row, offsets, padded
from lm.data.store import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2Seq(CrossEntropy):
    """Predict the second text of a document, a translation say, from all of the first."""

    target_length: int = 128  # tokens of the second texts in a row
    long: Long = "refuse"  # documents that do not fit into a row

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_length < 1:
            raise ConfigError(
                f"objective.target_length={self.target_length}: expected 1 or more"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(CrossEntropy):
    """Predict the second text of a document, the answer, after the first, the prompt.

    The two follow each other as they are: what should stand between them is text.
    """

    long: Long = "refuse"  # documents that do not fit into a row


class Answered(Records):
    """Rows of documents whose second text a model can be asked for, given the first."""

    def asked(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids that a document's second text is generated from, and of that text.

        Those of a prompt are as `generate.encode` gives them. The second text is whole, and
        without marks.
        """
        raise NotImplementedError


class Pairs(Answered):
    """Rows of `Seq2Seq`.

    inputs, input_segments, input_positions  int32[T]  first texts, each closed by end of text
    tokens, targets, segments, positions     int32[U]  second texts, after and before theirs
    weights                                  float32[U]

    Segment n of the targets belongs to segment n of the inputs.
    """

    def __init__(self, objective: Seq2Seq, store: Store, length: int) -> None:
        self.shape = (length, objective.target_length)
        limits = [
            Limit("data.length", length),
            Limit("objective.target_length", objective.target_length),
        ]
        super().__init__(store, lengths(store), limits, objective.long)

    def asked(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        first, second = self.document(number)
        return first[:-1][: self.shape[0]], second[1:-1]

    def row(self, index: int) -> Row:
        T, U = self.shape
        pairs = self.documents(index)
        firsts = [first[1:][:T] for first, _ in pairs]
        seconds = [second[: U + 1] for _, second in pairs]
        return {
            "inputs": _joined(firsts, T),
            **_places("input_", [len(first) for first in firsts], T),
            **_predicted(self.store, seconds, [0] * len(seconds), U),
        }


class Answers(Answered):
    """Rows of `Sft`: those of `lm.data.packing`, with weight on the answers and their ends."""

    def __init__(self, objective: Sft, store: Store, length: int) -> None:
        self.length = length
        sizes = lengths(store)
        total = sizes.sum(1) - 1  # the end of text between the two is left out
        limits = [Limit("data.length", length)]
        # Where the prompt alone fills a row, nothing would be scored.
        hopeless = sizes[:, 0] > length
        super().__init__(store, total[:, None], limits, objective.long, hopeless)

    def asked(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        prompt, answer = self.document(number)
        return prompt[:-1], answer[1:-1]

    def row(self, index: int) -> Row:
        texts, given = [], []
        for prompt, answer in self.documents(index):
            texts.append(np.concatenate([prompt[:-1], answer[1:]])[: self.length + 1])
            given.append(len(prompt) - 2)
        return _predicted(self.store, texts, given, self.length)


def _predicted(
    store: Store, texts: list[np.ndarray], given: list[int], length: int
) -> Row:
    """Texts side by side, each predicting its next token; the first so many are not scored."""
    counts = [len(text) - 1 for text in texts]
    targets = _joined([text[1:] for text in texts], length)
    weights = [
        np.arange(count) >= start for count, start in zip(counts, given, strict=True)
    ]
    row = {
        "tokens": _joined([text[:-1] for text in texts], length),
        "targets": targets,
        **_places("", counts, length),
        "weights": padded(np.concatenate(weights).astype(np.float32), length),
    }
    scored = targets[row["weights"] > 0]
    return {**row, "bytes": store.token_bytes[scored].sum(dtype=np.int32)}


def _joined(texts: list[np.ndarray], length: int) -> np.ndarray:
    return padded(np.concatenate(texts), length)


def _places(name: str, counts: list[int], length: int) -> Row:
    segments = np.repeat(np.arange(1, len(counts) + 1, dtype=np.int32), counts)
    return {
        f"{name}segments": padded(segments, length),
        f"{name}positions": padded(offsets(segments), length),
    }
