"""The type checker that the tests put on every function of `lm`."""

import functools
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

# An int is taken where a float is asked for, as the typing documentation has it.
checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_with_shapes = jaxtyping.jaxtyped


def install() -> None:
    """Has the functions and dataclasses of `lm` checked, from its import on."""
    jaxtyping.install_import_hook("lm", "typecheck.checked")
    jaxtyping.jaxtyped = _jaxtyped  # what the hook puts on each of them


def _jaxtyped(fn: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """Puts jaxtyping's decorator where there are shapes, else the type checker alone.

    jaxtyping binds arguments at each call and checks them twice: of all the time that it takes to
    trace a step or to plan one that was a third.
    """
    if fn is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    if isinstance(fn, type):
        # Only dataclasses are checked, where they are made.
        if "__dataclass_fields__" in vars(fn) and not _shaped(fn.__init__):
            fn.__init__ = checked(fn.__init__)
            return fn
    elif not _shaped(fn):
        hints = fn.__annotations__.values()
        return fn if all(hint is Any for hint in hints) else checked(fn)
    return _with_shapes(fn, typechecker=typechecker)


def _shaped(fn: Callable[..., Any]) -> bool:
    """Whether an annotation holds a shape or a name, which jaxtyping looks up."""
    return any(map(_holds, fn.__annotations__.values()))


def _holds(hint: Any) -> bool:
    named = isinstance(hint, str | typing.ForwardRef)
    if named or str(getattr(hint, "__module__", "")).startswith("jaxtyping"):
        return True
    return any(map(_holds, typing.get_args(hint)))
