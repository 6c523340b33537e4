"""Batches are ranges of examples, the same on any number of hosts and restarts."""

import functools
import itertools
import json
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.config import ConfigError
from lm.data import loader
from lm.data.loader import Bytes, Data, SentencePiece

T = 16
TEXTS = [f"document {i}: " + "the whale, the sea\n" * (i % 5) for i in range(80)]


def data_in(path, texts=TEXTS, **options):
    path.mkdir(parents=True, exist_ok=True)
    (path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts)
    )
    options = {"tokenizer": Bytes(), "holdout": 0.0, "length": T, **options}
    return Data(
        source=(f"jsonl:{path}/a.jsonl",), store_dir=str(path / "store"), **options
    )


@pytest.fixture(params=["windows", "documents"])
def examples(request, tmp_path):
    data = data_in(tmp_path, packing=request.param)
    coder = loader.tokenizer(data, 257)
    return loader.examples(data, loader.stores(data, coder), 3)


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_rows_need_not_be_cut_into_documents(tmp_path):
    kinds = [data_in(tmp_path, isolate=isolate) for isolate in (True, False)]
    parts = loader.stores(kinds[0], loader.tokenizer(kinds[0], 257))
    apart, joined = (loader.examples(kind, parts, 0) for kind in kinds)
    assert max(apart[i]["segments"].max() for i in range(40)) > 1
    for i in range(40):
        row = {**joined[i]}
        assert (row.pop("segments") == 1).all()
        assert row.pop("positions").tolist() == list(range(T))
        equal(row, {name: apart[i][name] for name in row})
    for row in loader.evaluation(kinds[1], parts[0]):  # and none in what is scored
        assert row["segments"].max() == 1
        assert row["positions"].tolist() == list(range(T))


def take(count, dataset, **options):
    return list(itertools.islice(loader.batches(dataset, **options), count))


def test_a_batch_stacks_its_examples(examples):
    for step, batch in enumerate(take(4, examples, sizes=6)):
        for name, dtype in {
            "tokens": np.int32,
            "targets": np.int32,
            "segments": np.int32,
            "positions": np.int32,
            "weights": np.float32,
        }.items():
            assert batch[name].shape == (6, T) and batch[name].dtype == dtype
        assert batch["bytes"].shape == (6,) and batch["bytes"].dtype == np.int32
        assert batch["index"].tolist() == list(range(step * 6, step * 6 + 6))
        assert batch["index"].dtype == np.uint32
        for row in range(6):
            equal({k: v[row] for k, v in batch.items()}, examples[step * 6 + row])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_what_one_host_reads(examples, hosts):
    alone = take(5, examples, sizes=8)
    each = [
        take(5, examples, sizes=8, rows=lambda size, h=h: np.arange(h, size, hosts))
        for h in range(hosts)
    ]
    for step, batch in enumerate(alone):
        for h in range(hosts):
            equal({k: v[h::hosts] for k, v in batch.items()}, each[h][step])


def test_a_restart_goes_on_where_it_was_with_other_hosts_and_threads(examples):
    def ramp(step):
        return 2 if step < 3 else 6

    whole = take(6, examples, sizes=ramp)
    assert [len(b["index"]) for b in whole] == [2, 2, 2, 6, 6, 6]
    assert np.concatenate([b["index"] for b in whole]).tolist() == list(range(24))
    later = take(4, examples, sizes=ramp, step=2, start=4, threads=1, prefetch=1)
    for a, b in zip(whole[2:], later, strict=True):
        equal(a, b)


def test_an_index_far_away_costs_nothing(examples):
    [batch] = take(1, examples, sizes=2, start=2**33)
    assert batch["index"].tolist() == [0, 1]  # modulo 2**32


def test_evaluation_ends_with_rows_of_weight_zero(tmp_path):
    data = data_in(tmp_path)
    [part] = loader.stores(data, loader.tokenizer(data, 257))
    rows = loader.evaluation(data, part, T // 2)
    size = next(n for n in (7, 5, 3) if len(rows) % n)
    batches = list(loader.batches(rows, sizes=size))
    assert len(batches) == math.ceil(len(rows) / size)
    assert sum(b["weights"].sum() for b in batches) == part.tokens
    assert sum(b["bytes"].sum() for b in batches) == part.counts["bytes"]
    blank = -len(rows) % size
    assert all((v[size - blank :] == 0).all() for v in batches[-1].values())


def test_a_mixture_has_the_weights_asked_for(tmp_path):
    one, two = (
        data_in(tmp_path / "1"),
        data_in(tmp_path / "2", ["Z" * 50] * 1 + ["Y" * 90]),
    )
    both = Data(
        source=one.source + two.source,
        weights=(0.75, 0.25),
        length=T,
        tokenizer=Bytes(),
        holdout=0.0,
        store_dir=one.store_dir,
    )
    parts = loader.stores(both, loader.tokenizer(both, 257))
    mixed = loader.examples(both, parts, 0)
    second = [
        bool(np.isin(mixed[i]["tokens"], [ord("Z"), ord("Y")]).any())
        for i in range(400)
    ]
    assert sum(second) == 100
    assert all(0 < sum(second[i : i + 8]) < 4 for i in range(0, 400, 8))  # evenly


def test_the_mixture_goes_by_size_when_no_weights_are_given(tmp_path):
    one, two = data_in(tmp_path / "1"), data_in(tmp_path / "2", ["Z" * 3000])
    both = Data(
        source=one.source + two.source,
        length=T,
        tokenizer=Bytes(),
        holdout=0.0,
        store_dir=one.store_dir,
    )
    parts = loader.stores(both, loader.tokenizer(both, 257))
    mixed = loader.examples(both, parts, 0)
    count = sum(p.tokens // T for p in parts)
    second = sum(bool((mixed[i]["tokens"] == ord("Z")).any()) for i in range(count))
    assert abs(second - parts[1].tokens // T) <= 0.02 * count


def meshes():
    count = jax.device_count()
    shapes = {(count, 1), (1, count)} | (
        {(count // 2, 2), (2, count // 2)} if count > 1 else set()
    )
    return sorted(shapes)


def split_over(spec, shape, x):
    """What the devices hold of x, in their order: of a split row an early and a late chunk each."""
    C = shape[1] if len(spec) > 1 and x.ndim > 1 else 1
    if C == 1:
        return x
    chunks = np.split(x, 2 * C, 1)
    return np.concatenate([chunks[n] for c in range(C) for n in (c, -1 - c)], 1)


@pytest.mark.parametrize("shape", meshes())
@pytest.mark.parametrize("spec", [("x",), ("x", "y"), (("x", "y"),), (None, "y"), ()])
def test_arrays_on_the_devices_are_the_batch(examples, shape, spec):
    types = (jax.sharding.AxisType.Explicit,) * 2
    sharding = NamedSharding(
        jax.make_mesh(shape, ("x", "y"), axis_types=types), PartitionSpec(*spec)
    )
    size = 16
    rows = functools.partial(loader.local_rows, sharding)
    assert rows(size).tolist() == list(range(size))  # all devices are this process's
    [batch] = take(1, examples, sizes=size, rows=rows)
    arrays = loader.to_devices(batch, sharding)
    equal(
        jax.device_get(arrays),
        {k: split_over(spec, shape, x) for k, x in batch.items()},
    )
    assert arrays["tokens"].sharding.is_equivalent_to(sharding, 2)
    if spec and spec[0] and shape[0] > 1:
        with pytest.raises(ConfigError, match="a batch of 17 rows is not divisible"):
            rows(17)


def test_a_tokenizer_is_trained_once_from_a_bounded_sample(tmp_path, monkeypatch):
    texts = [f"{i} whales and {i * i} ships on the {i % 13}th sea" for i in range(400)]
    trained = SentencePiece(sample_bytes=4000)
    data = data_in(tmp_path, texts, tokenizer=trained)
    taken = []
    train = loader.tokenizers.train

    def spy(config, size, sample):
        taken.extend(sample)
        return train(config, size, taken)

    monkeypatch.setattr(loader.tokenizers, "train", spy)
    monkeypatch.setattr(loader.sources, "_PART", 1000)
    coder = loader.tokenizer(data, 300)
    assert 3000 < sum(map(len, taken)) < 6000
    numbers = [int(t.split()[0]) for t in taken]
    assert min(numbers) < 100 and max(numbers) > 300  # from all over the text
    assert coder.size == 300
    monkeypatch.setattr(loader.tokenizers, "train", None)
    assert loader.tokenizer(data, 300).fingerprint == coder.fingerprint
    with pytest.raises(TypeError):  # would be trained
        loader.tokenizer(data, 301)
    [part] = loader.stores(data, coder)
    assert coder.decode(part.read(1, len(coder.encode(texts[0])))) == texts[0]


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"--set model\.vocab_size=257"):
        loader.tokenizer(data_in(tmp_path), 512)
    for wrong, message in [
        ({"source": ()}, "data.source is empty"),
        ({"weights": (1.0, 2.0)}, "2 numbers for 1 sources"),
        ({"weights": (0.0,)}, "must be above 0"),
        ({"length": 0}, "data.length=0"),
        ({"holdout": 1.0}, "data.holdout=1.0"),
        ({"workers": -1}, "data.workers=-1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Data(**{"source": ("text:x",), **wrong})
