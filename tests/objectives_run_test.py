"""Objectives beyond the causal one train the decoder there is, from real files."""

import json

import pytest
import runs
import toy

from lm import batches, config, loop, resume

PAIRS = [
    {"prompt": f"{a} plus {b} is ", "answer": str(a + b)}
    for a in range(12)
    for b in range(12)
]


@pytest.fixture
def files(tmp_path):
    """Questions with answers, and the fields that choose them."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    changed = {
        "data.source": f"jsonl:{path}#prompt+answer",
        "data.store_dir": tmp_path / "stores",
        "data.packing": "documents",
        "data.holdout": 0.2,
        "eval.sets.0.batches": "none",
    }
    return path, changed


def test_answers_are_trained_and_evaluated(files, tmp_path):
    _, changed = files
    changed = {"objective": "Sft", "optim.learning_rate": 1e-2, **changed}
    result = runs.small(tmp_path / "run", {**changed, "train.steps": 24})
    assert result.code == loop.DONE, result.err
    losses = runs.losses(tmp_path / "run")
    assert losses[24] < 0.6 * losses[1]
    [score] = runs.records(tmp_path / "run", "eval")
    # Of the questions kept apart, each digit of an answer and its end, once each.
    split = score["tokens"]
    assert 2 * 15 < split < 3 * 45
    assert 0 < score["accuracy"] <= 1


def test_a_resumed_run_keeps_its_objective():
    sets = ["objective=Sft", "data.packing=documents"]
    stored = config.to_json(toy.experiment(*sets))
    with toy.refused("objective.long: 'refuse' → 'drop' (an example's number"):
        resume.changes(stored, toy.experiment(*sets, "objective.long=drop"))
    with toy.refused("objective.kind: 'Sft' → 'Causal' (an example's number"):
        resume.changes(stored, toy.experiment("data.packing=documents"))


def test_prefixes_train_with_causal_attention(tmp_path):
    result = runs.small(tmp_path / "run", {"objective": "Prefix", "train.steps": 4})
    assert result.code == loop.DONE, result.err
    scored = [r["tokens"] for r in runs.records(tmp_path / "run")]
    assert 0.3 * 4 * 8 * 32 < scored[-1] < 0.7 * 4 * 8 * 32  # half of the tokens


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (
            ["objective=Masked"],
            ["objective=Masked does not go", "Masked needs model=Encoder"],
        ),
        (["objective=SpanCorruption"], ["needs an encoder and a decoder"]),
        (["objective=Seq2Seq"], ["needs an encoder and a decoder"]),
        (
            ["objective=Classification", "objective.labels=a,b"],
            ["which is trained by Causal or Prefix or Sft", "model.head=Classes"],
        ),
        (["objective=Sft"], ["takes whole documents", "data.packing=documents"]),
        (
            ["objective=Sft", "data.packing=documents", "data.isolate=false"],
            ["data.isolate=true"],
        ),
    ],
)
def test_what_a_decoder_cannot_do_is_refused(sets, words):
    with toy.refused(*words):
        toy.experiment(*sets)


def test_what_an_objective_adds_is_part_of_the_vocabulary():
    assert [batches.added(o) for o in (batches.Causal(), batches.Masked())] == [0, 1]
    assert batches.added(batches.Masked(mask_id=3)) == 0
    assert batches.added(batches.SpanCorruption(sentinels=7)) == 7


def test_fields_out_of_range_are_refused():
    for wrong, words in [
        (lambda: batches.Masked(rate=1.0), ["objective.rate=1.0"]),
        (lambda: batches.Masked(mask=0.8, replace=0.3), ["sum of at most 1"]),
        (lambda: batches.SpanCorruption(mean_span=0.5), ["mean_span=0.5"]),
        (lambda: batches.Seq2Seq(target_length=0), ["target_length=0"]),
        (lambda: batches.Classification(labels=("a", "a")), ["two different ones"]),
        (lambda: batches.Prefix(z_loss=-1.0), ["z_loss"]),
        (
            lambda: batches.SpanCorruption(sentinels=9).sizes(512, True),
            ["sentinels=9", "objective.sentinels=26"],
        ),
    ]:
        with toy.refused(*words):
            wrong()
