"""A store holds exactly the tokens of its text, or it is not used."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations import memory

from lm.config import ConfigError
from lm.data import artifacts, cleaning, sources, store, tokenizer, workers

TEXTS = [f"document {i}\n" + "é whale. " * (i % 7) for i in range(60)]
CODER = tokenizer.load(tokenizer.Bytes())


def write(path, texts):
    path.mkdir(exist_ok=True)
    (path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts)
    )
    return f"jsonl:{path}/*.jsonl"


def obtain(spec, root, split="train", **options):
    options = {"holdout": 0.0, **options}
    source = sources.find(spec)
    return store.obtain(
        source,
        split,
        cleaning=cleaning.Cleaning(),
        coder=CODER,
        store_dir=str(root),
        **options,
    )


def stream(texts):
    return [t for text in texts for t in [CODER.eot, *CODER.encode(text)]]


def contents(path):
    return {p.name: p.read_bytes() for p in sorted(pathlib.Path(path).iterdir())}


@pytest.fixture
def small_parts(monkeypatch):
    """Many parts, and processes for however little text."""
    monkeypatch.setattr(sources, "_PART", 300)
    monkeypatch.setattr(workers, "_POOL_BYTES", 0)


def test_a_store_is_the_stream_of_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PART", 300)
    monkeypatch.setattr(store, "_SHARD", 500)
    texts = [*TEXTS[:20], "", TEXTS[3], " \n", *TEXTS[20:], TEXTS[50]]
    made = obtain(write(tmp_path / "text", texts), tmp_path / "store")
    expected = stream(TEXTS)
    assert len(list(made.path.glob("tokens-*"))) > 3
    assert made.read(0, made.tokens).tolist() == expected
    begins = np.flatnonzero(np.array(expected) == CODER.eot)
    assert made.starts(0, made.tokens).tolist() == begins.tolist()
    for start, stop in [(0, 1), (1, 700), (500, 1200), (made.tokens - 1, made.tokens)]:
        inside = begins[(begins >= start) & (begins < stop)]
        assert made.starts(start, stop).tolist() == inside.tolist()
        assert made.read(start, stop - start).tolist() == expected[start:stop]
    ring = made.read(made.tokens - 3, 2 * made.tokens)  # over the end, and once more
    assert ring.tolist() == (expected[-3:] + expected * 2)[: 2 * made.tokens]
    assert made.counts == {
        "documents": len(TEXTS),
        "tokens": len(expected),
        "bytes": sum(len(t.encode()) for t in TEXTS),
        "empty": 2,
        "duplicates": 2,
    }


def test_documents_of_two_fields_lie_side_by_side(tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(store, "_SHARD", 300)
    rows = [(f"question {i % 50}", f"answer {i}") for i in range(100)]
    rows += [rows[3], ("question 7", " "), ("", "answer 7")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))
    spec = f"jsonl:{path}#q+a"
    made = obtain(spec, tmp_path / "store", processes=2)
    assert made.fields == ("q", "a") and len(list(made.path.glob("tokens-*"))) > 1
    texts = [text for row in rows[:100] for text in row]
    assert made.read(0, made.tokens).tolist() == stream(texts)
    assert len(made.starts(0, made.tokens)) == 200
    assert made.counts["documents"] == 100
    assert (made.counts["duplicates"], made.counts["empty"]) == (1, 2)
    splits = [
        obtain(spec, tmp_path / "store", split, holdout=0.3)
        for split in ("train", "validation")
    ]
    assert sum(s.counts["documents"] for s in splits) == 100
    questions = [
        {
            CODER.decode(d)
            for d in np.split(s.read(0, s.tokens), s.starts(0, s.tokens))[1::2]
        }
        for s in splits
    ]
    assert len(questions[0]) + len(questions[1]) == 50  # no question is in both


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, small_parts):
    spec = write(tmp_path / "text", [*TEXTS, *TEXTS[:9]])
    made = [obtain(spec, tmp_path / str(n), processes=n) for n in (1, 3)]
    assert contents(made[0].path) == contents(made[1].path)
    assert made[0].counts["duplicates"] == 9


def test_workers_do_not_import_jax():
    code = "import sys; from lm.data import workers; print('jax' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.stdout.strip() == b"False"


def test_what_is_wrong_in_a_worker_is_told_by_the_parent(tmp_path, small_parts):
    spec = write(tmp_path / "text", TEXTS)
    with (tmp_path / "text" / "a.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl: not UTF-8 at byte"):
        obtain(spec, tmp_path / "store", processes=2)
    assert not [p for p in (tmp_path / "store").iterdir() if p.suffix != ".lock"]


def test_a_worker_that_dies_is_told(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    part = sources.find(write(tmp_path / "text", TEXTS)).parts("train")[0]
    job = workers.Job(cleaning.Cleaning(), CODER.files(), "train", None, "uint16")
    monkeypatch.setattr(workers, "_POOL_BYTES", 0)
    with pytest.raises(RuntimeError, match=r"died \(exit code 3\).*data.workers"):
        list(workers.run(job, [part, part], 2))


def test_held_out_documents_are_in_one_split_only(tmp_path):
    texts = [f"text {i}" for i in range(1000)]
    spec = write(tmp_path / "text", texts * 2)
    made = [
        obtain(spec, tmp_path / "store", split, holdout=0.1)
        for split in ("train", "validation")
    ]
    documents = [
        {
            CODER.decode(d)
            for d in np.split(s.read(0, s.tokens), s.starts(0, s.tokens))[1:]
        }
        for s in made
    ]
    assert documents[0] | documents[1] == set(texts)
    assert not documents[0] & documents[1]
    assert 60 < len(documents[1]) < 140  # 100 expected, standard deviation 9.5


def test_a_store_is_built_once_and_anew_for_anything_else(tmp_path, monkeypatch):
    spec = write(tmp_path / "text", TEXTS)
    made = obtain(spec, tmp_path / "store")

    def no_build(*args):
        raise AssertionError("built again")

    monkeypatch.setattr(workers, "run", no_build)
    assert obtain(spec, tmp_path / "store").path == made.path
    for change in ({"holdout": 0.5}, {"split": "validation"}):
        with pytest.raises(AssertionError, match="built again"):
            obtain(spec, tmp_path / "store", **change)
    write(tmp_path / "text", TEXTS[1:])
    with pytest.raises(AssertionError, match="built again"):
        obtain(spec, tmp_path / "store")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("name", ["tokens-00000", "starts-00000", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, shorten, pathlib.Path.unlink])
def test_a_damaged_store_is_found_and_built_again(tmp_path, name, damage):
    spec = write(tmp_path / "text", TEXTS)
    made = obtain(spec, tmp_path / "store")
    sound = contents(made.path)
    damage(made.path / name)
    with pytest.raises((artifacts.Damaged, FileNotFoundError), match=name):
        artifacts.read(made.path)
    again = obtain(spec, tmp_path / "store")
    assert contents(again.path) == sound
    assert again.read(0, again.tokens).tolist() == stream(TEXTS)


def in_python(code, *arguments, **options):
    """Starts another Python that runs `code` after the imports of this file."""
    path = [str(pathlib.Path(__file__).parent), *sys.path]
    return subprocess.Popen(
        [sys.executable, "-c", "from store_test import *\n" + textwrap.dedent(code)]
        + [str(a) for a in arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_killed_build_is_never_used(tmp_path):
    spec = write(tmp_path / "text", TEXTS)
    sound = contents(obtain(spec, tmp_path / "sound").path)
    code = """
        import time
        sources._PART = 300
        run = workers.run
        def slow(*args):
            for i, chunk in enumerate(run(*args)):
                yield chunk
                if i == 3:
                    print("writing", flush=True)
                    time.sleep(60)
        workers.run = slow
        obtain(sys.argv[1], sys.argv[2])
        """
    with in_python(code, spec, tmp_path / "store") as killed:
        assert killed.stdout.readline() == "writing\n"
        killed.send_signal(signal.SIGKILL)
    [left] = [p for p in (tmp_path / "store").iterdir() if p.is_dir()]
    assert left.name.startswith(".") and contents(left)  # half a store, aside
    made = obtain(spec, tmp_path / "store")
    assert contents(made.path) == sound
    assert [p for p in (tmp_path / "store").iterdir() if p.is_dir()] == [made.path]


def test_processes_that_want_the_same_store_build_it_once(tmp_path):
    spec = write(tmp_path / "text", TEXTS)
    code = """
        import time
        run = workers.run
        def slow(*args):
            print("built", flush=True)
            time.sleep(0.5)
            return run(*args)
        workers.run = slow
        made = obtain(sys.argv[1], sys.argv[2])
        print(hashlib.sha256(made.read(0, made.tokens)).hexdigest())
        """
    both = [in_python(code, spec, tmp_path / "store") for _ in range(2)]
    words = [word for p in both for word in p.communicate()[0].split()]
    digest = hashlib.sha256(np.array(stream(TEXTS), np.uint16)).hexdigest()
    assert sorted(words) == sorted(["built", digest, digest])


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path):
    spec = write(tmp_path / "text", TEXTS)
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            obtain(sys.argv[1], sys.argv[2])
        except ConfigError as error:
            print(error)
        """
    told = in_python(code, spec, tmp_path / "store").communicate()[0]
    assert "disk full while writing" in told and "data.store_dir" in told
    assert told.count("\n") == 1
    assert not [p for p in (tmp_path / "store").iterdir() if p.is_dir()]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    spec = write(tmp_path / "text", TEXTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"is not writable \(.*data.store_dir"):
        obtain(spec, tmp_path / "file" / "store")


@pytest.mark.parametrize(
    ("texts", "split", "message"),
    [
        (["", "  "], "train", "no text, 2 empty documents"),
        ([], "train", "no text, no document"),
        (["a"], "validation", "no document in 'validation'"),
        (["a"], "test", "has the splits train and validation"),
    ],
)
def test_no_text_is_told(tmp_path, texts, split, message):
    with pytest.raises(ConfigError, match=message) as error:
        obtain(write(tmp_path / "text", texts), tmp_path / "store", split)
    assert "\n" not in str(error.value)


class Bucket(memory.MemoryFileSystem):
    """A bucket in memory, in place of Google's."""

    protocol = "gs"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))


def test_a_remote_store_is_shared_and_checked(tmp_path, monkeypatch):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    spec = write(tmp_path / "text", TEXTS)
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "one"))
    made = obtain(spec, "gs://bucket/stores")
    assert made.path.is_relative_to(tmp_path / "one")
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr(workers, "run", None)  # so it can't be built again
    again = obtain(spec, "gs://bucket/stores")
    assert contents(again.path) == contents(made.path)
    [remote] = epath.Path("gs://bucket/stores").glob("*/tokens-00000")
    remote.write_bytes(bytes(len(remote.read_bytes())))
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "three"))
    with pytest.raises(ConfigError, match="tokens-00000: its checksum differs"):
        obtain(spec, "gs://bucket/stores")
