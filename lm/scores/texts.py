"""Scores of texts: functions of a list of hypotheses and the list of their references.

They are taken over whole lists, gathered from all batches and hosts, because means of the
scores of parts are not the score of the whole. Libraries are those of the extra `metrics`.
"""

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from lm.config import ConfigError

References = (
    Sequence[str] | Sequence[Sequence[str]]
)  # one for each hypothesis, or several

Name: TypeAlias = Literal["bleu", "chrf", "rouge", "exact_match", "answer_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def scores(
    names: Sequence[Name], hypotheses: Sequence[str], references: References
) -> dict[str, Any]:
    """Returns the scores of these names, and the signature of those that have one."""
    found: dict[str, Any] = {}
    for name in names:
        values = _SCORES[name](hypotheses, references)
        if not isinstance(values, dict):
            values = {name: values}
        if "signature" in values:
            values[f"{name}_signature"] = values.pop("signature")
        found |= values
    return found


def require(names: Sequence[Name]) -> None:
    """Checks that the packages which these scores need are there.

    Raises:
        ConfigError: one is not, with how to install it.
    """
    for name in names:
        if name in ("bleu", "chrf"):
            _metrics(name)
        elif name == "rouge":
            _rouge_scorer()


def bleu(hypotheses: Sequence[str], references: References) -> dict[str, Any]:
    """Returns corpus `bleu` (0 to 100) and its `signature`, by sacrebleu (Post 2018)."""
    return _sacrebleu("BLEU", hypotheses, references)


def chrf(hypotheses: Sequence[str], references: References) -> dict[str, Any]:
    """Returns corpus `chrf` (0 to 100) and its `signature`, by sacrebleu (Popović 2015)."""
    return _sacrebleu("CHRF", hypotheses, references)


def _sacrebleu(
    name: str, hypotheses: Sequence[str], references: References
) -> dict[str, Any]:
    several = _several(hypotheses, references)
    if len({len(some) for some in several}) > 1:
        raise ConfigError(
            f"{name.lower()}: every text needs the same number of references, there are "
            f"{min(map(len, several))} to {max(map(len, several))}"
        )
    metric = getattr(_metrics(name.lower()), name)()
    streams = [list(stream) for stream in zip(*several, strict=True)]
    score = metric.corpus_score(list(hypotheses), streams).score
    return {name.lower(): score, "signature": str(metric.get_signature())}


def rouge(hypotheses: Sequence[str], references: References) -> dict[str, float]:
    """Returns the mean F1 of ROUGE-1, -2, -L and, by lines, -Lsum (Lin 2004), 0 to 1.

    Words are stemmed. Of several references each hypothesis gets its best.
    """
    several = _several(hypotheses, references)
    rouge_scorer = _rouge_scorer()
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    found = [
        scorer.score_multi(list(some), text)
        for text, some in zip(hypotheses, several, strict=True)
    ]
    return {k: sum(f[k].fmeasure for f in found) / len(found) for k in kinds}


def exact_match(hypotheses: Sequence[str], references: References) -> float:
    """Returns the fraction of hypotheses that are one of their references, normalized."""
    return _best(lambda a, b: float(a == b), hypotheses, references)


def answer_f1(hypotheses: Sequence[str], references: References) -> float:
    """Returns the mean F1 of the normalized words of each hypothesis and its best reference."""
    return _best(_overlap, hypotheses, references)


def normalized(text: str) -> str:
    """Returns an answer as SQuAD compares it: lower case, no punctuation, no articles.

    Rajpurkar et al. 2016, the official evaluation script.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _best(
    score: Callable[[str, str], float],
    hypotheses: Sequence[str],
    references: References,
) -> float:
    several = _several(hypotheses, references)
    best = [
        max(score(normalized(text), normalized(reference)) for reference in some)
        for text, some in zip(hypotheses, several, strict=True)
    ]
    return sum(best) / len(best)


def _overlap(text: str, reference: str) -> float:
    words, wanted = text.split(), reference.split()
    if not words or not wanted:
        return float(words == wanted)
    common = (collections.Counter(words) & collections.Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))


def _several(hypotheses: Sequence[str], references: References) -> list[Sequence[str]]:
    """Returns the references of each hypothesis, as lists."""
    if len(hypotheses) != len(references) or not hypotheses:
        raise ConfigError(
            f"{len(hypotheses)} texts and {len(references)} references: expected as many "
            "of one as of the other, and at least one"
        )
    several = [[r] if isinstance(r, str) else r for r in references]
    if not all(several):
        raise ConfigError("a text has no reference; leave it out")
    return several


def _metrics(name: str) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise _missing(name, "sacrebleu") from error
    return metrics


def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise _missing("rouge", "rouge-score") from error
    return rouge_scorer


def _missing(what: str, package: str) -> ConfigError:
    return ConfigError(
        f"{what} needs the package {package}; install it with `pip install {package}`"
    )


_SCORES: dict[str, Callable[[Sequence[str], References], Any]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
    "exact_match": exact_match,
    "answer_f1": answer_f1,
}
