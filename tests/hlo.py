"""What a compiled program says between devices, as tests ask for it."""

from typing import Any

from lm.plan import collectives as reader
from lm.plan.collectives import Collective


def collectives(text: str, mesh: Any) -> list[Collective]:
    """Returns the collectives in the text of a compiled program, with the axes they cross."""
    return reader.read(text, mesh)
