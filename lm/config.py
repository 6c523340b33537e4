"""Typed configs: frozen dataclasses, `path=value` overrides, JSON in and out, differences.

A config class is a frozen, keyword-only dataclass whose checks sit in `__post_init__`. A field that
may hold one of several config classes is typed as their union; in JSON and in overrides the class
is named by `kind`.
"""

import ast
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
KIND = "kind"  # names the class of a config where a field allows several


class ConfigError(ValueError):
    """A wrong input of the user, told in one line that names the values and the fix."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the known word closest to `word`, or ""."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def override(config: T, assignments: Sequence[str]) -> T:
    """Returns `config` with every `path=value` applied, checked once, together.

    A path is dotted (`model.layers`), with numbers for elements of a tuple (`eval.sets.0.split`).
    A value is read by the type of its field: `3e-4`, `true`, `none`, `a,b`, `(1, 2)`. Where
    a field allows several classes, `field=ClassName` or `field.kind=ClassName` chooses one;
    what both have keeps its value, unless that was the old class's default.

    Raises:
        ConfigError: a path that does not exist (the nearest is suggested), a value of another type,
            or a combination that a check of the config refuses.
    """
    draft = to_json(config)
    for item in assignments:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {item!r}: expected path=value")
        _assign(draft, type(config), path.strip(), text.strip())
    return from_json(type(config), draft)


def to_json(config: Any) -> Any:
    """Returns nested dicts and lists that `json.dumps` takes and `from_json` reads back."""
    if dataclasses.is_dataclass(config):
        fields = {
            f.name: to_json(getattr(config, f.name)) for f in _fields(type(config))
        }
        return {KIND: kind(type(config)), **fields}
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return config


def from_json(cls: type[T], data: Any, path: str = "") -> T:
    """Returns the config of class `cls` that `to_json` wrote; absent fields take their defaults.

    Raises:
        ConfigError: an unknown or mistyped field, or a combination that is refused.
    """
    return _build(cls, data, path)


def flatten(config: Any) -> dict[str, Any]:
    """Returns {dotted path: value} of every leaf, with `path.kind` where the class is a choice."""
    leaves: dict[str, Any] = {}
    _flatten(config, type(config), "", leaves)
    return leaves


def diff(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Returns (path, old value, new value) of each leaf that differs; None where it is absent."""
    a, b = flatten(old), flatten(new)
    return [(k, a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    return tuple(f for f in dataclasses.fields(cls) if f.init)


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def kind(cls: Any) -> str:
    """Returns the name of a config class; one inside the class it builds has that one's name."""
    return cls.__qualname__.removesuffix(".Config")


def _classes(hint: Any) -> dict[str, Any]:
    """The config classes a field may hold, by the name that `kind` gives them."""
    return {kind(c): c for c in _options(hint) if dataclasses.is_dataclass(c)}


def _flatten(node: Any, hint: Any, path: str, leaves: dict[str, Any]) -> None:
    dot = f"{path}." if path else ""
    if dataclasses.is_dataclass(node):
        if len(_options(hint)) > 1:
            leaves[f"{dot}{KIND}"] = kind(type(node))
        for f in _fields(type(node)):
            _flatten(
                getattr(node, f.name),
                _hints(type(node))[f.name],
                f"{dot}{f.name}",
                leaves,
            )
    elif isinstance(node, tuple) and any(
        dataclasses.is_dataclass(item) for item in node
    ):
        for i, item in enumerate(node):
            _flatten(item, type(item), f"{dot}{i}", leaves)
    else:
        leaves[path] = node


def _assign(draft: dict[str, Any], cls: type, path: str, text: str) -> None:
    """Writes `text`, typed, at `path` of the JSON `draft` of a config of class `cls`."""
    *parents, last = path.split(".")
    node: Any = draft
    hint: Any = cls
    for depth, key in enumerate([*parents, last]):
        here = ".".join([*parents, last][:depth])
        if isinstance(node, list):
            hint, index = _element(node, hint, key, path)
            key_of: Any = index
        elif isinstance(node, dict):
            owner = _classes(hint).get(node[KIND], None) or cls
            if key == KIND:
                key_of, hint = KIND, hint
            elif key not in {f.name for f in _fields(owner)}:
                known = [f.name for f in _fields(owner)]
                raise ConfigError(
                    f"--set {path}: {here or 'the experiment'} ({kind(owner)}) has no field "
                    f"{key!r}{nearest(key, known)} (fields: {', '.join(known)})"
                )
            else:
                key_of, hint = key, _hints(owner)[key]
                node.setdefault(key, _default(owner, key))  # a class just switched to
        else:
            raise ConfigError(f"--set {path}: {here} is {node!r}, which has no fields")
        if depth == len(parents):
            if key_of == KIND:
                _switch(node, hint, text, path)
            elif text in _classes(hint):
                node[key_of] = _keep(node[key_of], _classes(hint)[text], hint)
            else:
                node[key_of] = to_json(_parse(text, hint, f"--set {path}={text}"))
        else:
            node = node[key_of]


def _default(cls: Any, name: str) -> Any:
    """The JSON of a field's default, None where it has none."""
    found = next(f.default for f in _fields(cls) if f.name == name)
    return None if found is dataclasses.MISSING else to_json(found)


def _element(node: list, hint: Any, key: str, path: str) -> tuple[Any, int]:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(
            f"--set {path}: {key!r} is not one of the elements 0..{len(node) - 1}"
        )
    element = [
        a for o in _options(hint) for a in typing.get_args(o) if a is not Ellipsis
    ]
    return element[0], int(key)


def _switch(node: Any, hint: Any, name: str, path: str) -> None:
    if name not in _classes(hint):
        known = ", ".join(_classes(hint))
        raise ConfigError(f"--set {path}={name}: expected one of {known}")
    chosen = _keep(node, _classes(hint)[name], hint)
    node.clear()
    node.update(chosen)


def _keep(old: Any, cls: type, hint: Any) -> dict[str, Any]:
    """The JSON of `cls` with the values of `old`'s fields that it has too and that are not at the
    default of the old class: a default of one class is no choice for another."""
    if not isinstance(old, dict):
        return {KIND: kind(cls)}
    was = _classes(hint)[old[KIND]]
    defaults = {
        f.name: to_json(f.default)
        for f in _fields(was)
        if f.default is not dataclasses.MISSING
    }
    known = {f.name for f in _fields(cls)}
    kept = {
        k: v for k, v in old.items() if k in known and v != defaults.get(k, object())
    }
    return {KIND: kind(cls), **kept}


def _build(hint: Any, data: Any, path: str) -> Any:
    """Turns JSON into a value of type `hint`, checking types and names all the way down."""
    if isinstance(data, dict):
        classes = _classes(hint)
        name = data.get(KIND, next(iter(classes), None))
        if name not in classes:
            raise ConfigError(
                f"{path or 'config'}: expected {_name(hint)}, got {data.get(KIND, 'a dict')!r}"
            )
        cls = classes[name]
        known = {f.name for f in _fields(cls)}
        for key in data.keys() - known - {KIND}:
            raise ConfigError(
                f"{path or 'config'}: {kind(cls)} has no field {key!r}{nearest(key, known)}"
            )
        dot = f"{path}." if path else ""
        values = {
            k: _build(_hints(cls)[k], v, dot + k) for k, v in data.items() if k != KIND
        }
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{path or 'config'}: {error}") from error
    if isinstance(data, (list, tuple)):
        for option in _options(hint):
            if typing.get_origin(option) is tuple:
                hints = _tuple_hints(option, len(data))
                if hints is not None:
                    pairs = zip(hints, data, strict=True)
                    return tuple(
                        _build(h, d, f"{path}.{i}") for i, (h, d) in enumerate(pairs)
                    )
    value = _coerce(data, None, hint)
    if value is _BAD:
        raise ConfigError(
            f"{path}: expected {_name(hint)}, got {type(data).__name__} {data!r}"
        )
    return value


def _parse(text: str, hint: Any, what: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    try:
        value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    value = _coerce(value, text, hint)
    if value is _BAD:
        known = [c for c in _choices(hint) if isinstance(c, str)]
        typed = [t.strip() for t in text.split(",")]
        hints = [nearest(t, known) for t in typed if t not in known]
        raise ConfigError(f"{what}: expected {_name(hint)}{''.join(hints[:1])}")
    return value


def _choices(hint: Any) -> list[Any]:
    """Every value that is named by a hint, or by one inside of it."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return list(args)
    return [c for a in args for c in _choices(a)]


_BAD = object()


def _tuple_hints(hint: Any, length: int) -> list[Any] | None:
    args = typing.get_args(hint)
    if args and args[-1] is Ellipsis:
        return [args[0]] * length
    return list(args) if len(args) == length else None


def _coerce(value: Any, text: str | None, hint: Any) -> Any:
    """Returns `value` as type `hint`, or `_BAD`. `text` is what the user typed, if they did."""
    options = _options(hint)
    if len(options) > 1:
        exact = [o for o in options if isinstance(o, type) and type(value) is o]
        results = (_coerce(value, text, o) for o in [*exact, *options])
        return next((r for r in results if r is not _BAD), _BAD)
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return value if value in choices else text if text in choices else _BAD
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            value = tuple(text.split(",")) if text else (value,)
        hints = _tuple_hints(hint, len(value))
        if hints is None:
            return _BAD
        items = [
            _coerce(_literal(v) if isinstance(v, str) else v, str(v), h)
            for v, h in zip(value, hints, strict=True)
        ]
        return _BAD if any(i is _BAD for i in items) else tuple(items)
    if hint is str:
        return text if text is not None else value if isinstance(value, str) else _BAD
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer() and text is not None:
        return int(value)  # 1e6 steps
    if hint in (None, type(None)):
        return None if value is None else _BAD
    if hint is Any:
        return value
    return value if isinstance(hint, type) and type(value) is hint else _BAD


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if len(_options(hint)) > 1:
        return " or ".join(_name(o) for o in _options(hint))
    if typing.get_origin(hint) is tuple and _choices(hint):
        return f"{_name(typing.get_args(hint)[0])}, or several with commas between"
    if hint in (None, type(None)):
        return "none"
    name = kind(hint) if isinstance(hint, type) else str(hint)
    return name.replace("typing.", "")
