"""Masked language modelling: some tokens are hidden, replaced or kept, and predicted.

Devlin et al. 2019, "BERT", section 3.1 and appendix A.1.
"""

import dataclasses

import numpy as np

from lm.batches.causal import CrossEntropy
from lm.config import ConfigError
from lm.data.packing import Row, uniforms
from lm.data.store import Store
from lm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(CrossEntropy):
    """Predict hidden tokens from those on both sides of them."""

    rate: float = 0.15  # fraction of tokens that are predicted
    mask: float = 0.8  # fraction of these whose place the mask takes
    replace: float = 0.1  # fraction of these whose place another token takes
    whole_words: bool = False  # a word's tokens are predicted together
    mask_id: int | None = None  # the mask's token; None: one above the tokenizer's

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ConfigError(f"objective.rate={self.rate}: expected 0 < value < 1")
        if min(self.mask, self.replace) < 0 or self.mask + self.replace > 1:
            raise ConfigError(
                f"objective.mask={self.mask} and replace={self.replace}: expected fractions "
                "with a sum of at most 1"
            )

    @property
    def added(self) -> int:
        """Ids that the objective needs above those of the tokenizer."""
        return int(self.mask_id is None)


def word_begins(coder: Tokenizer) -> np.ndarray:
    """Returns bool[vocabulary]: the tokens that begin with white space, so begin a word."""
    letter = int(coder.encode("a")[-1])
    front = len(coder.decode([letter]))
    return np.array(
        [
            coder.decode([letter, i])[front : front + 1].isspace()
            for i in range(coder.size)
        ]
    )


def rows(
    objective: Masked,
    store: Store,
    begins: np.ndarray | None,
    seed: int,
    index: int,
    row: Row,
) -> Row:
    """Returns the row with hidden tokens; `targets` are the tokens as they were.

    Weight 1 is where a token was chosen; end of text and padding never are. `begins` (of
    `word_begins`) is for whole words.
    """
    tokens, size = row["tokens"], len(store.token_bytes)
    free = (row["segments"] > 0) & (tokens != store.eot)
    wanted = max(round(objective.rate * int(free.sum())), 1)
    drawn = uniforms(3 * len(tokens), "masked", seed, index).reshape(3, -1)
    order, action, other = drawn
    if begins is None:
        chosen = _tokens(free, wanted, order)
    else:
        edge = np.diff(row["segments"], prepend=-1) != 0
        chosen = _words(free, begins[tokens] | ~free | edge, wanted, order)
    random = np.floor(other * (size - 1)).astype(np.int32)
    random += random >= store.eot  # any token but end of text
    mask = size if objective.mask_id is None else objective.mask_id
    hidden = np.where(action < objective.mask, np.int32(mask), tokens)
    swap = (action >= objective.mask) & (action < objective.mask + objective.replace)
    return {
        **row,
        "tokens": np.where(chosen, np.where(swap, random, hidden), tokens),
        "targets": tokens,
        "weights": chosen.astype(np.float32),
        "bytes": store.token_bytes[tokens[chosen]].sum(dtype=np.int32),
    }


def _tokens(free: np.ndarray, wanted: int, order: np.ndarray) -> np.ndarray:
    """Chooses so many of the free tokens, the first by `order`."""
    chosen = np.zeros(len(free), bool)
    chosen[np.argsort(np.where(free, order, 2.0), kind="stable")[:wanted]] = True
    return chosen & free


def _words(
    free: np.ndarray, begins: np.ndarray, wanted: int, order: np.ndarray
) -> np.ndarray:
    """Chooses whole words by `order` until about so many tokens are chosen."""
    word = np.cumsum(begins) - 1
    word -= word[0]
    lengths = np.bincount(word, weights=free).astype(np.int64)
    by = np.argsort(order[: len(lengths)], kind="stable")
    by = by[lengths[by] > 0]
    # A word counts where more than half of it is wanted: right on average.
    taken = by[np.cumsum(lengths[by]) - lengths[by] / 2 < wanted]
    chosen = np.zeros(len(lengths), bool)
    chosen[taken] = True
    return chosen[word] & free
