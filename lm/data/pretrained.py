"""Tokenizers of Hugging Face: a `tokenizer.json`, and what stands beside it.

The package `tokenizers` encodes; decoding is ours, by the bytes of each token, so that text comes
back exactly and bits per byte count the right bytes. WordPiece (BERT's) keeps no white space and
often no case: of it words come back, and as no token has bytes of the text, there are no bits per
byte.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
from etils import epath

from lm.config import ConfigError
from lm.data.tokenizer import Ids, Pieces

MAIN = "tokenizer.json"
CHAT = "chat_template.jinja"
BESIDE = (  # kept with it, so that an export has them again
    *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *(CHAT, "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
    "spiece.model",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """The tokenizer of a directory that has a `tokenizer.json`."""

    path: str = ""  # the directory, or the file

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(
                "data.tokenizer=HuggingFace needs data.tokenizer.path=DIR with a tokenizer.json"
            )


class HuggingFaceTokenizer(Pieces):
    """A tokenizer made of the files of such a directory.

    `eot` is the token that it puts before a text, or its end-of-sequence token where it puts none;
    special tokens are never made from text.
    """

    spare = True  # models have more rows than it has tokens

    def __init__(self, files: dict[str, bytes], source: str = MAIN) -> None:
        self._files = dict(files)
        self._source = source
        package = _package()
        text = files[MAIN].decode()
        try:
            self._tokenizer: Any = package.Tokenizer.from_str(text)
        except Exception as error:  # it raises no class of its own
            raise ConfigError(f"{source} is no tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        data = json.loads(text)
        super().__init__(_pieces(self._tokenizer, data, source))
        self.size = len(self.pieces)
        lossy = _lossy(data)
        self._prefixed = lossy or self._bytes_of("a").startswith(b" ")
        marks = self._marks()
        self.eot = marks[0]
        self.ends = tuple(sorted(set(marks)))
        self.mask = self._tokenizer.token_to_id(self.special("mask_token") or "\0")
        if lossy:  # 0 is unknown
            self.token_bytes = np.zeros(self.size, np.int32)

    def _json(self, name: str) -> dict[str, Any]:
        return json.loads(self._files.get(name, b"{}"))

    def special(self, name: str) -> str:
        """Returns the text of `bos_token`, `eos_token`, …; "" where there is none."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = self._json(file).get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if value:
                return str(value)
        return ""

    def _marks(self) -> list[int]:
        """Returns the id that begins a text, and those that end one."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        at = whole.index(plain[0])
        first, self.close = whole[:at], tuple(whole[at + len(plain) :])
        ends = self._json("generation_config.json").get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        for name in ("eos_token", "bos_token"):
            found = self._tokenizer.token_to_id(self.special(name) or "\0")
            ends += [] if found is None or (ends and name == "bos_token") else [found]
        if not first and not ends:
            raise ConfigError(
                f"{self._source} has no token that begins or ends a text: name an eos_token in "
                "tokenizer_config.json"
            )
        # Of a text's own end mark first, where several end an answer.
        eos = self._tokenizer.token_to_id(self.special("eos_token") or "\0")
        begin = first[:1] or ([eos] if eos is not None else ends[:1])
        return begin + ends

    def _bytes_of(self, text: str) -> bytes:
        return b"".join(self.pieces[i] for i in self.encode(text))

    def encode(self, text: str) -> Ids:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32)

    def encode_marked(self, text: str) -> Ids:
        """Returns the ids of a text that holds special tokens by their names."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        text = super().decode(ids)
        return text[1:] if self._prefixed and text.startswith(" ") else text

    def files(self) -> dict[str, bytes]:
        return dict(self._files)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "a tokenizer.json needs the package tokenizers: pip install 'lm[hf]' (or tokenizers)"
        ) from error
    return tokenizers


def read(path: str) -> dict[str, bytes]:
    """Returns the files of a tokenizer's directory.

    Raises:
        ConfigError: it has no tokenizer.json.
    """
    directory = epath.Path(path).expanduser()
    if directory.name == MAIN:
        directory = directory.parent
    names = (MAIN, *BESIDE)
    files = {n: (directory / n).read_bytes() for n in names if (directory / n).exists()}
    if MAIN not in files:
        there = directory.exists()
        raise ConfigError(
            f"data.tokenizer.path={path} has no {MAIN}"
            if there or directory.name != "tokenizer"
            else f"data.tokenizer.path={path}: not there; --mode=import --from=DIR "
            f"--workdir={directory.parent} puts it there, with the weights beside it"
        )
    return files


@functools.cache
def _byte_of() -> dict[str, int]:
    """The character by which byte-level tokenizers (GPT-2) spell each byte, inverted."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _pieces(tokenizer: Any, data: dict[str, Any], source: str) -> list[bytes]:
    """Returns the bytes of every token; those of special ones are none."""
    spell = _spelling(data, source)
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    pieces = [b""] * size
    for token, i in vocab.items():
        pieces[i] = spell(token)
    for added in data.get("added_tokens", []):
        text = b"" if added["special"] else added["content"].encode()
        pieces[added["id"]] = text
    return pieces


def _spelling(data: dict[str, Any], source: str) -> Any:
    """Returns the function from a token's name to its bytes."""
    decoder = data.get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", [])]
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        table = _byte_of()
        return lambda token: bytes(table[c] for c in token if c in table)
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return _spell_pieces
    if _lossy(data):
        return functools.partial(_spell_words, decoder.get("prefix", "##"))
    raise ConfigError(
        f"{source}: decoder {decoder.get('type')!r} is not supported; lm knows ByteLevel, "
        "Metaspace, ByteFallback and WordPiece"
    )


def _lossy(data: dict[str, Any]) -> bool:
    """Whether a tokenizer's text does not come back: words without what was between them."""
    return (data.get("decoder") or {}).get("type") == "WordPiece"


def _spell_words(prefix: str, token: str) -> bytes:
    """The text of a piece: what continues no word stands after a space."""
    begins = not token.startswith(prefix)
    return f" {token}".encode() if begins else token.removeprefix(prefix).encode()


def _spell_pieces(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
