"""Checkpoints: saved in the background, published whole or not at all, and checked.

A checkpoint is a directory named by its step:

    DIR/1200/arrays/          the arrays, by Orbax, as nested dicts
    DIR/1200/run/meta.json    what the caller stores: config, data position, …
    DIR/1200/run/arrays.json  path → shape, dtype and digest of every array
    DIR/1200/run/…            files of the caller: the tokenizer
    DIR/1200/run/FILES        length and SHA-256 of every file

Nothing in it depends on the mesh that wrote it, and each process reads only the shards
that its devices hold. Orbax writes into a temporary directory and renames it at the end
(on an object store it writes a commit file last), so a process killed at any moment
leaves nothing half-written that could be taken for a whole checkpoint.

On restore, FILES finds a file that is missing, truncated or (if it is not large) altered,
and the digests find an array that differs in one bit from the one that was saved. The
checkpoint before it is used then.
"""

import contextlib
import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lm import trees
from lm.checkpoint import backend, record
from lm.config import ConfigError

T = TypeVar("T")
FOLDER = "checkpoints"  # in a work directory


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read, told in one line."""


class _Damaged(Exception):
    """This checkpoint is not what was saved; the text names what differs."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a checkpoint holds beside its arrays."""

    step: int
    meta: dict[str, Any]
    files: dict[str, bytes]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Checkpoints:
    """The checkpoints of one directory (local, or a URL such as gs://bucket/run).

    With several processes each makes one, and all call its methods in the same order.

    Args:
        directory: made if it is missing, unless `read_only`.
        keep: how many of the newest checkpoints are kept.
        keep_period: checkpoints at multiples of this step are kept for ever; None: none.
        read_only: nothing is written, made, moved or cleaned up.
        report: takes one line for the user, about a damaged checkpoint for example.

    Raises:
        ConfigError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_period: int | None = None,
        read_only: bool = False,
        report: Callable[[str], None] = _to_stderr,
    ):
        self._directory = epath.Path(directory)
        if "://" not in str(directory):
            self._directory = self._directory.resolve()
        self._keep = keep
        self._keep_period = keep_period
        self._read_only = read_only
        self._report = report
        self._damaged: dict[int, str] = {}
        self._saving: int | None = None  # the step being saved
        self._newest: int | None = None  # of all steps there, once one was saved
        self._manager: Any = None
        if not read_only:
            self._require_writable()
            # In an empty directory Orbax can be imported later; several processes open it
            # together, as each may see the others' probes or not.
            if jax.process_count() > 1 or any(self._directory.iterdir()):
                self._manager = self._open()

    def steps(self) -> list[int]:
        """Returns the steps of the whole checkpoints, less those found damaged."""
        found = backend.steps(self._directory)
        return [step for step in found if step not in self._damaged]

    def latest(self) -> int | None:
        """Returns the newest of `steps`, or None; the same in every process."""
        return _from_first_process(max(self.steps(), default=None))

    def save(
        self,
        step: int,
        arrays: trees.Tree,
        meta: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> None:
        """Starts to save; returns when the arrays are copied to the host.

        They may be donated or changed as soon as this returns. A save still under way
        is waited for first. Checkpoints that were found damaged are first renamed to
        `<step>.damaged`, as they would stand in the way of new ones.

        Args:
            step: the name of the checkpoint. The newest one is not saved again.
            arrays: any tree of jax.Arrays.
            meta: what `json.dumps` takes.
            files: small ones, by their plain names.

        Raises:
            CheckpointError: this save, or the one before, could not be written.
        """
        assert not self._read_only, "read-only checkpoints cannot be saved"
        assert record.OWN.isdisjoint(files), f"files may not be named {record.OWN}"
        self.wait()
        if not self._is_new(step):
            return
        flat = trees.flatten(arrays)
        shapes = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in flat.items()}
        digests = trees.digests(arrays)  # dispatched now, fetched in the background
        if jax.process_count() > 1:  # Orbax's barriers may not cross them
            digests = jax.device_get(digests)
        texts = {record.META: record.to_json({"step": step, **meta}), **files}

        def small_files() -> dict[str, bytes]:
            return {**texts, record.ARRAYS: record.table(shapes, digests)}

        with self._failures(step):
            self._manager = self._manager or self._open()
            backend.start_save(self._manager, step, flat, small_files)
        self._saving = self._newest = step

    def wait(self) -> None:
        """Waits until what `save` started is published.

        Raises:
            CheckpointError: it could not be written; the older ones are as they were.
        """
        if self._saving is not None:
            step, self._saving = self._saving, None
            with self._failures(step):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads of Orbax."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.close()

    def read_run(self, step: int | None = None) -> Run:
        """Returns what lies beside the arrays of `step`, or of the newest whole one.

        Raises:
            CheckpointError: there is no such checkpoint, or none that is whole.
        """
        return self._first_whole(step, lambda step: self._read_run(step)[0])

    def names(self, step: int | None = None) -> list[str]:
        """Returns the names of the arrays of a checkpoint; arguments as of `read_run`."""
        return self._first_whole(step, lambda step: [*self._read_run(step)[1]])

    def restore(
        self, target: trees.Tree, step: int | None = None, *, partial: bool = False
    ) -> tuple[trees.Tree, Run]:
        """Returns the arrays of a checkpoint, built and sharded as `target`, and its Run.

        Every array is checked against the digest taken when it was saved. A checkpoint
        that is damaged is reported, and the one before it used.

        Args:
            target: a tree of jax.ShapeDtypeStructs (or arrays) with shardings; one over
                an abstract mesh is bound to the mesh of `jax.set_mesh`.
            step: use this checkpoint or fail; None: the newest that is whole.
            partial: the checkpoint may hold other arrays too; they are not read.

        Raises:
            ConfigError: the checkpoint holds other names, shapes or dtypes.
            CheckpointError: there is no such checkpoint, or none that is whole.
        """
        flat = {
            p: backend.with_real_sharding(x) for p, x in trees.flatten(target).items()
        }

        def read(step: int) -> tuple[trees.Tree, Run]:
            run, saved = self._read_run(step)
            where = f"{self._directory}/{step}"
            record.require_same_tree(flat, saved, partial=partial, where=where)
            return trees.unflatten(self._read_arrays(step, flat, saved), target), run

        return self._first_whole(step, read)

    def _first_whole(self, step: int | None, read: Callable[[int], T]) -> T:
        """Returns `read` of the newest checkpoint, or of `step`, that is not damaged."""
        untried = (
            self.steps() if step is None else [s for s in self.steps() if s == step]
        )
        damaged: list[int] = []
        while (newest := _from_first_process(max(untried, default=None))) is not None:
            untried = [s for s in untried if s < newest]
            try:
                result = read(newest)
            except _Damaged as error:
                damaged.append(newest)
                self._damaged[newest] = str(error)
                self._report(
                    f"checkpoint {self._directory}/{newest} is damaged: {error}"
                )
                continue
            if damaged:
                self._report(
                    f"using checkpoint {newest} instead of {record.some(damaged)}"
                )
            return result
        if damaged:
            reasons = [f"{s} ({self._damaged[s]})" for s in damaged]
            which = "every checkpoint" if step is None else "the checkpoint asked for"
            raise CheckpointError(
                f"{which} in {self._directory} is damaged: {record.some(reasons)};"
                " nothing was changed there; bring back a copy of the files, or start in"
                " another directory"
            )
        raise CheckpointError(
            f"no checkpoint{'' if step is None else f' {step}'} in {self._directory};"
            f" there are: {record.some(self.steps()) or 'none'}"
        )

    def _read_run(self, step: int) -> tuple[Run, dict[str, Any]]:
        """Returns the run and the table of the arrays, checked against run/FILES."""
        directory, first = self._directory / str(step), jax.process_index() == 0
        texts = _in_every_process(
            lambda: record.read_checked(directory, everything=first)
        )
        meta = json.loads(texts.pop(record.META))
        saved = json.loads(texts.pop(record.ARRAYS))
        return Run(step, meta, texts), saved

    def _read_arrays(
        self,
        step: int,
        flat: Mapping[str, jax.ShapeDtypeStruct],
        saved: Mapping[str, Any],
    ) -> dict[str, jax.Array]:
        """Returns {path: array}, checked against the digests in the table `saved`."""
        directory = self._directory / str(step) / "arrays"
        arrays = _in_every_process(lambda: backend.read_arrays(directory, flat))
        digests = jax.device_get(trees.digests(arrays))
        wrong = [path for path in flat if int(digests[path]) != saved[path]["digest"]]
        if wrong:
            raise _Damaged(f"not the values that were saved: {record.some(wrong)}")
        return arrays

    def _open(self) -> Any:
        return backend.open_manager(self._directory, self._keep, self._keep_period)

    def _require_writable(self) -> None:
        probe = self._directory / f".writable-{jax.process_index()}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except (OSError, ImportError) as error:  # a URL may want a package
            cause = getattr(error, "strerror", None) or record.one_line(error)
            raise ConfigError(
                f"the checkpoint directory {self._directory} cannot be written ({cause});"
                " choose another, or change its permissions"
            ) from None

    def _is_new(self, step: int) -> bool:
        """Is there no such checkpoint yet? Damaged ones are put out of the way."""
        if self._damaged:
            with self._failures(step):
                self._set_damaged_aside()
        if self._newest is None:
            self._newest = max(self.steps(), default=-1)
        if step < self._newest:
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} would not be resumed from, as"
                f" {self._newest} is there; move the newer ones away first"
            )
        return step > self._newest

    def _set_damaged_aside(self) -> None:
        for step in self._damaged:
            source = self._directory / str(step)
            if jax.process_index() == 0 and source.exists():
                name = f"{step}.damaged"
                while (self._directory / name).exists():
                    name += "-again"
                source.rename(self._directory / name)
                self._report(f"the damaged checkpoint {step} is now named {name}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("lm:checkpoint:damaged")
        self._damaged = {}
        if self._manager is not None:  # it knows them still
            self._manager.close()
            self._manager = None

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """Turns what goes wrong in a save into one line, and frees the space it took."""
        try:
            yield
        except Exception as error:
            # The manager keeps the error; the next save makes another.
            self._manager = self._newest = None
            if jax.process_index() == 0:
                for half in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                    half.rmtree(missing_ok=True)
            newest = max(self.steps(), default=None)
            rest = f"; the newest whole one is {newest}" if newest is not None else ""
            cause = record.one_line(error)
            if _is_full(error):
                cause = "no space left on the disk"
                rest += "; free some, or set checkpoint.keep lower, and start again"
            raise CheckpointError(
                f"checkpoint {step} could not be saved in {self._directory}: {cause}{rest}"
            ) from error


def found_at(source: str) -> tuple[Checkpoints, int | None]:
    """Returns the checkpoints of a work directory, of its folder of them, or of one step's folder
    there, to be read; and that step."""
    path = epath.Path(source)
    step = int(path.name) if path.name.isdigit() else None
    folder = path.parent if step is not None else path
    if (folder / FOLDER).exists():
        folder = folder / FOLDER
    return Checkpoints(str(folder), read_only=True), step


def _from_first_process(step: int | None) -> int | None:
    """Returns what process 0 says: on a shared disk others may see it later."""
    if jax.process_count() == 1:
        return step
    value = multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step))
    return None if value < 0 else int(value)


def _in_every_process(read: Callable[[], T]) -> T:
    """Returns read(); if it fails in one process, raises _Damaged in all of them."""
    problem, result = "", None
    try:
        result = read()
    except (MemoryError, jax.errors.JaxRuntimeError):  # not the fault of the files
        raise
    except Exception as error:  # damaged files raise almost anything
        problem = record.one_line(error)
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.bool_(problem))
        if failed.any() and not problem:
            problem = "another process could not read it"
    if problem:
        raise _Damaged(problem)
    return cast("T", result)


def _is_full(error: BaseException | None) -> bool:
    """Was it the disk? TensorStore tells so in its text only."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    texts = ("No space left", "Disk quota", "File too large")
    while error is not None:
        if isinstance(error, OSError) and error.errno in full:
            return True
        if any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False
