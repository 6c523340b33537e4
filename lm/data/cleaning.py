"""Cleaning: what is done to the text of a document before it becomes tokens.

The steps, in this order, each a field of `Cleaning`:

1. line ends: CR LF, CR, NEL, LINE and PARAGRAPH SEPARATOR become LF;
2. control characters (Unicode category Cc) other than tab and LF are dropped,
   byte-order marks too;
3. Unicode normal form C, so that one letter has one spelling;
4. documents without anything but white space are dropped, and so are exact copies of a
   document that came earlier in the same split.

Cleaning twice is cleaning once. Lone surrogates, which no UTF-8 can hold, always become
U+FFFD.
"""

import dataclasses
import hashlib
import re
import unicodedata

_LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Any of them; most documents have none, and to look once is 3 times faster.
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\u2028\u2029\ud800-\udfff]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cleaning:
    line_ends: bool = True  # every kind of line end becomes LF
    control: bool = True  # control characters and byte-order marks are dropped
    nfc: bool = True  # Unicode normal form C
    duplicates: bool = True  # exact copies of a document are dropped and counted

    def clean(self, text: str) -> str:
        """Returns the cleaned text, "" where nothing but white space is left."""
        if _ODD.search(text):
            if self.line_ends:
                text = _LINE_END.sub("\n", text)
            if self.control:
                text = _CONTROL.sub("", text)
            text = _SURROGATE.sub("\ufffd", text)
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return "" if text.isspace() else text


def digest(text: str) -> int:
    """Returns the 64-bit hash by which documents are compared and held out.

    Two different documents among a thousand million share one with a chance of 3 %, and
    then one of them is dropped: nothing to lose sleep over.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def held_out(digest: int, holdout: float) -> bool:
    """Says whether a document is in the fraction `holdout`, "validation"."""
    return digest < holdout * 2.0**64
