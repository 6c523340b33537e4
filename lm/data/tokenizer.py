"""Tokenizers: text to token ids and back, exactly.

`Bytes` and `SentencePiece` are the configs; `ByteTokenizer` and
`SentencePieceTokenizer` do the work. Both give text back exactly: decode(encode(text))
== text, for any text with byte fallback. One special id, `eot` (end of text), begins
every document in a store and is never made from text.
"""

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
from etils import epath
from jaxtyping import Int32

from lm.config import ConfigError

Ids: TypeAlias = Int32[np.ndarray, " n"]

_CHARACTERS = 1 << 16  # encoded at a time: a whole book is up to 5 times slower
_SENTENCE = 4096  # characters of a training sentence, with "\n" inside, to be learned
_THREADS = 16  # of the trainer; sums go by thread, so the number must not vary
_EOT = "<eot>"  # the piece that ends a text in models that are trained here
BEGIN = "tokenizer.begin"  # a file that says how SentencePiece begins a text
_SPACE = "\u2581"  # how SentencePiece spells a space; itself it is spelt by bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """One token a UTF-8 byte: ids 0 to 255, and 256 for end of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """A SentencePiece model, trained on a sample of the text or loaded from a file.

    It keeps the text as it is: no normalization, no dummy prefix, every space kept,
    newlines and runs of spaces inside pieces. BPE trains 15 times faster than unigram
    and encodes 5 times slower; the two need about the same number of tokens.
    """

    model_type: Literal["unigram", "bpe"] = "unigram"
    path: str = ""  # a .model file to load; "" trains one with model.vocab_size pieces
    begin: Literal["eos", "bos"] = "eos"  # the piece of a loaded model before a text
    byte_fallback: bool = True  # spell unknown characters by their UTF-8 bytes
    character_coverage: float = 0.9995  # fraction of characters that are pieces
    sample_bytes: int = 10_000_000  # of text to train on, at most (unigram: 2-3 s/MB)
    seed: int = 0  # chooses the sample

    def __post_init__(self) -> None:
        if not 0 < self.character_coverage <= 1:
            value = self.character_coverage
            raise ConfigError(f"tokenizer.character_coverage={value} is not in (0, 1]")
        if self.sample_bytes < 1:
            raise ConfigError(
                f"tokenizer.sample_bytes={self.sample_bytes} must be at least 1"
            )


class Pieces:
    """What all tokenizers share: the bytes of every token."""

    size: int  # the true vocabulary, before padding
    eot: int  # begins every document
    ends: tuple[int, ...] = ()  # tokens besides it that end a text a model writes
    close: tuple[int, ...] = ()  # stand after a text that is read whole
    mask: int | None = None  # stands for a token that is hidden; None: it has none
    spare = False  # a model may have more tokens than these

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces  # the bytes of every token
        self.token_bytes: Int32[np.ndarray, " vocab"] = np.array(
            [len(p) for p in pieces], np.int32
        )

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text of `ids`, "" for eot; bytes that are no UTF-8 become U+FFFD.

        Ids that a model has beyond the tokenizer's are nothing, too.
        """
        known = (i for i in map(int, ids) if i < len(self.pieces))
        text = b"".join([self.pieces[i] for i in known])
        return text.decode("utf-8", errors="replace")

    def encode(self, text: str) -> Ids:
        raise NotImplementedError

    def prompt(self, text: str) -> Ids:
        """Returns the ids of a text to be continued: a document that has begun."""
        return np.concatenate([np.array([self.eot], np.int32), self.encode(text)])

    def files(self) -> dict[str, bytes]:
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]

    @property
    def fingerprint(self) -> str:
        """sha256 of all that defines the tokenizer."""
        hasher = hashlib.sha256()
        for name, content in sorted(self.files().items()):
            hasher.update(f"{name}:{len(content)}:".encode() + content)
        return hasher.hexdigest()


class ByteTokenizer(Pieces):
    size = 257
    eot = 256

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)] + [b""])

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.bytes": b"1"}


class SentencePieceTokenizer(Pieces):
    """A tokenizer made of the bytes of a SentencePiece `.model` file.

    A model trained elsewhere may normalize text or lack byte fallback; then decoding
    gives back the normalized text, and characters that it does not know are lost.
    """

    def __init__(
        self, model: bytes, source: str = "tokenizer.model", begin: str = "eos"
    ) -> None:
        import sentencepiece  # slow to import, and not needed for bytes

        self.model = model
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(
                model_proto=model
            )
        except RuntimeError as error:
            raise ConfigError(
                f"{source} is not a SentencePiece model ({error})"
            ) from error
        p = self._processor
        self.size = p.get_piece_size()
        marks = [p.eos_id(), p.bos_id()]
        marks = [i for i in (marks if begin == "eos" else marks[::-1]) if i >= 0]
        self.eot = marks[0] if marks else -1
        self.ends = tuple(i for i in (p.eos_id(),) if i >= 0)
        self._begin = begin
        self.spare = p.id_to_piece(max(p.eos_id(), 0)) != _EOT  # trained elsewhere
        if self.eot < 0:
            raise ConfigError(
                f"{source} has no end or begin of sentence piece to separate documents"
            )
        super().__init__([self._spelling(i) for i in range(self.size)])
        # Models trained elsewhere may put a space in front; it is taken off again.
        self._prefixed = self._bytes_of("a").startswith(b" ")

    def _spelling(self, i: int) -> bytes:
        p, piece = self._processor, self._processor.id_to_piece(i)
        if p.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if p.is_control(i) or p.is_unknown(i) or p.is_unused(i):
            return b""
        return piece.replace(_SPACE, " ").encode()

    def _bytes_of(self, text: str) -> bytes:
        return b"".join([self.pieces[i] for i in self._processor.encode(text)])

    def encode(self, text: str) -> Ids:
        if len(text) <= _CHARACTERS and _SPACE not in text:
            return np.array(self._processor.encode(text), np.int32)
        ids: list[int] = []
        for i in range(0, len(text), _CHARACTERS):
            for part in re.split(f"({_SPACE})", text[i : i + _CHARACTERS]):
                ids += self._mark() if part == _SPACE else self._processor.encode(part)
        return np.array(ids, np.int32)

    def _mark(self) -> list[int]:
        ids = self._processor.piece_to_id([f"<0x{b:02X}>" for b in _SPACE.encode()])
        return ids if self._processor.is_byte(ids[0]) else [self._processor.unk_id()]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        text = super().decode(ids)
        return text[1:] if self._prefixed and text.startswith(" ") else text

    def files(self) -> dict[str, bytes]:
        begin = {} if self._begin == "eos" else {BEGIN: self._begin.encode()}
        return {"tokenizer.model": self.model, **begin}


Tokenizer: TypeAlias = Pieces  # one of those here, or of lm/data/pretrained.py


def from_files(files: dict[str, bytes]) -> Tokenizer:
    """Returns the tokenizer whose `files()` these are."""
    if "tokenizer.json" in files:
        from lm.data.pretrained import HuggingFaceTokenizer

        return HuggingFaceTokenizer(files)
    if "tokenizer.model" in files:
        begin = files.get(BEGIN, b"eos").decode()
        return SentencePieceTokenizer(files["tokenizer.model"], begin=begin)
    if "tokenizer.bytes" in files:
        return ByteTokenizer()
    raise ConfigError(f"no tokenizer among the files {sorted(files)}")


def load(config: Any) -> Tokenizer:
    """Returns the tokenizer that needs no training: bytes, or one with files."""
    if isinstance(config, Bytes):
        return ByteTokenizer()
    if not isinstance(config, SentencePiece):
        from lm.data import pretrained

        files = pretrained.read(config.path)
        return pretrained.HuggingFaceTokenizer(files, config.path)
    path = epath.Path(config.path).expanduser()
    try:
        model = path.read_bytes()
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(
            f"tokenizer.path={config.path} can't be read ({why})"
        ) from error
    return SentencePieceTokenizer(model, config.path, config.begin)


def train(
    config: SentencePiece, vocab_size: int, texts: Iterable[str]
) -> SentencePieceTokenizer:
    """Trains a model of `vocab_size` pieces; the same texts give the same model.

    Raises:
        ConfigError: too large or too small a vocabulary, with the size that works, or
            no text.
    """
    import sentencepiece

    sentences = [s for text in texts for s in _sentences(text)]
    if not sentences:
        raise ConfigError("no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=config.byte_fallback,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _SENTENCE,
            shuffle_input_sentence=False,
            num_threads=_THREADS,
            unk_id=0,
            eos_id=1,
            eos_piece=_EOT,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,  # keep its progress off the terminal
        )
    except RuntimeError as error:
        raise ConfigError(_explain(str(error), vocab_size)) from error
    return SentencePieceTokenizer(model.getvalue())


def _sentences(text: str) -> Iterable[str]:
    """Cuts a text into sentences without the characters that the trainer reserves."""
    for part in re.split(f"[\t{_SPACE}\u2585]+", text):
        for i in range(0, len(part), _SENTENCE):
            yield part[i : i + _SENTENCE]


def _explain(message: str, vocab_size: int) -> str:
    """Says in one line which vocabulary works."""
    what = f"model.vocab_size={vocab_size}"
    if found := re.search(r"too high .*value <= (\d+)", message):
        return (
            f"{what} is larger than the text allows; use more text or "
            f"--set model.vocab_size={found[1]} (the largest that works)"
        )
    if found := re.search(r"smaller than required_chars\D+\d+ vs (\d+)", message):
        return (
            f"{what} is too small for the characters of the text; use at least "
            f"--set model.vocab_size={found[1]}, or less "
            "tokenizer.character_coverage"
        )
    return f"{what}: SentencePiece can't train ({' '.join(message.split())})"


def sizes_agree(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a model whose vocabulary is not the tokenizer's."""
    if tokenizer.spare and tokenizer.size <= vocab_size:
        return
    if tokenizer.size != vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} but the tokenizer has {tokenizer.size} "
            f"tokens; use --set model.vocab_size={tokenizer.size}"
        )
