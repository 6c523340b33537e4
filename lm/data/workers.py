"""Tokenizes the parts of a source, in this process or in several that never import JAX.

A worker is a Python of its own that imports this module only: no fork of a process in
which JAX runs threads, no second import of the program's main module. It reads a
pickled `Job`, then parts, from its standard input and answers on its standard output;
it ends when its parent does.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import pickle
import queue
import struct
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from concurrent import futures
from typing import IO, Any

import numpy as np

from lm.data import cleaning, sources, tokenizer

_POOL_BYTES = 8 << 20  # less text than this is tokenized sooner than workers start
_LENGTH = struct.Struct("<Q")  # goes before every message


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of the documents of one part, in order, each text begun by end of text."""

    tokens: np.ndarray  # uint16 or uint32 [tokens]
    lengths: np.ndarray  # int64 [documents, fields], eot included
    bytes: np.ndarray  # int64 [documents], of UTF-8
    digests: np.ndarray  # uint64 [documents]
    empty: int  # documents of which a text is nothing but white space


@dataclasses.dataclass(frozen=True)
class Job:
    """What to do with every part."""

    cleaning: cleaning.Cleaning
    files: dict[str, bytes]  # of the tokenizer
    split: str
    holdout: float | None  # None where the source has splits of its own
    dtype: str

    def documents(self, part: sources.Part) -> Iterator[tuple[list[str], int]]:
        """Yields the cleaned texts, maybe "", and the digest of each document.

        What is held out goes by the first text alone: the answers to one question are in
        the same split.
        """
        for raw in part.documents():
            texts = [self.cleaning.clean(text) for text in raw]
            first = cleaning.digest(texts[0])
            digest = cleaning.digest("\0".join(texts)) if texts[1:] else first
            if all(texts) and self.holdout is not None:
                validation = cleaning.held_out(first, self.holdout)
                if validation != (self.split == "validation"):
                    continue
            yield texts, digest

    def run(self, part: sources.Part, coder: tokenizer.Tokenizer) -> Chunk:
        eot = np.array([coder.eot], self.dtype)
        tokens, lengths, sizes, digests = [np.empty(0, self.dtype)], [], [], []
        empty = 0
        for texts, digest in self.documents(part):
            if not all(texts):
                empty += 1
                continue
            encoded = [coder.encode(text) for text in texts]
            for ids in encoded:
                tokens += [eot, ids.astype(self.dtype)]
            lengths.append([len(ids) + 1 for ids in encoded])
            sizes.append(sum(len(text.encode()) for text in texts))
            digests.append(digest)
        return Chunk(
            np.concatenate(tokens),
            np.array(lengths or np.empty((0, 1)), np.int64),
            np.array(sizes, np.int64),
            np.array(digests, np.uint64),
            empty,
        )


def run(
    job: Job, parts: Sequence[sources.Part], workers: int = 0
) -> Generator[Chunk, None, None]:
    """Yields the chunk of every part, in order, whatever the number of workers.

    Args:
        job: what to do.
        parts: on which parts.
        workers: processes; 0 for one a core. Little text is done in this process.
    """
    workers = min(workers or _cores(), len(parts))
    if workers <= 1 or sum(part.size for part in parts) < _POOL_BYTES:
        coder = tokenizer.from_files(job.files)
        yield from (job.run(part, coder) for part in parts)
        return
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(futures.ThreadPoolExecutor(workers))
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            worker = _Worker(job)
            stack.callback(worker.close)
            idle.put(worker)

        def ask(part: sources.Part) -> Chunk:
            worker = idle.get()
            try:
                return worker.ask(part)
            finally:
                idle.put(worker)

        todo = iter(parts)
        # A few parts ahead of the reader, so that neither side waits and memory stays
        # bounded.
        ahead = collections.deque(
            threads.submit(ask, part) for part in itertools.islice(todo, 2 * workers)
        )
        try:
            while ahead:
                chunk = ahead.popleft().result()
                ahead.extend(
                    threads.submit(ask, part) for part in itertools.islice(todo, 1)
                )
                yield chunk
        finally:
            for future in ahead:
                future.cancel()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    def __init__(self, job: Job) -> None:
        root = str(pathlib.Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from lm.data import workers; workers.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._job: Job | None = job

    def ask(self, part: sources.Part) -> Chunk:
        try:
            if self._job is not None:
                _send(self._to, self._job)
                self._job = None
            _send(self._to, part)
            answer = _receive(self._from)
        except (EOFError, BrokenPipeError) as error:
            code = self._process.wait()
            raise RuntimeError(
                f"a tokenizer process died (exit code {code}) on {part}; if memory ran "
                "out, use fewer with --set data.workers=N"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # a request that was never read
            self._to.close()
        self._from.close()
        self._process.wait()


def serve() -> None:
    """The life of a worker."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    try:
        job: Job = _receive(requests)
        coder = tokenizer.from_files(job.files)
        while True:
            part = _receive(requests)
            try:
                answer: object = job.run(part, coder)
            except Exception as error:  # the parent raises it
                answer = error
            _send(answers, answer)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _send(stream: IO[bytes], message: object) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(_LENGTH.unpack(head)[0]))
