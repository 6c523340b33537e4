"""Where text comes from: TFDS by name, text files by glob, JSON lines by field.

`find("tfds:lm1b")`, `find("text:books/**/*.txt")` and `find("jsonl:web/*.jsonl#text")`
give a source. A document is one text, or several that belong together (a sentence and its
translation, a text and its label) where several fields are named: `#en+es`.

A source lists its parts: small picklable descriptions of some 4 MB of documents each,
which worker processes read side by side, so that documents come in one order whatever
their number. Paths may be local or remote (`gs://...`).

A fingerprint says whether a source still holds the same documents: up to 64 MB it
hashes the content of the files (the same on any machine), above it their names, sizes
and times of change.
"""

import dataclasses
import glob
import hashlib
import json
import os
import re
import stat as statmode
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from etils import epath

from lm.config import ConfigError, nearest

_PART = 4 << 20  # bytes of text in a part
_HASHED = 64 << 20  # bytes; a source up to this size is known by its content


@runtime_checkable
class Part(Protocol):
    @property
    def size(self) -> int:
        """Bytes of text, about."""
        ...

    def documents(self) -> Iterator[tuple[str, ...]]:
        """Yields the texts of each document, one a field, in order."""
        ...


@runtime_checkable
class Source(Protocol):
    @property
    def spec(self) -> str:
        """What the user wrote."""
        ...

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the texts that a document has."""
        ...

    @property
    def own_splits(self) -> bool:
        """Whether the source comes split; else `Data.holdout` forms "validation"."""
        ...

    def parts(self, split: str) -> Sequence[Part]: ...

    def fingerprint(self, split: str) -> str: ...


def find(spec: str, tfds_dir: str = "") -> Source:
    """Returns the source that `spec` names.

    Args:
        spec: `tfds:NAME[/CONFIG][#FIELD]`, `text:GLOB[#SIZE]` or `jsonl:GLOB#FIELD`. A
            text file is one document, or with a SIZE such as 16k or 1M it is cut into
            documents of about that many bytes, at blank lines. `#FIELD+FIELD` takes
            several fields of each document.
        tfds_dir: where TFDS keeps prepared data sets; "" for its default.

    Raises:
        ConfigError: a spec of another form, a glob without files, a data set that is
            unknown or not prepared.
    """
    kind, _, rest = spec.partition(":")
    if not rest or kind not in ("tfds", "text", "jsonl"):
        raise ConfigError(
            f"data.source={spec!r}: expected tfds:NAME, text:GLOB[#SIZE] or "
            "jsonl:GLOB#FIELD"
        )
    if kind == "text":
        cut = re.search(r"#(\d+)([kM]?)$", rest)
        size = int(cut[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[cut[2]] if cut else 0
        pattern = rest[: cut.start()] if cut else rest
        return TextFiles(spec, _glob(spec, pattern), size)
    name, _, named = rest.partition("#")
    fields = tuple(named.split("+")) if named else ()
    if "" in fields or len(set(fields)) < len(fields):
        raise ConfigError(
            f"data.source={spec}: expected one name or several different ones, as in #en+es"
        )
    if kind == "jsonl":
        return JsonLines(spec, _glob(spec, name), fields or ("text",))
    from lm.data import tfds_source  # which itself needs this module

    return tfds_source.find(spec, name, fields, tfds_dir)


@dataclasses.dataclass(frozen=True)
class File:
    path: str
    size: int  # bytes
    mtime: float  # seconds


def identity(files: Sequence[File], *extra: str) -> str:
    """Returns the fingerprint of files and of whatever else decides what is read."""
    hasher = hashlib.sha256(json.dumps(extra).encode())
    by_content = sum(f.size for f in files) <= _HASHED
    for f in files:
        if by_content:
            hasher.update(f"{f.size}:".encode() + epath.Path(f.path).read_bytes())
        else:
            name = f.path.rpartition("/")[2]
            hasher.update(f"{name}:{f.size}:{f.mtime}:".encode())
    return hasher.hexdigest()


def stat(path: Any) -> File | None:
    """Returns what is known of a file, None for a directory."""
    if "://" in os.fspath(path):
        info = path.stat()
        time = float(info.mtime or 0)
        return None if info.is_directory else File(str(path), info.length, time)
    local = os.stat(
        path
    )  # epath would look up the owner, whom a container may not know
    if statmode.S_ISDIR(local.st_mode):
        return None
    return File(str(path), local.st_size, local.st_mtime)


def _glob(spec: str, pattern: str) -> tuple[File, ...]:
    """Returns the files that match, sorted by path."""
    if "://" in pattern:
        found = _remote_glob(pattern)
    else:
        local = os.path.expanduser(pattern)
        found = [local] if os.path.exists(local) else glob.glob(local, recursive=True)
    files = tuple(f for p in sorted(found, key=str) if (f := stat(p)))
    if not files:
        raise ConfigError(f"data.source={spec}: no file matches {pattern}")
    return files


def _remote_glob(pattern: str) -> list[Any]:
    path = epath.Path(pattern)
    wild = [i for i, part in enumerate(path.parts) if set(part) & set("*?[")]
    if not wild:
        return [path] if path.exists() else []
    if "**" in path.parts:
        raise ConfigError(f"{pattern}: ** is for local paths; write one * a directory")
    root = epath.Path(*path.parts[: wild[0]])
    return list(root.glob("/".join(path.parts[wild[0] :])))


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Text files, a document a file, or cut into documents of about `cut` bytes."""

    spec: str
    files: tuple[File, ...]
    cut: int  # bytes; 0: whole files
    own_splits = False
    fields = ("text",)

    def parts(self, split: str) -> list["TextPart"]:
        del split  # made from the hash of each document
        groups: list[list[File]] = [[]]
        for file in self.files:
            if groups[-1] and sum(f.size for f in groups[-1]) + file.size > _PART:
                groups.append([])
            groups[-1].append(file)
        return [TextPart(tuple(group), self.cut) for group in groups]

    def fingerprint(self, split: str) -> str:
        del split
        return identity(self.files, "text", str(self.cut))


@dataclasses.dataclass(frozen=True)
class TextPart:
    files: tuple[File, ...]
    cut: int

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files)

    def documents(self) -> Iterator[tuple[str]]:
        for file in self.files:
            text = decode(epath.Path(file.path).read_bytes(), file.path)
            for piece in _pieces(text, self.cut) if self.cut else [text]:
                yield (piece,)


def _pieces(text: str, size: int) -> Iterator[str]:
    """Cuts after the first blank line that is `size` characters on, else at line ends."""
    at = 0
    while at < len(text):
        blank = re.compile(r"\r?\n\s*\n").search(text, at + size, at + 2 * size)
        line = text.find("\n", at + size)
        end = blank.end() if blank else line + 1 if line >= 0 else len(text)
        yield text[at:end]
        at = end


def decode(data: bytes, where: str, offset: int = 0) -> str:
    """Returns UTF-8 as text, or says where (byte `offset` on) it is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: not UTF-8 at byte {offset + error.start} "
            f"(0x{data[error.start]:02x}, {error.reason}); convert it with "
            "iconv -t utf-8"
        ) from error


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """Files of one JSON object a line; `fields` hold the texts."""

    spec: str
    files: tuple[File, ...]
    fields: tuple[str, ...]
    own_splits = False

    def parts(self, split: str) -> list["JsonPart"]:
        del split  # made from the hash of each document
        return [
            JsonPart(f.path, start, min(start + _PART, f.size), self.fields)
            for f in self.files
            for start in range(0, f.size, _PART)
        ]

    def fingerprint(self, split: str) -> str:
        del split
        return identity(self.files, "jsonl", *self.fields)


@dataclasses.dataclass(frozen=True)
class JsonPart:
    """The lines that begin in bytes [start, stop) of a file."""

    path: str
    start: int
    stop: int
    fields: tuple[str, ...]

    @property
    def size(self) -> int:
        return self.stop - self.start

    def documents(self) -> Iterator[tuple[str, ...]]:
        with epath.Path(self.path).open("rb") as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # the line that began before this part
            at = file.tell()
            while at < self.stop and (line := file.readline()):
                if line.strip():
                    yield self._texts(line, at)
                at += len(line)

    def _texts(self, line: bytes, at: int) -> tuple[str, ...]:
        try:
            record = json.loads(decode(line, self.path, at))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{self._line(at)}: not JSON ({error.msg} at column {error.colno})"
            ) from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise ConfigError(f"{self._line(at)}: expected a JSON object, got {kind}")
        return tuple(self._text(record, field, at) for field in self.fields)

    def _text(self, record: dict[str, Any], field: str, at: int) -> str:
        if field not in record:
            raise ConfigError(
                f"{self._line(at)}: no field {field!r}"
                f"{nearest(field, record)} (fields: {', '.join(record)}); "
                "name it as in jsonl:GLOB#FIELD"
            )
        text = record[field]
        if type(text) is int and field != self.fields[0]:  # a label
            return str(text)
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ConfigError(f"{self._line(at)}: field {field!r} is {kind}, not text")
        return text

    def _line(self, at: int) -> str:
        """FILE:LINE of the byte `at`, counted only for a complaint."""
        with epath.Path(self.path).open("rb") as file:
            newlines, left = 0, at
            while left and (block := file.read(min(left, _PART))):
                newlines += block.count(b"\n")
                left -= len(block)
        return f"{self.path}:{newlines + 1}"
