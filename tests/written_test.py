"""Evaluation by what a model writes: every document once, whatever the mesh and the batch."""

import builtins
import json

import generate_test as sampling
import numpy as np
import pytest
import runs
import toy

from lm import batches, config, evaluate, generate

DOCUMENTS = 13  # which no batch of these tests divides
PAIRS = [
    {"asked": f"{'ab' * (i % 5)}{i}?", "answer": f"the answer {i}"}
    for i in range(DOCUMENTS)
]
SETS = (
    *("data.packing=documents", "data.holdout=0", "eval.sets.0.split=train"),
    *("generate.tokens=6", "generate.temperature=0"),
    "eval.scores=bleu,chrf,rouge,exact_match,answer_f1",
)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return f"data.source=jsonl:{path}#asked+answer"


def written(source, *sets, **given):
    """Returns the scores and the texts of a small model of random or given weights."""
    chosen = config.override(
        sampling.tiny(), ["objective=Sft", source, *SETS, *(sets or ["mesh.data=1"])]
    )
    prog = sampling.program(chosen, "train.steps=1000")
    (parts,) = evaluate.stores(chosen, sampling.CODER).values()
    weights = sampling.weights(prog, **given)
    return evaluate.written(prog, weights, parts, sampling.CODER, pytest.fail)


@pytest.mark.parametrize("beams", [1, 2])
def test_every_document_is_asked_once_on_any_mesh(source, beams):
    beams = f"generate.beams={beams}"
    scores, rows = written(source, beams, "mesh.data=1", "eval.batch_size=5")
    assert [(r["source"], r["reference"]) for r in rows] == [
        (pair["asked"], pair["answer"]) for pair in PAIRS
    ]
    assert scores["texts"] == DOCUMENTS and len({r["text"] for r in rows}) > 5
    again = written(source, beams, "mesh.data=4", "mesh.fsdp=2", "eval.batch_size=8")
    assert again == (scores, rows)


@pytest.mark.parametrize("objective", ["Sft", "Seq2Seq"])
def test_documents_are_asked_as_prompts_are(source, objective):
    """A source that is cut ends where rows cut it, but for its mark."""
    model = [] if objective == "Sft" else ["model=EncoderDecoder"]
    base = config.override(sampling.tiny(), [source, "data.packing=documents"])
    sets = [
        f"objective={objective}",
        *model,
        "eval.sets.0.split=train",
        "data.holdout=0",
    ]
    chosen = config.override(base, sets)
    (((part,),)) = evaluate.stores(chosen, sampling.CODER).values()
    found = batches.asked(chosen.objective, chosen.data, part, sampling.CODER)
    prompts = generate.encode(sampling.CODER, [p["asked"] for p in PAIRS], 48)
    for (ids, wanted), prompt, pair in zip(found, prompts, PAIRS, strict=True):
        np.testing.assert_array_equal(ids, prompt)
        assert sampling.CODER.decode(wanted) == pair["answer"]
    if objective == "Seq2Seq":
        cut = config.override(chosen, ["data.length=4", "objective.long=cut"])
        found = batches.asked(cut.objective, cut.data, part, sampling.CODER)
        assert [len(ids) for ids, _ in found] == [min(4, len(p)) for p in prompts]


def test_some_documents_are_drawn_once_and_for_all(source):
    _, all_rows = written(source)
    few, rows = written(source, "mesh.data=1", "eval.texts=4")
    assert few["texts"] == len(rows) == 4
    assert all(row in all_rows for row in rows) and rows != all_rows[:4]


def test_scores_are_those_of_the_libraries(source):
    """Of a model that answers "?" by "the an", a letter after each letter."""
    sacrebleu = pytest.importorskip("sacrebleu")
    embed, head = np.zeros((2, 264, 16))
    for i, (letter, after) in enumerate(zip(b"?the a", b"the an", strict=True)):
        embed[letter, i], head[after, i] = 1, 10
    sets = ("mesh.data=1", "model.tied=false")
    scores, rows = written(source, *sets, embed_vd=embed, head_vd=head)
    texts, references = [r["text"] for r in rows], [r["reference"] for r in rows]
    assert set(texts) == {"the an"}
    assert scores["chrf"] == sacrebleu.corpus_chrf(texts, [references]).score > 0
    assert scores["bleu"] == sacrebleu.corpus_bleu(texts, [references]).score
    assert scores["bleu_signature"].startswith("nrefs:1|case:mixed")
    assert {"rougeL", "exact_match", "answer_f1", "chrf_signature"} <= set(scores)


def test_a_run_writes_scores_and_texts(source, tmp_path):
    changed = dict(item.split("=", 1) for item in (source, *SETS))
    changed |= {"objective": "Sft", "objective.long": "drop", "train.steps": 3}
    changed |= {"eval.texts": 3, "eval.scores": "chrf", "data.length": 48}
    done = runs.small(tmp_path / "run", changed)
    assert done.code == 0, done.err
    (record,) = runs.records(tmp_path / "run", "eval")
    assert record["texts"] == 3 and record["chrf"] >= 0
    lines = (tmp_path / "run/texts/valid.jsonl").read_text().splitlines()
    assert {json.loads(line)["source"] for line in lines} < {p["asked"] for p in PAIRS}
    done = runs.here("--mode=eval", f"--workdir={tmp_path / 'run'}")
    scored = json.loads(done.out)
    assert {k: scored[k] for k in ("texts", "chrf")} == {
        k: record[k] for k in ("texts", "chrf")
    }


def test_what_cannot_be_scored_is_refused(source, monkeypatch):
    base = sampling.tiny()
    with toy.refused("eval.scores=bleu", "objective=Causal", "Seq2Seq or Sft"):
        config.override(base, ["eval.scores=bleu"])
    with toy.refused("eval.scores", "once"):
        config.override(base, ["eval.scores=bleu,bleu"])
    with toy.refused("eval.texts=0", "or none"):
        config.override(base, ["eval.texts=0"])
    with toy.refused("eval.scores=blue", "'bleu'"):
        config.override(base, ["eval.scores=blue"])
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with toy.refused("chrf needs the package sacrebleu", "pip install sacrebleu"):
        written(source, "mesh.data=1", "eval.scores=chrf")
