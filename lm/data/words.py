"""What classic pipelines do to the words of a text: lower case, no stop words, stems.

Stop words are those of the package `stop-words`, stems those of the Snowball project
(`snowballstemmer`, Porter 2001); both know the languages of Europe by their English names.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm import config
from lm.config import ConfigError, nearest
from lm.data import sources

_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    lower: bool = False  # lower case
    stop_words: str = ""  # language whose most frequent words are dropped; "" for none
    stem: str = (
        ""  # language by whose rules words lose endings and capitals; "" for none
    )

    def apply(self, text: str) -> str:
        """Returns the text with its words changed; everything between them stays.

        Raises:
            ConfigError: an unknown language, or a package that is not installed.
        """
        if self.lower:
            text = text.lower()
        if self.stop_words:
            stop = _stop_words(self.stop_words)
            text = _WORD.sub(lambda m: "" if m[0].lower() in stop else m[0], text)
            text = re.sub(r"(?<=\s) +|^ +", "", re.sub(" +", " ", text))
        if self.stem:
            stem = _stemmer(self.stem)
            text = _WORD.sub(lambda m: stem(m[0].lower()), text)
        return text


@functools.cache
def _stop_words(language: str) -> frozenset[str]:
    try:
        import stop_words
    except ImportError as error:
        raise ConfigError(
            "objective.words.stop_words needs the package stop-words; install it with "
            "`pip install stop-words`"
        ) from error
    known = stop_words.AVAILABLE_LANGUAGES
    if language not in known:
        raise ConfigError(
            f"objective.words.stop_words={language}: no such language{nearest(language, known)}"
        )
    return frozenset(stop_words.get_stop_words(language))


@functools.cache
def _stemmer(language: str) -> Callable[[str], str]:
    try:
        import snowballstemmer
    except ImportError as error:
        raise ConfigError(
            "objective.words.stem needs the package snowballstemmer; install it with "
            "`pip install snowballstemmer`"
        ) from error
    known = snowballstemmer.algorithms()
    if language not in known:
        raise ConfigError(
            f"objective.words.stem={language}: no such language{nearest(language, known)}"
        )
    # Its words are few: remembering them is ten times as fast.
    return functools.lru_cache(1 << 16)(snowballstemmer.stemmer(language).stemWord)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A source whose first field is changed by `words`."""

    source: sources.Source
    words: Words

    @property
    def spec(self) -> str:
        return self.source.spec

    @property
    def fields(self) -> tuple[str, ...]:
        return self.source.fields

    @property
    def own_splits(self) -> bool:
        return self.source.own_splits

    def parts(self, split: str) -> Sequence["PreparedPart"]:
        return [PreparedPart(part, self.words) for part in self.source.parts(split)]

    def fingerprint(self, split: str) -> str:
        key: Any = [self.source.fingerprint(split), config.to_json(self.words)]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class PreparedPart:
    part: sources.Part
    words: Words

    @property
    def size(self) -> int:
        return self.part.size

    def documents(self) -> Iterator[tuple[str, ...]]:
        for first, *rest in self.part.documents():
            yield (self.words.apply(first), *rest)
