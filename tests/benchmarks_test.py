"""The benchmarks run, at toy size, and tell when they compare unequal things."""

import json

import jax
import numpy as np
import pytest

import benchmarks.__main__ as command
from benchmarks import (
    baselines,
    checkpoint,
    contest,
    gpu,
    gpu_steps,
    loss_memory,
    startup,
    timing,
)
from benchmarks import compile as compilation
from lm.config import ConfigError


@pytest.fixture(autouse=True)
def _loose():
    with jax.numpy_rank_promotion("allow"):  # the hand-written steps broadcast
        yield


def test_the_contestants_train_to_equal_losses():
    bare, lm = contest.toy_bare(), contest.toy_lm()
    losses = np.array([(bare(), lm()) for _ in range(3)])
    # Rounding of fp32 in sums of another order, after at most two updates.
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)
    assert losses[-1, 0] < losses[0, 0]


def test_unequal_losses_are_refused(monkeypatch):
    timings = {
        name: timing.Timing(start=1, cpu=[1], system=[1], wall=[1], values=[loss])
        for name, loss in (("bare JAX", 5.0), ("lm", 5.01))
    }
    monkeypatch.setattr(contest, "run", lambda *_: timings)
    with pytest.raises(RuntimeError, match=r"losses differ by 2\.0e-03.*lm 5\.01"):
        contest.report()


def test_the_chunked_loss_needs_less_memory():
    naive, chunked = loss_memory.measure(512, 1024, 32, (64,))
    assert naive["ratio"] == 1
    assert chunked["MiB"] < naive["MiB"] / 2


def test_a_step_compiles_for_the_benchmark(monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests want them
    seconds = compilation.once(layers=2, dim=32)
    assert 0 < seconds.trace < seconds.total


def test_a_save_is_timed(tmp_path):
    result = checkpoint.measure(tmp_path, megabytes=1, rounds=1)
    assert 0 < result.stall < result.synchronous


def test_a_start_is_what_the_process_prints():
    assert startup.start("print('noise'); print('{\"wall\": 2}')") == {"wall": 2}
    with pytest.raises(RuntimeError, match="code 3: no jax here"):
        startup.start("import sys; print('no jax here', file=sys.stderr); sys.exit(3)")


def test_a_part_that_fails_says_so_and_the_others_go_on(monkeypatch, capsys):
    def fail(quick):
        raise ValueError("two\nlines")

    parts = {"a": ("A", "a", fail), "b": ("B", "b", lambda quick: f"quick={quick}")}
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert command.main(["--quick", "--only=a,b"]) == 1
    out = capsys.readouterr().out
    assert "failed: ValueError: two lines\n" in out
    assert "quick=True" in out
    with pytest.raises(SystemExit) as exit_:
        command.main(["--only=c"])
    assert exit_.value.code == 2


@pytest.mark.slow
def test_the_gpu_contestants_are_one_model():
    sizes = gpu_steps.sizes(2, toy=True)
    losses = [
        gpu_steps.measure(f(sizes, []), steps=1, rounds=1)["losses"]
        for f in (gpu_steps.bare, gpu_steps.lm)
    ]
    # bf16 has 8 bits of mantissa; a mean over 128 tokens averages most of it away.
    np.testing.assert_allclose(losses[0], losses[1], rtol=2**-8)


def test_a_gpu_part_has_a_limit_and_fails_in_one_line(monkeypatch):
    runner = gpu.Runner(60)
    with pytest.raises(gpu.PartError, match=r"code 1: .*No module named no_such"):
        runner.output(["no_such"], 30)
    with pytest.raises(gpu.PartError, match="no time left"):
        gpu.Runner(1).output(["json.tool"], 30)
    monkeypatch.setattr(gpu, "CONTEST", {"lm": gpu.Entry("lm")})
    answer = {"best": 0.5, "median": 0.5, "first": 9.0, "losses": [6.0, 5.0]}
    answer |= {"tokens": 1000, "device": "NVIDIA H100 80GB HBM3", "peak": 2**30}
    monkeypatch.setattr(
        gpu.Runner, "output", lambda *_: f"noise\n{json.dumps(answer)}\n"
    )
    said = []
    monkeypatch.setattr(gpu, "_say", said.append)
    gpu.contest(runner, [8, 4], toy=False)
    row = next(line for line in said if line.startswith("| lm |"))
    assert row.startswith(
        "| lm | 2,000 | 500.0 | 500.0 | 0.2% | 0.2% | 1.0 | 9.0 | 6.0000"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_benchmarks_run_at_toy_size(capsys):
    assert command.main(["--quick"]) == 0, capsys.readouterr().out


def test_a_dictionary_is_learned_from_sentences():
    pairs = [("the house", "la casa"), ("the book", "el libro"), ("a book", "un libro")]
    pairs += [("a house", "una casa"), ("The small house", "la casa pequeña")]
    known = baselines.dictionary(pairs, iterations=20)
    assert {w: known[w] for w in ("house", "book", "small")} == {
        "house": "casa",
        "book": "libro",
        "small": "pequeña",
    }
    assert baselines.by_word("Book, house!  dog", known) == "Libro, casa!  dog"


def test_spam_is_told_apart_or_what_is_missing(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(ConfigError, match=r"train\.jsonl is not there; `make spam`"):
        baselines.spam(tmp_path)
    for name, count in (("train", 16), ("valid", 4), ("test", 6)):
        lines = [
            {"label": label, "text": f"{text} {i}", "plain": f"{text} {i}"}
            for i in range(count // 2)
            for label, text in (("ham", "see you at lunch"), ("spam", "win money now"))
        ]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    rows = baselines.spam(tmp_path, str(tmp_path / "spam.png"))
    for field, (what, result) in zip(("text", "plain"), rows, strict=True):
        assert f"3 ham and 3 spam, `{field}`" in what
        assert result.startswith("accuracy 1.0000, macro_f1 1")
    assert (tmp_path / "spam.png").stat().st_size > 1000
    (tmp_path / "test.jsonl").write_text('{"label": "ham", "text": "lunch"}\n')
    with pytest.raises(
        ConfigError, match=r"test\.jsonl lacks the field plain.*make spam"
    ):
        baselines.spam(tmp_path)
