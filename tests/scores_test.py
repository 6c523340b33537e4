"""Scores are those of the libraries that define them, and count every example once."""

import builtins
import sys

import numpy as np
import pytest
import toy

from lm import plot, train
from lm.data import loader
from lm.scores import classes, texts

NAMES = ("ham", "eggs", "spam")
HYPOTHESES = ["the cat sat on the mat", "a dog barks", "it rains in the night"]
REFERENCES = ["the cat is on the mat", "the dog is barking", "it rains in the night"]


@pytest.mark.parametrize("rows", [8, 16, 64])
@pytest.mark.parametrize("mesh", ["data 8", "data 2 x tensor 4"])
def test_confusion_counts_every_example_once(mesh, rows):
    rng = np.random.default_rng(rows)
    true, found = rng.integers(0, 3, (2, 50)).astype(np.int32)
    prog = toy.program(*toy.MESHES[mesh])

    class Rows(loader.grain.MapDataset):
        def __len__(self):
            return len(true)

        def __getitem__(self, i):
            row = {"targets": true[i], "predicted": found[i], "weights": np.float32(1)}
            return {k: np.asarray(v) for k, v in row.items()}

    count = prog.compiled(
        lambda b: classes.confusion(b["predicted"], b["targets"], b["weights"], 3)
    )
    total = np.zeros((3, 3), np.int64)
    for batch in loader.batches(Rows(), sizes=rows):
        placed = loader.to_devices(batch, prog.batch_sharding())
        total += np.asarray(count(placed)).astype(np.int64)
    wanted = np.zeros((3, 3), np.int64)
    np.add.at(wanted, (true, found), 1)
    np.testing.assert_array_equal(total, wanted)


def test_scores_of_classes_are_those_of_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true, found = rng.integers(0, 3, 200), rng.integers(0, 2, 200)  # one never found
    counts = metrics.confusion_matrix(true, found)
    got = classes.scores(counts, NAMES)
    for average, name in ((None, None), ("macro", "macro")):
        p, r, f, _ = metrics.precision_recall_fscore_support(
            true, found, average=average, zero_division=0
        )
        for kind, values in (("precision", p), ("recall", r), ("f1", f)):
            keys = [f"{kind}/{n}" for n in NAMES] if not name else [f"macro_{kind}"]
            np.testing.assert_allclose([got[k] for k in keys], np.atleast_1d(values))
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(true, found))
    assert got["examples"] == 200


def test_scores_of_classes_by_hand():
    got = classes.scores(np.array([[3, 1], [2, 4]]), ("a", "b"))
    assert got["accuracy"] == 0.7
    assert got["precision/a"] == 0.6 and got["recall/a"] == 0.75
    assert got["f1/b"] == pytest.approx(2 * 0.8 * (4 / 6) / (0.8 + 4 / 6))
    assert classes.scores(np.zeros((2, 2)), ("a", "b"))["macro_f1"] == 0


@pytest.mark.parametrize("names", [("$%$", "eggs", "$\\x$"), tuple("a" * 40)])
def test_a_confusion_matrix_is_drawn(tmp_path, names):
    """Names are no formulas; of many classes the picture stays of a size."""
    counts = np.eye(len(names)).tolist()
    plot.confusion(counts, names, tmp_path / "c.png", "a $ and a $%$")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_bleu_and_chrf_are_those_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    got = texts.bleu(HYPOTHESES, REFERENCES)
    wanted = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert got["bleu"] == wanted and 0 < wanted < 100
    assert got["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")
    several = [[r, h] for r, h in zip(REFERENCES, HYPOTHESES, strict=True)]
    assert texts.bleu(HYPOTHESES, several)["bleu"] == pytest.approx(100)
    got = texts.chrf(HYPOTHESES, REFERENCES)
    assert got["chrf"] == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert "nc:6|nw:0" in got["signature"]
    # Of the whole list, not the mean of its parts.
    parts = [texts.chrf([h], [r])["chrf"] for h, r in zip(HYPOTHESES, REFERENCES)]  # noqa: B905
    assert abs(np.mean(parts) - got["chrf"]) > 1e-3


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    got = texts.rouge(["the cat sat"], ["the cat was here"])
    # 2 of 3 and of 4 words, 1 of 2 and of 3 pairs, a common part of 2.
    assert got["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert got["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert got["rougeL"] == got["rouge1"] == got["rougeLsum"]
    assert texts.rouge(["walking"], [["x", "walked"]])["rouge1"] == 1  # stems, the best


def test_answers_are_compared_as_squad_does():
    assert texts.normalized(" The  Quick, brown-fox an' A dog!") == "quick brownfox dog"
    found = ["the Eiffel Tower.", "in 1889, in Paris", ""]
    wanted = [["Eiffel tower", "x"], ["Paris in 1889"], ["the"]]
    assert texts.exact_match(found, wanted) == pytest.approx(2 / 3)
    # Words in, 1889, in, paris against paris, in, 1889: 3 common of 4 and of 3.
    assert texts.answer_f1(found, wanted) == pytest.approx((1 + 6 / 7 + 1) / 3)


def test_what_is_missing_is_told(monkeypatch):
    with toy.refused("1 texts and 2 references"):
        texts.exact_match(["a"], ["a", "b"])
    with toy.refused("no reference"):
        texts.answer_f1(["a"], [[]])
    with toy.refused("same number of references"):
        texts.bleu(["a", "b"], [["a"], ["a", "b"]])
    real = builtins.__import__

    def absent(name, *rest):
        if name.split(".")[0] in ("sacrebleu", "rouge_score"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    for name in [m for m in sys.modules if m.startswith(("sacrebleu", "rouge_score"))]:
        monkeypatch.delitem(sys.modules, name)
    for score, package in ((texts.bleu, "sacrebleu"), (texts.rouge, "rouge-score")):
        with toy.refused(package, f"`pip install {package}`"):
            score(["a"], ["a"])


@pytest.mark.parametrize(
    "mesh",
    ["data 2 x tensor 4", "data 2 x seq 2 x tensor 2", "pipe 2 x data 2 x tensor 2"],
)
def test_accuracy_is_the_fraction_of_likeliest_tokens(mesh):
    prog, host = toy.program(*toy.MESHES[mesh]), toy.batch()
    one = toy.program()
    _, logits = toy.hidden(one)(toy.start(one, noise=0.1).params, host)
    likeliest = logits[..., : toy.VOCAB].argmax(-1)
    host["targets"] = np.where(
        np.arange(toy.LENGTH) % 3 == 0, likeliest, host["targets"]
    ).astype(np.int32)
    sums = train.make_eval_step(prog)(
        toy.start(prog, noise=0.1).params, toy.place(prog, host)
    )
    hits = (likeliest == host["targets"]) * host["weights"]
    assert 0 < hits.sum() < host["weights"].sum()
    assert float(sums["correct"]) == hits.sum()
