"""Builds the embedded verse pairs, `lm/data/text/bible.jsonl.xz`, from two Debian packages.

    apt-get download sword-text-kjv=14.3-1 sword-text-sparv=2.60-1
    pip install pysword==0.2.8
    python tools/build_bible.py sword-text-kjv_14.3-1_all.deb sword-text-sparv_2.60-1_all.deb

A line of the file is one verse, a JSON object of `id`, `split`, `en` (King James) and `es`
(Reina-Valera 1909). The result depends on the packages only, whose sha256 is checked.
Another release of liblzma could compress to other bytes; `--check` compares contents, not
compression, and writes nothing.
"""

import argparse
import collections
import lzma
import pathlib
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from typing import Any

import build_corpus

KJV_SHA256 = "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57"
RV_SHA256 = "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf"
MODULES = {"en": "engKJV2006eb", "es": "spaRV1909eb"}
FILE = "bible.jsonl.xz"

# Why these books: PROVENANCE.md, "Splits".
VALIDATION = (
    *("Esther", "Lamentations", "Hosea", "Jonah"),
    *("Galatians", "I Peter", "I John"),
)
TEST = ("Ruth", "Ecclesiastes", "Daniel", "John", "James")

# Chapters whose verses the two number differently from some verse on.
DIVIDED_OTHERWISE = {
    *(("Numbers", 13), ("Numbers", 30), ("Judges", 14), ("I Samuel", 24)),
    *(("I Kings", 22), ("I Chronicles", 21), ("II Chronicles", 33), ("Job", 38)),
    *(("Job", 39), ("Job", 40), ("Hosea", 12), ("Jonah", 2), ("II Corinthians", 13)),
}

_NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
# The letters over the parts of Psalm 119, which the Spanish lacks. Other titles are the
# first lines of psalms and the last of epistles, which it has as text.
_LETTER = re.compile(r"<title\b[^>]*>(?:<[^>]*>|[^\x00-\x7f]|\s)*[A-Z]+\.\s*</title>")
# Added words, to which the Spanish module sets their neighbours without a space.
_GLUED = re.compile(r"(?<=</w>)(?=<transChange)|(?<=</transChange>)(?=<w)")
_TAG = re.compile(r"<[^>]*>")
_RESIDUE = re.compile(r"[<>&¶]|  |\n")


def verse_text(osis: str) -> str:
    """Returns the plain text of a verse."""
    text = _GLUED.sub(" ", _LETTER.sub(" ", _NOTE.sub("", osis)))
    text = _TAG.sub("", text.replace("</title>", " ")).replace("¶", " ")
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if _RESIDUE.search(text):
        raise ValueError(f"markup is left in {text!r}")
    return text


def bible(root: pathlib.Path, module: str) -> Any:
    """Returns the opened module of an unpacked package."""
    from pysword.modules import SwordModules

    modules = SwordModules(str(root / "usr" / "share" / "sword"))
    modules.parse_modules()
    return modules.get_bible_from_module(module)


def pairs(bibles: dict[str, Any], left: collections.Counter) -> Iterator[dict]:
    """Yields the verses that both have, in order, and counts those left out by book."""
    structure = bibles["en"].get_structure().get_books()
    for book in [book for books in structure.values() for book in books]:
        split = "validation" if book.name in VALIDATION else "train"
        split = "test" if book.name in TEST else split
        for chapter in range(1, book.num_chapters + 1):
            verses = book.chapter_lengths[chapter - 1]
            if (book.name, chapter) in DIVIDED_OTHERWISE:
                left[book.name] += verses
                continue
            for verse in range(1, verses + 1):
                texts = {
                    language: verse_text(
                        found.get(
                            books=[book.name.lower()],
                            chapters=[chapter],
                            verses=[verse],
                            clean=False,
                        )
                    )
                    for language, found in bibles.items()
                }
                name = re.sub(r"\W+", "-", book.name.lower())
                if all(texts.values()):
                    where = f"{name}/{chapter:03}/{verse:03}"
                    yield {"id": where, "split": split, **texts}
                else:
                    left[book.name] += 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kjv", type=pathlib.Path, help="sword-text-kjv_14.3-1_all.deb")
    parser.add_argument("rv", type=pathlib.Path, help="sword-text-sparv_2.60-1_all.deb")
    parser.add_argument("--out", type=pathlib.Path, default=build_corpus.TEXT_DIR)
    parser.add_argument("--check", action="store_true", help="compare with --out only")
    args = parser.parse_args(argv)

    left: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for path, sha256 in ((args.kjv, KJV_SHA256), (args.rv, RV_SHA256)):
            deb = build_corpus.checked(path, sha256)
            subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
        bibles = {k: bible(pathlib.Path(folder), m) for k, m in MODULES.items()}
        records = list(pairs(bibles, left))
    print(f"left out: {left.total()} verses, {dict(left)}")
    print(dict(collections.Counter(r["split"] for r in records)))
    plain, path = build_corpus.contents(records), args.out / FILE
    if args.check:
        same = path.exists() and lzma.decompress(path.read_bytes()) == plain
        print(f"{FILE}: {'as built' if same else 'differs'}")
        return 0 if same else 1
    path.write_bytes(build_corpus.packed(plain))
    build_corpus.write_sums(args.out)
    print(
        f"{FILE}: {len(records)} verses, {len(plain)} bytes, {path.stat().st_size} packed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
