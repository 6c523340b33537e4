"""What trained models have to beat: `python -m benchmarks.baselines`.

Translation, on the held-out books of `lm_bible`, English to Spanish: the source copied, and
each word replaced by the likeliest of a dictionary learned from the training verses (IBM
model 1, Brown et al. 1993, by expectation maximization). Spam, on the test of `make spam`:
TF-IDF of words and a logistic regression. Needs the extras `metrics` and `dev`.
"""

import argparse
import collections
import importlib.util
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.__main__ import heading
from lm import plot
from lm.config import ConfigError
from lm.data import corpus
from lm.scores import classes, texts

ITERATIONS = 5
SPAM = pathlib.Path(".cache/spam")
LABELS = ("ham", "spam")

_WORD = re.compile(r"\w+")


def verses(split: str) -> list[tuple[str, str]]:
    """Returns (English, Spanish) of each verse of a split."""
    found = corpus.documents("verses", "lm_bible")
    return [(v["en"], v["es"]) for v in found if v["split"] == split]


def dictionary(
    pairs: Sequence[tuple[str, str]], iterations: int = ITERATIONS
) -> dict[str, str]:
    """Returns the likeliest translation of each word, in lower case, by IBM model 1.

    t(f | e) grows with how often e explains f better than the other words of its sentence
    do. Every sentence has an empty word besides, for words that translate none.
    """
    sides = [[["", *_words(a)] for a, _ in pairs], [_words(b) for _, b in pairs]]
    names: list[list[str]] = []
    ids: list[list[np.ndarray]] = []
    for side in sides:
        number: dict[str, int] = {}
        ids.append(
            [np.array([number.setdefault(w, len(number)) for w in s]) for s in side]
        )
        names.append(list(number))
    # Every e with every f of its sentence; `place` is the word f stands for.
    e = np.concatenate([np.tile(a, len(b)) for a, b in zip(*ids, strict=True)])
    f = np.concatenate([np.repeat(b, len(a)) for a, b in zip(*ids, strict=True)])
    sizes = np.concatenate([np.full(len(b), len(a)) for a, b in zip(*ids, strict=True)])
    place = np.repeat(np.arange(len(sizes)), sizes)
    keys, kind = np.unique(e * len(names[1]) + f, return_inverse=True)
    source, target = np.divmod(keys, len(names[1]))
    t = np.full(len(keys), 1.0)
    for _ in range(iterations):
        weight = t[kind]
        weight /= np.bincount(place, weight)[place]
        count = np.bincount(kind, weight)
        t = count / np.bincount(source, count)[source]
    best: dict[str, str] = {}
    for at in np.argsort(t, kind="stable").tolist():  # the last one wins
        best[names[0][source[at]]] = names[1][target[at]]
    best.pop("", None)
    return best


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def by_word(text: str, known: dict[str, str]) -> str:
    """Returns the text with each known word replaced, capitals kept."""

    def translated(match: re.Match[str]) -> str:
        word = known.get(match[0].lower(), match[0])
        return word.capitalize() if match[0][0].isupper() else word

    return _WORD.sub(translated, text)


def translation() -> list[tuple[str, str]]:
    """Returns rows of (what, result), copying and by word."""
    train, test = verses("train"), verses("test")
    sources, references = (list(side) for side in zip(*test, strict=True))
    began = time.process_time()
    known = dictionary(train)
    seconds = time.process_time() - began
    rows = []
    for name, hypotheses in (
        ("the English copied", sources),
        (
            f"word by word, a dictionary of {len(known):,} words (IBM model 1, "
            f"{ITERATIONS} rounds, {seconds:.0f} CPU s)",
            [by_word(text, known) for text in sources],
        ),
    ):
        bleu, chrf = (f(hypotheses, references) for f in (texts.bleu, texts.chrf))
        what = f"lm_bible test, {len(test):,} verses, English to Spanish: {name}"
        result = f"BLEU {bleu['bleu']:.2f}, chrF {chrf['chrf']:.2f}"
        signed = [s["signature"].replace("|", " ") for s in (bleu, chrf)]
        rows.append((what, f"{result} (`{signed[0]}`; `{signed[1]}`)"))
    return rows


def spam(folder: pathlib.Path = SPAM, picture: str = "") -> list[tuple[str, str]]:
    """Returns the rows of a linear classifier, of mail as it was sent and as it is read; draws the
    confusion matrix of the first where asked to."""
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("spam needs `pip install scikit-learn`")
    sets = {}
    for name in ("train", "valid", "test"):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            raise ConfigError(f"{path} is not there; `make spam` writes it")
        lines = path.read_text("utf-8").split("\n")[:-1]
        sets[name] = [json.loads(line) for line in lines]
        if not all("plain" in m for m in sets[name]):
            raise ConfigError(
                f"{path} lacks the field plain; `make spam` writes it anew"
            )
    train = sets["train"] + sets["valid"]  # nothing is chosen here
    many = collections.Counter(m["label"] for m in sets["test"])
    rows = []
    for field in ("text", "plain"):
        counts, how = linear(train, sets["test"], field)
        if picture and not rows:
            what = "TF-IDF and logistic regression"
            plot.confusion(counts.tolist(), LABELS, picture, what)
        score = classes.scores(counts, LABELS)
        keys = ("accuracy", "macro_f1", "precision/spam", "recall/spam")
        what = f"spam test, {many['ham']} ham and {many['spam']} spam, `{field}`: {how}"
        rows.append((what, ", ".join(f"{k} {score[k]:.4f}" for k in keys)))
    return rows


def linear(
    train: Sequence[dict[str, str]], test: Sequence[dict[str, str]], field: str
) -> tuple[np.ndarray, str]:
    """Returns counts of (true, found) labels by TF-IDF and logistic regression, and what it is."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    began = time.process_time()
    vectors = TfidfVectorizer(sublinear_tf=True)
    model = LogisticRegression(C=100.0, max_iter=1000)
    model.fit(
        vectors.fit_transform(m[field] for m in train),
        [LABELS.index(m["label"]) for m in train],
    )
    found = model.predict(vectors.transform(m[field] for m in test))
    seconds = time.process_time() - began
    counts = np.zeros((2, 2), np.int64)
    np.add.at(counts, ([LABELS.index(m["label"]) for m in test], found), 1)
    return counts, (
        f"TF-IDF of {len(vectors.vocabulary_):,} words, logistic regression (C 100, {seconds:.0f} "
        "CPU s)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baselines", description=__doc__
    )
    parser.add_argument("--spam", type=pathlib.Path, default=SPAM, metavar="DIR")
    parser.add_argument("--picture", default="", metavar="PNG", help="of the classes")
    given = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    print(heading(words, "benchmarks.baselines"))
    print("\n| what | result |\n|---|---|")
    parts: list[Callable[[], list[tuple[str, str]]]] = [
        translation,
        lambda: spam(given.spam, given.picture),
    ]
    failed = 0
    for part in parts:
        try:
            rows = part()
        except ConfigError as error:
            failed, rows = 1, [("not run", str(error))]
        for what, result in rows:
            print(f"| {what} | {result} |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
