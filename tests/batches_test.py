"""What is hidden is what is scored, nothing is lost or counted twice, on any number of hosts."""

import itertools
import json

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_test import EOT, LENGTHS, Ring

from lm import batches
from lm.batches import classes, masked, pairs, prefix, records, spans
from lm.data import loader, packing
from lm.data.loader import Bytes, Data

CODER = loader.tokenizers.load(Bytes())
LABELS = ("ham", "spam")
TEXTS = [
    {
        "text": f"line {i}, " + "the whale and the sea " * (i % 4) + "é",
        "target": f"línea {i} " * (1 + i % 3),
        "label": LABELS[i % 3 == 0],
    }
    for i in range(90)
]
ALL = {  # objective: the fields it reads
    batches.Causal(): "text",
    batches.Prefix(): "text",
    batches.Masked(): "text",
    batches.Masked(whole_words=True, mask_id=7): "text",
    batches.SpanCorruption(): "text",
    batches.Seq2Seq(target_length=96): "text+target",
    batches.Sft(): "text+target",
    batches.Classification(labels=LABELS): "text+label",
}
NAMES = [
    f"{type(o).__name__}{' words' * getattr(o, 'whole_words', False)}" for o in ALL
]


def data_in(path, fields, length=128, **options):
    file = path / "a.jsonl"
    file.write_text("".join(json.dumps(t) + "\n" for t in options.pop("texts", TEXTS)))
    return Data(
        **{
            "source": (f"jsonl:{file}#{fields}",),
            "length": length,
            "packing": "documents",
            "tokenizer": Bytes(),
            "holdout": 0.0,
            "store_dir": str(path / "store"),
            **options,
        }
    )


@pytest.fixture(params=ALL.items(), ids=NAMES)
def made(request, tmp_path):
    """An objective, its examples and its evaluation, from a file."""
    objective, fields = request.param
    data = data_in(tmp_path, fields)
    coder = batches.tokenizer(objective, data, 257 + batches.added(objective))
    parts = batches.stores(objective, data, coder)
    return (
        objective,
        batches.examples(objective, data, parts, coder, 3),
        batches.evaluation(objective, data, parts[0], coder),
    )


def take(count, dataset, **options):
    return list(itertools.islice(loader.batches(dataset, **options), count))


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_the_same_on_any_number_of_hosts_and_after_a_restart(made):
    _, examples, evaluation = made
    alone = take(4, examples, sizes=8)
    assert [b["index"].tolist() for b in alone] == [
        list(range(i, i + 8)) for i in range(0, 32, 8)
    ]
    for name, values in alone[0].items():
        assert values.dtype == (
            {"weights": np.float32, "index": np.uint32}.get(name, np.int32)
        )
        assert all(b[name].shape == values.shape for b in alone)  # static
    for hosts in (2, 4):
        for h in range(hosts):
            mine = slice(h, None, hosts)
            here = take(
                *(2, examples), sizes=8, rows=lambda n, mine=mine: np.arange(n)[mine]
            )
            for a, b in zip(alone, here, strict=False):
                equal({k: v[mine] for k, v in a.items()}, b)
    later = take(2, examples, sizes=8, start=16, step=2, threads=1)
    for a, b in zip(alone[2:], later, strict=True):
        equal(a, b)
    whole = take(9999, evaluation, sizes=1)
    padded = take(9999, evaluation, sizes=len(whole) - 1)
    for name in ("weights", "bytes"):  # rows that fill up the last batch count nothing
        if name in padded[0]:
            total = sum(b[name].sum() for b in whole)
            assert sum(b[name].sum() for b in padded) == total


def text_rows(lengths, length, kind, index):
    """A ring of documents, and rows of it of each kind that `lm.data` makes."""
    ring = Ring(lengths)
    length = min(length, ring.tokens)
    if kind == "evaluation":
        rows = packing.Evaluation(ring, length)
        index %= len(rows)
    else:
        rows = {"windows": packing.Windows, "documents": packing.Packed}[kind](
            ring, length, 1
        )
    row = {**rows[index], "index": np.uint32(index)}
    frozen = {k: v.copy() for k, v in row.items()}
    return ring, row, frozen


ROW = (
    LENGTHS,
    st.integers(1, 60),
    st.sampled_from(["windows", "documents", "evaluation"]),
    st.integers(0, 99),
)


@given(*ROW)
@settings(max_examples=60, deadline=None)
def test_a_prefix_is_given_and_the_rest_scored(lengths, length, kind, index):
    ring, row, before = text_rows(lengths, length, kind, index)
    made = prefix.rows(ring, 5, index, row)
    equal(row, before)  # rows may be shared
    for segment in range(1, row["segments"].max() + 1):
        mine = np.flatnonzero(row["segments"] == segment)
        given_ = int(made["prefix"][mine].sum())
        assert 1 <= given_ <= len(mine)
        assert made["prefix"][mine].tolist() == [1] * given_ + [0] * (
            len(mine) - given_
        )
        # A target is the next token: what is scored begins with the first not given.
        scored = row["weights"][mine] * (np.arange(len(mine)) >= given_ - 1)
        assert made["weights"][mine].tolist() == scored.tolist()
    assert not made["prefix"][row["segments"] == 0].any()
    scored = made["targets"][made["weights"] > 0]
    assert made["bytes"] == ring.token_bytes[scored].sum()


@given(*ROW, st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_masked_is_what_is_scored(lengths, length, kind, index, words):
    ring, row, before = text_rows(lengths, length, kind, index)
    begins = np.arange(ring.tokens) % 3 == 0 if words else None
    made = masked.rows(batches.Masked(), ring, begins, 5, index, row)
    equal(row, before)
    chosen = made["weights"] > 0
    assert (made["targets"] == row["tokens"]).all()
    assert (made["tokens"] == row["tokens"])[~chosen].all()
    free = (row["segments"] > 0) & (row["tokens"] != EOT)
    assert not chosen[~free].any() and not (made["tokens"][chosen] == EOT).any()
    wanted = min(max(round(0.15 * free.sum()), 1), free.sum())
    if not words:
        assert chosen.sum() == wanted
    else:  # words of up to three tokens, each wholly or not
        edges = begins[row["tokens"]] | ~free
        edges |= np.diff(row["segments"], prepend=-1) != 0
        word = np.cumsum(edges)
        for w in np.unique(word[free]):
            assert len(set(chosen[free & (word == w)])) == 1
        assert abs(int(chosen.sum()) - wanted) <= 2
    assert made["bytes"] == ring.token_bytes[row["tokens"][chosen]].sum()


def test_masks_come_in_the_proportions_asked_for():
    ring = Ring([20] * 50)
    rows = packing.Packed(ring, 500, 1)
    counts = np.zeros(3)
    for index in range(60):
        made = masked.rows(batches.Masked(), ring, None, 5, index, rows[index])
        chosen = made["weights"] > 0
        new, old = made["tokens"][chosen], made["targets"][chosen]
        mask = new == ring.tokens
        counts += [mask.sum(), (~mask & (new != old)).sum(), (new == old).sum()]
    share = counts / counts.sum()
    # 4,275 draws: four standard deviations of the smaller shares are 0.018.
    np.testing.assert_allclose(share, [0.8, 0.1, 0.1], atol=0.025)


@given(*ROW, st.booleans())
@settings(max_examples=100, deadline=None)
def test_inputs_and_targets_of_spans_are_the_text(
    lengths, length, kind, index, isolate
):
    objective = batches.SpanCorruption()
    text, U = objective.sizes(length, isolate)
    ring, row, _ = text_rows(lengths, text, kind, index)
    if not isolate:
        row = {**loader._joined(row), "index": row["index"]}
    made = spans.rows(objective, ring, (length, U), isolate, 5, index, row)
    assert {len(made[k]) for k in ("inputs", "input_segments")} == {length}
    assert {len(made[k]) for k in ("tokens", "targets", "weights")} == {U}
    used = int(made["weights"].sum())
    assert (made["weights"][:used] == 1).all() and not made["targets"][used:].any()
    # Each document's targets follow an end of text and close with one.
    owner, sentinel = made["segments"][:used], ring.tokens
    for segment in np.unique(owner):
        mine = np.flatnonzero(owner == segment)
        targets, tokens = made["targets"][mine], made["tokens"][mine]
        assert targets[-1] == EOT and tokens[0] == EOT
        assert (tokens[1:] == targets[:-1]).all()
        assert made["positions"][mine].tolist() == list(range(len(mine)))
        assert targets[0] >= sentinel
    # What each sentinel stands for, put back, is the text.
    hidden = {}
    for token, segment in zip(made["targets"][:used], owner, strict=True):
        if token >= sentinel:
            hidden[int(token)], at = [], int(token)
            home = segment
        else:
            hidden[at].append((int(token), int(segment)))
            assert segment == home
    for key, run in hidden.items():
        closing = run and run[-1][0] == EOT and isolate
        hidden[key] = run[:-1] if closing else run
    if not isolate and used:  # one document: only the last one closes
        hidden[at] = hidden[at][:-1]
    real = made["input_segments"] > 0
    restored = []
    both = zip(made["inputs"][real], made["input_segments"][real], strict=True)
    for token, segment in both:
        run = hidden.pop(int(token), None) if token >= sentinel else None
        restored += [(int(token), int(segment))] if run is None else run
    assert not hidden
    kept = row["segments"] > 0
    both = zip(
        row["tokens"][kept].tolist(), row["segments"][kept].tolist(), strict=True
    )
    assert restored == list(both)
    assert made["bytes"] == sum(
        ring.token_bytes[t] for t in made["targets"][:used] if t < sentinel
    )


def test_spans_have_the_sizes_of_t5():
    objective = batches.SpanCorruption()
    text, targets = objective.sizes(512, isolate=False)
    assert (text, targets) == (569, 114)  # the paper's 512 and 114, with no end of text
    rows = packing.Windows(ring := Ring([700] * 10), text, 1)
    cut, runs = objective.counts(text)
    for index in range(4):
        row = {**loader._joined(rows[index]), "index": np.uint32(0)}
        made = spans.rows(objective, ring, (512, targets), False, 5, index, row)
        assert (made["input_segments"] == 1).all() and made["weights"].all()
        assert (made["inputs"] >= ring.tokens).sum() == runs
        assert (cut, runs) == (85, 28)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=200),
    st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_a_plan_holds_every_document_once_and_no_row_too_much(sizes, seed):
    sizes, room = np.array(sizes), np.array([12, 9])
    order, first = records.plan(sizes, room, seed)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert (np.diff(first) > 0).all() and first[-1] == len(order)
    held = np.add.reduceat(sizes[order], first[:-1])
    assert (held <= room).all()
    # At most one row is at most half full on both sides, or they would be one.
    assert ((2 * held <= room).all(1)).sum() <= 1


def two_fields(lengths):
    ring = Ring([n for pair in lengths for n in pair])
    ring.fields = ("a", "b")
    return ring


TWO = st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=60)


def documents(ring):
    cuts = np.split(ring.stream, ring.begins)[1:]
    return [(a[1:].tolist(), b[1:].tolist()) for a, b in zip(cuts[::2], cuts[1::2])]  # noqa: B905


@given(TWO)
@settings(max_examples=40, deadline=None)
def test_rows_of_pairs_hold_every_pair_once(lengths):
    ring = two_fields(lengths)
    rows = pairs.Pairs(batches.Seq2Seq(target_length=11), ring, 14)
    found = []
    for row in (rows[i] for i in range(len(rows))):
        assert row["segments"].max() == row["input_segments"].max()
        for segment in range(1, row["segments"].max() + 1):
            inputs = row["inputs"][row["input_segments"] == segment].tolist()
            mine = row["segments"] == segment
            tokens, targets = (
                row["tokens"][mine].tolist(),
                row["targets"][mine].tolist(),
            )
            assert inputs[-1] == targets[-1] == tokens[0] == EOT
            assert tokens[1:] == targets[:-1]
            assert (row["weights"][mine] == 1).all()
            found.append((inputs[:-1], targets[:-1]))
        assert row["weights"].sum() == (row["segments"] > 0).sum()
    assert sorted(found) == sorted(documents(ring))


@given(TWO)
@settings(max_examples=40, deadline=None)
def test_only_answers_are_scored_and_each_of_their_tokens_once(lengths):
    ring = two_fields(lengths)
    rows = pairs.Answers(batches.Sft(), ring, 20)
    found = []
    for row in (rows[i] for i in range(len(rows))):
        for segment in range(1, row["segments"].max() + 1):
            mine = row["segments"] == segment
            tokens, targets = (
                row["tokens"][mine].tolist(),
                row["targets"][mine].tolist(),
            )
            assert tokens[0] == targets[-1] == EOT and tokens[1:] == targets[:-1]
            answer = [
                t for t, w in zip(targets, row["weights"][mine], strict=True) if w
            ]
            found.append((tokens[1 : len(tokens) - len(answer) + 1], answer[:-1]))
        scored = row["targets"][row["weights"] > 0]
        assert row["bytes"] == ring.token_bytes[scored].sum()
    assert sorted(found) == sorted(documents(ring))


def test_long_documents_are_refused_cut_or_dropped_and_counted(caplog):
    ring = two_fields([(3, 4), (3, 30), (40, 3), (5, 5)])
    with toy.refused("2 of 4 documents", "data.length=42", "objective.long=cut"):
        pairs.Answers(batches.Sft(), ring, 20)
    with caplog.at_level("WARNING"):
        cut = pairs.Answers(batches.Sft(long="cut"), ring, 20)
        drop = pairs.Answers(batches.Sft(long="drop"), ring, 20)
    assert "1 cut, 1 dropped" in caplog.messages[0]  # one prompt alone fills a row
    assert "0 cut, 2 dropped" in caplog.messages[1]
    scored = [sum(r[i]["weights"].sum() for i in range(len(r))) for r in (cut, drop)]
    assert scored == [4 + 18 + 5, 4 + 5]
    with toy.refused("no document fits"):
        pairs.Answers(batches.Sft(long="drop"), two_fields([(40, 3)]), 20)


def test_a_label_is_a_number_and_its_text_is_whole(tmp_path):
    objective = batches.Classification(labels=LABELS)
    data = data_in(tmp_path, "text+label", length=40)
    [part] = batches.stores(objective, data, CODER)
    rows = classes.Texts(objective, part, 40, CODER, data.cleaning)
    for i, text in enumerate(TEXTS):
        row = rows[i]
        n = int(row["segments"].sum())
        assert CODER.decode(row["tokens"][1:n]) == CODER.decode(
            text["text"].encode()[: 40 - 1]
        )
        assert LABELS[row["targets"]] == text["label"] and row["tokens"][0] == CODER.eot
    numbers = [{**t, "label": int(t["label"] == "spam")} for t in TEXTS]
    (tmp_path / "n").mkdir()
    data = data_in(tmp_path / "n", "text+label", texts=numbers)
    [part] = batches.stores(objective, data, CODER)
    with toy.refused("has the label '1'", "objective.labels=('ham', 'spam')"):
        classes.Texts(objective, part, 40, CODER, data.cleaning)


def test_whole_words_begin_with_a_space():
    begins = masked.word_begins(CODER)
    assert set(np.flatnonzero(begins)) == set(b" \t\n\v\f\r\x1c\x1d\x1e\x1f")


def test_what_does_not_fit_is_told(tmp_path):
    one, two = data_in(tmp_path, "text"), data_in(tmp_path, "text+label")
    with toy.refused("takes documents of 2 fields, this one has 1 (text)"):
        batches.stores(batches.Sft(), one, CODER)
    with toy.refused("takes documents of 1 fields, this one has 2 (text, label)"):
        batches.stores(batches.Causal(), two, CODER)
    with toy.refused("set model.vocab_size=257", "100 more"):
        batches.tokenizer(batches.SpanCorruption(), one, 257)
    [part] = batches.stores(batches.Prefix(), one, CODER)
    with toy.refused("stride=8 is for objective=Causal"):
        batches.evaluation(batches.Prefix(), one, part, CODER, 8)
