"""The small files of a checkpoint, the list of all its files, and the table of arrays."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from lm.config import ConfigError

RUN = "run"  # the folder of the small files
META = "meta.json"
ARRAYS = "arrays.json"
FILES = "FILES"
OWN = frozenset((META, ARRAYS, FILES))
_NOT_LISTED = (FILES, "_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax's, not read
_HASHED_BYTES = 2**20  # larger files outside run/ hold arrays, which have digests


def to_json(data: Any) -> bytes:
    """Returns readable JSON; raises TypeError for what JSON cannot hold."""
    return (json.dumps(data, indent=1) + "\n").encode()


def write_list(run: epath.Path) -> None:
    """Writes FILES, a line a file: SHA-256 (or "-" if large), bytes, path.

    The last line is the SHA-256 of the lines before it.

    Args:
        run: the folder of the small files, which may not have its last name yet, in the
            otherwise complete checkpoint.
    """
    lines = {}
    for path in _walk(run.parent):
        folder, _, rest = str(path.relative_to(run.parent)).partition("/")
        name = f"{RUN if folder == run.name else folder}/{rest}"
        size = path.stat().length
        hashed = size <= _HASHED_BYTES or _in_run(name)
        sha = _sha256(path.read_bytes()) if hashed else "-"
        lines[name] = f"{sha} {size} {name}\n"
    text = "".join(lines[name] for name in sorted(lines))
    end = f"end {_sha256(text.encode())}\n"
    (run / FILES).write_bytes((text + end).encode())


def read_checked(checkpoint: epath.Path, *, everything: bool) -> dict[str, bytes]:
    """Returns {name: content} of the files in run/, checked against run/FILES.

    Args:
        everything: check the files of the arrays too: SHA-256 of the small ones, the
            length of the others.

    Raises:
        ValueError: a file is missing or not as it was written; the text names it.
    """
    text = _read(checkpoint, f"{RUN}/{FILES}").decode(errors="replace")
    body, _, end = text.rpartition("end ")
    if end != f"{_sha256(body.encode())}\n":
        raise ValueError(f"{RUN}/{FILES} is not as it was written")
    contents = {}
    for line in body.splitlines():
        sha, size, name = line.split(" ", 2)
        if not (everything or _in_run(name)):
            continue
        if sha == "-":
            intact = _length(checkpoint, name) == int(size)
        else:
            content = _read(checkpoint, name)
            intact = _sha256(content) == sha
            if _in_run(name):
                contents[name.removeprefix(f"{RUN}/")] = content
        if not intact:
            raise ValueError(f"{name} is not as it was written")
    return contents


def table(
    shapes: Mapping[str, jax.ShapeDtypeStruct], digests: Mapping[str, Any]
) -> bytes:
    """Returns {path: {shape, dtype, digest}} as JSON, an array a line.

    Fetches the digests from the device.
    """
    values = jax.device_get(digests)
    rows = {
        path: {"shape": x.shape, "dtype": x.dtype.name, "digest": int(values[path])}
        for path, x in shapes.items()
    }
    lines = (f"{json.dumps(path)}: {json.dumps(row)}" for path, row in rows.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def require_same_tree(
    target: Mapping[str, Any], saved: Mapping[str, Any], *, partial: bool, where: str
) -> None:
    """Compares the names, shapes and dtypes of a target and of a checkpoint.

    Raises:
        ConfigError: they differ; the line names the first of each kind of difference.
    """
    here = {p: f"{x.dtype.name}{list(x.shape)}" for p, x in target.items()}
    there = {p: f"{x['dtype']}{x['shape']}" for p, x in saved.items()}
    kinds = {
        "": [
            f"{p} is {there[p]} there and {here[p]} here"
            for p in here
            if p in there and there[p] != here[p]
        ],
        "not in it: ": [p for p in here if p not in there],
        "only in it: ": [] if partial else [p for p in there if p not in here],
    }
    parts = [title + some(found) for title, found in kinds.items() if found]
    if parts:
        raise ConfigError(f"checkpoint {where} is of another model: {'; '.join(parts)}")


def some(items: Sequence[Any], most: int = 3) -> str:
    """Returns the first items, joined, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more


def one_line(error: BaseException, most: int = 300) -> str:
    """Returns the text of an error, on one line and not too long."""
    text = " ".join(str(error).split())
    return text[:most] + "…" * (len(text) > most) or type(error).__name__


def _walk(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _walk(path)
        elif path.name not in _NOT_LISTED:
            yield path


def _in_run(name: str) -> bool:
    return name.startswith(f"{RUN}/")


def _read(checkpoint: epath.Path, name: str) -> bytes:
    try:
        return (checkpoint / name).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None


def _length(checkpoint: epath.Path, name: str) -> int:
    try:
        return (checkpoint / name).stat().length
    except FileNotFoundError:
        raise ValueError(f"{name} is missing") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
