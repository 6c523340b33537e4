"""What bad input gets: one line with values and fix, an exit code, nothing half-written."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
from unittest import mock

import pytest
import runs

from lm import checkpoint, loop, main

HEADERS = (
    "tiny: ",
    "resuming from ",
    "a device holds: ",
    "started in ",
    "step ",
)  # may come before


def complaint(result, code):
    """Returns the one line that a failed run ends with."""
    assert result.code == code, result
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    found = [line for line in lines if not line.startswith(HEADERS)]
    assert len(found) == 1, lines
    assert found[0] == lines[-1]
    assert found[0].startswith("lm: ")
    assert not result.out
    print(found[0])
    return found[0].removeprefix("lm: ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory with checkpoints at steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    result = runs.small(workdir, {"train.steps": 4, "checkpoint.every": 2})
    assert result.code == loop.DONE, result.err
    return workdir


@pytest.fixture
def text(tmp_path):
    """A folder of plain text, and the fields that choose it."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"{i} good plain text, over and over. " * 40)
    changed = {"data.source": f"text:{folder}/*.txt", "data.holdout": 0.3}
    return folder, {**changed, "data.store_dir": tmp_path / "stores"}


def contents(folder):
    """Returns {file: bytes} of a work directory."""
    files = (p for p in pathlib.Path(folder).rglob("*") if p.is_file())
    return {p: p.read_bytes() for p in files}


SENTENCEPIECE = {"data.tokenizer": "SentencePiece", "model.vocab_size": 340}
WRONG = {  # fields: what the line names
    "misspelt": (
        {"optim.lerning_rate": 1e-3},
        ["--set optim.lerning_rate", "did you mean 'learning_rate'?"],
    ),
    "misspelt part": ({"trian.steps": 3}, ["'trian'", "did you mean 'train'?"]),
    "mistyped": ({"train.steps": "many"}, ["--set train.steps=many", "expected int"]),
    "mistyped choice": (
        {"data.packing": "boxes"},
        ["--set data.packing=boxes", "'windows', 'documents'"],
    ),
    "mistyped choices": (
        {"eval.scores": "chrf,blue"},
        ["--set eval.scores=chrf,blue", "'rouge'", "did you mean 'bleu'?"],
    ),
    "heads": ({"model.heads": 5, "model.kv_heads": 5}, ["model.dim=64", "heads=5"]),
    "kv heads": ({"model.kv_heads": 3}, ["heads=4", "kv_heads=3"]),
    "width on a mesh": (
        {"mesh.fsdp": 8, "model.dim": 68, "model.heads": 2, "train.accumulate": 1},
        ["68", "8"],
    ),
    "heads on a mesh": (
        {"mesh.tensor": 4, "model.heads": 2, "model.kv_heads": 2},
        ["heads=2", "4 (mesh.tensor=4)"],
    ),
    "mesh larger than the devices": (
        {"mesh.data": 4, "mesh.tensor": 4},
        ["data 4 x tensor 4 needs 16 devices, there are 8", "--cpu_devices"],
    ),
    "batch by mesh": (
        {"mesh.data": 8},
        ["train.batch_size=8 is not divisible by 16", "data 8, train.accumulate=2"],
    ),
    "batch by accumulation": (
        {"train.accumulate": 3},
        ["train.batch_size=8 is not divisible by train.accumulate=3"],
    ),
    "no such text": (
        {"data.source": "text:/nowhere/*.txt"},
        ["text:/nowhere/*.txt: no file matches"],
    ),
    "no such data set": (
        {"data.source": "tfds:lm_txet"},
        ["data.source=tfds:lm_txet", "lm_text"],
    ),
    "no accelerator": (
        {"train.require_accelerator": "true"},
        ["train.require_accelerator", "only a CPU", "train.require_accelerator=false"],
    ),
    "byte vocabulary": ({"model.vocab_size": 300}, ["model.vocab_size=257"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_told_in_one_line_and_leaves_nothing(tmp_path, case):
    changed, named = WRONG[case]
    workdir = tmp_path / "run"
    line = complaint(runs.small(workdir, changed), main.WRONG_USE)
    assert all(part in line for part in named), line
    assert not contents(tmp_path)


TOGETHER = ["--experiment=tiny", "--processes=2"]
SEARCH = ["--experiment=tiny", "--mode=plan", "--target=h100:8", "--search"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--experiment=shakespear"], ["'shakespear'", "did you mean 'shakespeare'?"]),
        ([], ["--experiment=NAME", "tiny"]),
        (["--experiment=tiny", "--mode=trian"], ["--mode=trian", "'train'"]),
        (["--experiment=tiny", "--set=train.steps"], ["path=value"]),
        (["--experiment=tiny", "--sed=1"], ["'sed'", "set"]),
        (["--experiment=tiny", "generate"], ["'generate'", "--"]),
        (["--experiment=tiny", "--step=two"], ["--step=two"]),
        (["--experiment=tiny", "--step=3"], ["--step is for --mode=eval", "not train"]),
        (["--experiment=tiny", "--prompt=a"], ["--prompt is for --mode=generate"]),
        (
            ["--experiment=tiny", "--mode=import", "--from=a", "--workdir=b"],
            ["--experiment is for", "not import"],
        ),
        ([*SEARCH, "--depth=modle"], ["--depth=modle", "did you mean 'model'?"]),
        ([*SEARCH, "--depth=types"], ["--search", "--depth=model"]),
        ([*SEARCH, "--price_per_chip_hour=nan"], ["--price_per_chip_hour=nan"]),
        (["--mode=eval", "--workdir=/nowhere"], ["/nowhere", "nothing was trained"]),
        (["--experiment=tiny", "--coordinator=a:1"], ["--processes=N"]),
        (["--experiment=tiny", "--processes=2"], ["--processes=2", "--coordinator="]),
        (
            ["--experiment=tiny", "--coordinator=auto", "--process_id=0"],
            ["=auto", "drop --process_id=0"],
        ),
        ([*TOGETHER, "--coordinator=a", "--process_id=0"], ["=a:", "HOST:PORT"]),
        ([*TOGETHER, "--coordinator=a:99999", "--process_id=0"], ["a:99999", "65535"]),
        (
            [*TOGETHER, "--coordinator=a:1", "--process_id=2"],
            ["--process_id=2", "0 to 1"],
        ),
        ([*TOGETHER, "--coordinator=a:1", "--process_id=-1"], ["--process_id=-1"]),
    ],
    ids=lambda value: (
        "" if isinstance(value, list) and "--" not in str(value) else None
    ),
)
def test_a_wrong_command_line_is_told_in_one_line(options, named):
    line = complaint(runs.here(*options), main.WRONG_USE)
    assert all(part in line for part in named), line


def test_a_process_ends_with_the_line_and_the_code():
    child = runs.start("--experiment=shakespear")
    output = child.communicate(timeout=60)[0]
    assert child.returncode == main.WRONG_USE
    assert output.count("\n") == 1
    assert output.startswith("lm: no experiment 'shakespear'; did you mean")


def test_empty_text_is_named(tmp_path, text):
    folder, changed = text
    for path in folder.iterdir():
        path.write_text("")
    line = complaint(runs.small(tmp_path / "run", changed), main.WRONG_USE)
    assert str(folder) in line
    assert "text" in line
    assert not contents(tmp_path / "run")


def test_text_that_is_not_utf8_is_named_with_the_offset(tmp_path, text):
    folder, changed = text
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    line = complaint(runs.small(tmp_path / "run", changed), main.WRONG_USE)
    assert f"{folder}/latin.txt: not UTF-8 at byte 3 (0xe9" in line
    assert "iconv" in line
    (folder / "latin.txt").unlink()
    assert not [p for p in contents(tmp_path / "stores") if "token" in p.name]


def test_a_vocabulary_larger_than_the_text_allows_names_the_largest(tmp_path, text):
    _, changed = text
    many = {**changed, "data.tokenizer": "SentencePiece", "model.vocab_size": 5000}
    line = complaint(runs.small(tmp_path / "run", many), main.WRONG_USE)
    assert "model.vocab_size=5000 is larger than the text allows" in line
    most = line.partition("--set model.vocab_size=")[2].split()[0]
    assert 256 < int(most) < 5000


def test_another_tokenizer_than_the_checkpoints_is_refused(tmp_path, text):
    folder, changed = text
    plain = pathlib.Path(__file__).with_name("runs.py").read_text()
    for k, path in enumerate(sorted(folder.iterdir())):
        path.write_text(f"good {plain[400 * k : 400 * k + 800]}")
    pieces = {**changed, **SENTENCEPIECE, "train.steps": 3, "data.holdout": 0.5}
    first = runs.small(tmp_path / "run", pieces)
    assert first.code == loop.DONE, first.err
    before = contents(tmp_path / "run")
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("good", "wholly other and new"))
    line = complaint(runs.small(tmp_path / "run", pieces), main.WRONG_USE)
    assert "tokenizer" in line
    assert "differs from the checkpoint's" in line
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_of_another_model_is_refused_with_the_fields(trained):
    before = contents(trained)
    changed = {"model.dim": 32, "model.layers": 3, "train.steps": 6}
    line = complaint(runs.small(trained, changed), main.WRONG_USE)
    assert "model.dim: 64 → 32" in line
    assert "model.layers: 2 → 3" in line
    assert "train.steps" not in line
    assert "--workdir" in line
    assert "init_from" not in line  # these weights would not fit either
    assert contents(trained) == before


def test_a_work_directory_of_another_version_says_what_to_do(tmp_path, trained):
    data = json.loads((trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "devices": 8}))
    result = runs.here("--mode=eval", f"--workdir={tmp_path}")
    line = complaint(result, main.WRONG_USE)
    for part in (
        f"{tmp_path}/config.json",
        "another version",
        "'devices'",
        "init_from",
    ):
        assert part in line


def test_weights_of_another_model_are_refused_with_the_arrays(tmp_path, trained):
    changed = {"train.init_from": trained, "model.dim": 32}
    line = complaint(runs.small(tmp_path / "run", changed), main.WRONG_USE)
    assert str(trained) in line
    assert "embed" in line
    assert not [p for p in contents(tmp_path) if p.name != "config.json"]


def test_weights_from_nowhere_are_refused(tmp_path):
    changed = {"train.init_from": tmp_path / "none"}
    line = complaint(runs.small(tmp_path / "run", changed), main.FAILED)
    assert f"train.init_from={tmp_path}/none" in line


def test_a_step_that_is_not_there_is_refused_with_those_that_are(trained):
    options = ("--mode=eval", f"--workdir={trained}", "--step=3")
    result = runs.here(*options, f"--set=train.compilation_cache={runs.CACHE}")
    line = complaint(result, main.FAILED)
    assert "no checkpoint 3" in line
    assert "2, 4" in line


def test_a_file_in_place_of_the_work_directory(tmp_path):
    (tmp_path / "run").write_text("in the way")
    line = complaint(runs.small(tmp_path / "run"), main.WRONG_USE)
    assert f"{tmp_path}/run" in line
    assert (tmp_path / "run").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_work_directory_that_is_not_writable(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir(mode=0o500)
    line = complaint(runs.small(workdir), main.WRONG_USE)
    assert f"{workdir}/checkpoints cannot be written (Permission denied)" in line


@contextlib.contextmanager
def full_from(step):
    """From the save of `step` on no file may grow beyond some KB: EFBIG, as a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = checkpoint.Checkpoints.save

    def save(self, now, *rest):
        if now >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return original(self, now, *rest)

    try:
        with mock.patch.object(checkpoint.Checkpoints, "save", save):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_while_saving_keeps_what_was_saved(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    changed = {"train.steps": 8, "checkpoint.every": 2}
    with full_from(6):
        result = runs.small(tmp_path / "run", changed)
    line = complaint(
        runs.Result(result.code, result.out, _without(result.err, "changed: ")),
        main.FAILED,
    )
    assert "checkpoint 6 could not be saved" in line
    assert "no space left" in line
    assert "the newest whole one is 4" in line
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]
    after = runs.small(tmp_path / "run", changed)
    assert after.code == loop.DONE, after.err
    assert "resuming from step 4 of 8" in after.err
    assert sorted(runs.losses(tmp_path / "run")) == list(range(1, 9))


def _without(text, part):
    return "".join(line for line in text.splitlines(True) if part not in line)


def test_a_prompt_longer_than_the_context_is_refused(trained):
    prompt = "so long a prompt that it does not fit"
    line = complaint(
        runs.here(
            *("--mode=generate", f"--workdir={trained}", f"--prompt={prompt}"),
            f"--set=train.compilation_cache={runs.CACHE}",
        ),
        main.WRONG_USE,
    )
    assert str(len(prompt)) in line or str(len(prompt) + 1) in line
    assert "data.length=32" in line


def test_losses_that_are_not_finite_are_skipped_and_then_stop_the_run(tmp_path):
    changed = {"optim.learning_rate": 1e30, "optim.guard.max_consecutive": 3}
    changed |= {"optim.clip_norm": "none", "optim.schedule": "Constant"}
    changed |= {"checkpoint.every": 1}
    line = complaint(runs.small(tmp_path, changed), main.FAILED)
    assert "3 steps in a row were skipped" in line
    assert "optim.learning_rate" in line
    records = runs.records(tmp_path)
    assert [r["skipped"] for r in records][-2:] == [1, 2]
    assert records[-1]["grad_norm"] is None
