"""Measures loader and objectives (tokens/s) and the token store (MB/s): `python -m
benchmarks.loader`.

CPU time of this process, all its threads, so that other work on the machine hardly
matters; the best of several rounds. The text is the one embedded in the package,
several times over.
"""

import dataclasses
import json
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable

from lm import batches
from lm.data import corpus, loader
from lm.data.loader import Bytes, Data, SentencePiece

ROUNDS = 5
COPIES = 2  # of the text, made different by a number


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of `work` in this process and in those it waits for."""

    def used() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        usages = [resource.getrusage(kind) for kind in kinds]
        return sum(u.ru_utime + u.ru_stime for u in usages)

    before = used()
    work()
    return used() - before


def write_text(path: pathlib.Path) -> int:
    """Writes the text as JSON lines; returns its size in bytes."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for copy in range(COPIES):
            for document in corpus.documents("all"):
                text = f"{copy}\n{document['text']}"
                size += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
    return size


def measure_store(data: Data, vocab_size: int, megabytes: float) -> None:
    name = getattr(data.tokenizer, "model_type", "bytes")
    coder = loader.tokenizer(data, vocab_size)
    for workers in (1, 2):
        cpu, wall = [], []
        for round_ in range(2):
            store_dir = f"{data.store_dir}/{name}-{workers}-{round_}"
            again = dataclasses.replace(data, store_dir=store_dir, workers=workers)
            start = time.perf_counter()
            cpu.append(cpu_seconds(lambda again=again: loader.stores(again, coder)))
            wall.append(time.perf_counter() - start)
        print(
            f"store    {name:8} {workers} processes: {megabytes / min(cpu):6.1f} MB "
            f"per CPU second, {megabytes / min(wall):6.1f} MB/s"
        )


def measure_loader(data: Data, vocab_size: int) -> None:
    stores = loader.stores(data, loader.tokenizer(data, vocab_size))
    for length, rows in ((256, 64), (2048, 16)):
        for packing in ("windows", "documents"):
            chosen = dataclasses.replace(data, length=length, packing=packing)
            batches = loader.batches(loader.examples(chosen, stores, 0), sizes=rows)
            next(batches)
            steps = 2_000_000 // (length * rows)

            def read(batches=batches, steps=steps) -> None:
                for _ in range(steps):
                    next(batches)

            seconds = min(cpu_seconds(read) for _ in range(ROUNDS))
            speed = steps * rows * length / seconds / 1e6
            print(
                f"loader   {packing:9} length {length:4}, {rows} rows: {speed:5.1f} M "
                "tokens per CPU second"
            )


OBJECTIVES = (
    (batches.Causal(), "text"),
    (batches.Prefix(), "text"),
    (batches.Masked(), "text"),
    (batches.Masked(whole_words=True), "text"),
    (batches.SpanCorruption(), "text"),
    (batches.Seq2Seq(target_length=256, long="cut"), "en+es"),
    (batches.Sft(long="cut"), "en+es"),
    (batches.Classification(labels=("old", "new")), "en+label"),
)


def write_verses(path: pathlib.Path) -> None:
    """Writes the verses of both Bibles; those of the last 27 books are "new"."""
    verses = list(corpus.documents("verses", "lm_bible"))
    books = list(dict.fromkeys(v["id"].split("/")[0] for v in verses))
    with path.open("w", encoding="utf-8") as file:
        for verse in verses:
            new = books.index(verse["id"].split("/")[0]) >= 39
            file.write(json.dumps({**verse, "label": "new" if new else "old"}) + "\n")


def measure_objectives(data: Data, vocab_size: int) -> None:
    """Prints how fast rows of each objective are made, 64 of 256 tokens of text a batch."""
    for objective, fields in OBJECTIVES:
        path = pathlib.Path(data.store_dir) / (
            "text.jsonl" if fields == "text" else "verses.jsonl"
        )
        chosen = dataclasses.replace(
            data, source=(f"jsonl:{path}#{fields}",), length=256, packing="documents"
        )
        size = vocab_size + batches.added(objective)
        coder = batches.tokenizer(objective, chosen, size)
        stores = batches.stores(objective, chosen, coder)
        start = time.process_time()
        made = loader.batches(
            batches.examples(objective, chosen, stores, coder, 0), sizes=64
        )
        batch = next(made)
        began = time.process_time() - start
        rows = [k for k in ("tokens", "inputs") if k in batch]
        tokens = sum(batch[k].size for k in rows)
        real = sum(
            (batch["input_" * (k == "inputs") + "segments"] > 0).sum() for k in rows
        )
        steps = max(1_000_000 // tokens, 20)

        def read(made=made, steps=steps) -> None:
            for _ in range(steps):
                next(made)

        seconds = min(cpu_seconds(read) for _ in range(ROUNDS))
        name = type(objective).__name__
        name += " (words)" if getattr(objective, "whole_words", False) else ""
        print(
            f"batches  {name:16} {steps * tokens / seconds / 1e6:5.1f} M tokens per CPU "
            f"second, {real / tokens:4.0%} of them text, first batch {began:.1f} CPU s"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "text.jsonl"
        size = write_text(path)
        print(f"{os.cpu_count()} cores, {size / 1e6:.1f} MB of text")
        data = Data(source=(f"jsonl:{path}",), store_dir=folder)
        trained = SentencePiece(sample_bytes=2_000_000)
        bpe = dataclasses.replace(trained, model_type="bpe")
        for tokenizer, vocab_size in ((Bytes(), 257), (trained, 4096), (bpe, 4096)):
            chosen = dataclasses.replace(data, tokenizer=tokenizer)
            measure_store(chosen, vocab_size, size / 1e6)
        measure_loader(dataclasses.replace(data, tokenizer=trained), 4096)
        write_verses(pathlib.Path(folder) / "verses.jsonl")
        measure_objectives(dataclasses.replace(data, tokenizer=trained), 4096)


if __name__ == "__main__":
    main()
