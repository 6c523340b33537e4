"""Directories that are built once and then only read: token stores, tokenizers.

`obtain` gives back a complete, verified directory or builds it. A directory counts only
with its manifest, which is written last and names the size and sha256 of every file; it
is built aside, under a lock that the kernel drops with its holder, and moved into place
by one rename. So a build that was killed is never used, its remains go when the next
build holds the lock, and two processes that want the same directory build it once.
Below a remote root (`gs://...`) the same directory is uploaded, manifest last, and
every machine keeps a verified local copy.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from etils import epath

from lm.config import ConfigError

MANIFEST = "manifest.json"
_VERIFY = 1 << 30  # bytes; up to this size checksums are compared at every opening
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Damaged(Exception):
    """A directory whose files are not what its manifest says."""


def cache_dir(root: str = "") -> str:
    """Returns `root`, or the default for "": $LM_CACHE or ~/.cache/lm."""
    return os.path.expanduser(root or os.environ.get("LM_CACHE") or "~/.cache/lm")


def obtain(
    root: str, name: str, build: Callable[[pathlib.Path], dict[str, Any]]
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Returns the local directory `name` of `root` and its facts; builds it if need be.

    Args:
        root: a directory, local or remote, "" for the default one.
        name: names the content: the same name must mean the same bytes.
        build: writes files into an empty directory and returns facts for the manifest.

    Raises:
        ConfigError: a root that can't be written, or a disk that is full.
    """
    root = cache_dir(root)
    remote = epath.Path(root) / name if "://" in root else None
    local = pathlib.Path(root)
    if remote is not None:
        local = pathlib.Path(cache_dir()) / "remote" / _digest(root)[:16]
    final = local / name
    facts = _sound(final)
    if facts is None:
        with _locked(local, name):
            facts = _sound(final)  # somebody may have built it while we waited
            if facts is None and remote is not None and (remote / MANIFEST).exists():
                facts = _fill(final, lambda scratch: _download(remote, scratch))
            if facts is None:
                facts = _fill(
                    final, lambda scratch: write_manifest(scratch, build(scratch))
                )
            if remote is not None and not (remote / MANIFEST).exists():
                _upload(final, remote)
    return final, facts


def read(directory: pathlib.Path, *, verify: bool | None = None) -> dict[str, Any]:
    """Returns the facts of a directory after checking its files against the manifest.

    Args:
        directory: what `obtain` gave back.
        verify: compare checksums; None does so up to 1 GiB and compares only sizes
            above.

    Raises:
        FileNotFoundError: no directory, or one without a manifest.
        Damaged: naming the file that is missing, has another size, or another checksum.
    """
    text = (directory / MANIFEST).read_text("utf-8")
    try:
        manifest = json.loads(text)
        files, facts = manifest["files"], manifest["facts"]
        if manifest["sha256"] != _digest([files, facts]):
            raise Damaged(f"{directory / MANIFEST}: its checksum differs")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{directory / MANIFEST}: not a manifest ({error})") from error
    if verify is None:
        verify = sum(f["size"] for f in files.values()) <= _VERIFY
    for name, expected in files.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else None
        if size != expected["size"]:
            raise Damaged(f"{path}: {size} bytes instead of {expected['size']}")
        if verify and sha256(path) != expected["sha256"]:
            raise Damaged(f"{path}: its checksum differs")
    return facts


def write_manifest(directory: pathlib.Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Makes the files of a directory durable, then makes it count by a manifest."""
    files = {}
    for path in sorted(directory.iterdir()):
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"files": files, "facts": facts, "sha256": _digest([files, facts])}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    _sync(directory / MANIFEST)
    _sync(directory)
    return facts


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sound(directory: pathlib.Path) -> dict[str, Any] | None:
    """The facts of a directory that may be used, None where it must be built."""
    try:
        return read(directory)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None  # told when it comes to writing
    except Damaged as damage:
        logging.warning("damaged, building it again: %s", damage)
        return None


def _fill(
    final: pathlib.Path, write: Callable[[pathlib.Path], dict[str, Any]]
) -> dict[str, Any]:
    """Writes a directory aside and moves it to `final`; the caller holds the lock."""
    scratch = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of a build that was killed
    try:
        scratch.mkdir()
        facts = write(scratch)
        shutil.rmtree(final, ignore_errors=True)  # damaged, or without a manifest
        scratch.rename(final)
        _sync(final.parent)
        return facts
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ConfigError(
            f"disk full while writing {final} ({error.strerror}): free some space or "
            "--set data.store_dir=DIR on another disk"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: pathlib.Path, name: str) -> Iterator[None]:
    """Holds the lock of one name; the kernel releases it when its holder dies."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / f".{name}.lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"{directory} is not writable ({error.strerror}); "
            "--set data.store_dir=DIR to one that is"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("waiting for another process that builds %s", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                f"{directory} has no file locks ({error.strerror}); "
                "--set data.store_dir=DIR on a disk of this machine"
            ) from error
        yield


def _download(remote: Any, scratch: pathlib.Path) -> dict[str, Any]:
    for path in remote.iterdir():
        path.copy(scratch / path.name, overwrite=True)
    try:
        return read(scratch, verify=True)
    except (Damaged, FileNotFoundError) as damage:
        raise ConfigError(
            f"{remote} is damaged ({damage}); delete it and it is built again"
        ) from damage


def _upload(local: pathlib.Path, remote: Any) -> None:
    """Copies a directory, manifest last; whoever else does writes the same bytes."""
    remote.mkdir(parents=True, exist_ok=True)
    names = sorted(p.name for p in local.iterdir() if p.name != MANIFEST)
    for name in [*names, MANIFEST]:
        epath.Path(local / name).copy(remote / name, overwrite=True)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
