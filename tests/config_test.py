"""Overrides are typed and checked together; every config survives JSON; what differs is shown."""

import dataclasses
import json
from typing import Literal

import pytest
import toy

from lm import config, experiment
from lm.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    side: float = 1.0
    color: str = "red"
    thick: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
    radius: float = 2.0
    color: str = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 4
    height: int = 8

    def __post_init__(self):
        if self.width * 2 != self.height:
            raise ConfigError(f"height={self.height} is not twice width={self.width}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    name: str = "x"
    limit: int | None = None
    fraction: float | None = None
    mode: Literal["slow", "fast"] = "slow"
    sizes: tuple[int, ...] = (1, 2)
    words: tuple[str, ...] = ()
    pairs: tuple[tuple[int, float], ...] = ()
    point: tuple[int, str] = (0, "a")
    shape: Square | Circle = Square()
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = (Inner(),)


TYPED = [
    ("count=3", 3),
    ("count=-3", -3),
    ("count=1_000", 1000),
    ("count=1e6", 1_000_000),
    ("rate=3e-4", 3e-4),
    ("rate=2", 2.0),
    ("flag=true", True),
    ("flag=False", False),
    ("name=plain words = and more", "plain words = and more"),
    ("name=3", "3"),
    ("name=true", "true"),
    ("name=", ""),
    ("name=none", "none"),
    ("limit=5", 5),
    ("limit=none", None),
    ("fraction=1", 1.0),
    ("fraction=None", None),
    ("mode=fast", "fast"),
    ("sizes=3", (3,)),
    ("sizes=3,4", (3, 4)),
    ("sizes=(3, 4)", (3, 4)),
    ("sizes=()", ()),
    ("words=a/*.txt", ("a/*.txt",)),
    ("words=one,two", ("one", "two")),
    ("words=text:my books/*.txt,jsonl:b#c", ("text:my books/*.txt", "jsonl:b#c")),
    ("pairs=((1, 2), (3, 4.5))", ((1, 2.0), (3, 4.5))),
    ("point=(3, 'b')", (3, "b")),
    ("point=3,b", (3, "b")),
]


@pytest.mark.parametrize(("text", "value"), TYPED)
def test_a_value_is_read_by_the_type_of_its_field(text, value):
    got = getattr(config.override(Outer(), [text]), text.partition("=")[0])
    assert got == value and type(got) is type(value)
    if isinstance(value, tuple) and value:
        assert type(got[0]) is type(value[0])


MISTYPED = [
    ("count=three", "expected int"),
    ("count=2.5", "expected int"),
    ("count=true", "expected int"),
    ("count=none", "expected int"),
    ("rate=fast", "expected float"),
    ("rate=true", "expected float"),
    ("flag=1", "expected bool"),
    ("flag=yes", "expected bool"),
    ("limit=x", "expected int or none"),
    ("mode=medium", "expected one of 'slow', 'fast'"),
    ("sizes=1,b", "expected tuple[int, ...]"),
    ("point=(1, 'a', 2)", "expected tuple[int, str]"),
    ("shape=Triangle", "expected Square or Circle"),
    ("shape.kind=Triangle", "expected one of Square, Circle"),
    ("inner=4", "expected Inner"),
]


@pytest.mark.parametrize(("text", "reason"), MISTYPED)
def test_a_mistyped_value_is_refused_with_what_was_expected(text, reason):
    with toy.refused(f"--set {text}", reason):
        config.override(Outer(), [text])


UNKNOWN = [
    ("cuont=1", "has no field 'cuont'; did you mean 'count'?"),
    ("inner.widht=1", "inner (Inner) has no field 'widht'; did you mean 'width'?"),
    ("shape.radius=1", "shape (Square) has no field 'radius'"),  # that is the circle's
    ("count.deep=1", "count is 1, which has no fields"),
    ("parts.7.width=1", "'7' is not one of the elements 0..0"),
    ("parts.first.width=1", "'first' is not one of the elements 0..0"),
    ("count", "expected path=value"),
    ("=3", "expected path=value"),
]


@pytest.mark.parametrize(("text", "reason"), UNKNOWN)
def test_an_unknown_path_is_refused_with_the_nearest(text, reason):
    with toy.refused("--set", reason):
        config.override(Outer(), [text])


def test_checks_see_all_overrides_together():
    """Each alone would be refused, in either order; a wrong pair is refused with its values."""
    changes = ["inner.width=5", "inner.height=10"]
    for order in (changes, changes[::-1]):
        assert config.override(Outer(), order).inner == Inner(width=5, height=10)
    with toy.refused("height=8 is not twice width=5"):
        config.override(Outer(), changes[:1])


def test_the_last_override_of_a_path_wins():
    assert config.override(Outer(), ["count=2", "count=3"]).count == 3


def test_no_override_is_the_same_config():
    assert config.override(Outer(), []) == Outer()


def test_a_choice_of_classes_is_made_by_name():
    """Values that were chosen stay where the other class has the field; defaults do not."""
    red = config.override(Outer(), ["shape=Circle", "shape.radius=3"]).shape
    assert red == Circle(radius=3.0, color="blue")
    green = config.override(Outer(), ["shape.color=green", "shape.kind=Circle"]).shape
    assert green == Circle(color="green")
    back = config.override(Outer(shape=Circle(radius=9)), ["shape=Square"]).shape
    assert back == Square()
    assert config.override(Outer(), ["shape.thick=true", "shape=Square"]).shape.thick


def test_elements_of_a_tuple_are_reached_by_number():
    got = config.override(Outer(), ["parts.0.width=1", "parts.0.height=2"])
    assert got.parts == (Inner(width=1, height=2),)
    assert config.override(Outer(), ["sizes.1=7"]).sizes == (1, 7)


def test_differences_name_paths_and_both_values():
    changed = config.override(Outer(), ["count=2", "shape=Circle", "parts.0.width=4"])
    assert config.diff(Outer(), changed) == [
        ("count", 1, 2),
        ("shape.kind", "Square", "Circle"),
        ("shape.side", 1.0, None),
        ("shape.color", "red", "blue"),
        ("shape.thick", False, None),
        ("shape.radius", None, 2.0),
    ]
    assert config.diff(Outer(), Outer()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cuont": 1}, "config: Outer has no field 'cuont'; did you mean 'count'?"),
        ({"count": "1"}, "count: expected int, got str '1'"),
        ({"count": 1.0}, "count: expected int, got float 1.0"),
        (
            {"shape": {"kind": "Triangle"}},
            "shape: expected Square or Circle, got 'Triangle'",
        ),
        (
            {"parts": [{"kind": "Inner", "width": 1.5}]},
            "parts.0.width: expected int, got float",
        ),
        ({"inner": {"kind": "Inner", "width": 1}}, "height=8 is not twice width=1"),
    ],
)
def test_json_is_checked_as_overrides_are(change, reason):
    with toy.refused(reason):
        config.from_json(Outer, {**config.to_json(Outer()), **change})


def test_json_of_an_older_version_takes_defaults_for_new_fields():
    data = config.to_json(Outer(count=7))
    del data["rate"]
    assert config.from_json(Outer, data) == Outer(count=7)


# The experiments that ship.


@pytest.mark.parametrize("name", experiment.names())
def test_an_experiment_survives_json_and_names_itself(name):
    chosen = experiment.load(name)
    text = json.dumps(config.to_json(chosen))
    assert config.from_json(experiment.Experiment, json.loads(text)) == chosen
    assert chosen.name == name and chosen.about


@pytest.mark.parametrize("name", experiment.names())
def test_every_leaf_of_an_experiment_can_be_overridden_by_its_own_value(name):
    """What `flatten` shows can be typed after --set and is understood as the same value."""
    chosen = experiment.load(name)
    sets = [f"{path}={value}" for path, value in config.flatten(chosen).items()]
    assert config.override(chosen, sets) == chosen


PUBLIC = """train.steps train.batch_size train.accumulate train.seed train.log_every eval.every
checkpoint.every data.source data.length model.layers model.dim model.heads model.kv_heads
model.vocab_size optim.learning_rate mesh.pipe mesh.data mesh.fsdp mesh.seq mesh.expert
mesh.tensor"""


def test_names_that_scripts_rely_on():
    assert set(PUBLIC.split()) <= config.flatten(toy.BASE).keys()


def test_overrides_of_an_experiment():
    got = toy.experiment(
        "data.source=text:books/*.txt", "optim.algorithm=Muon", "model.norm=LayerNorm",
        "train.steps=1e3", "mesh.data=-1",
    )  # fmt: skip
    assert got.data.source == ("text:books/*.txt",)
    assert config.kind(type(got.optim.algorithm)) == "Muon"
    assert config.kind(type(got.model.norm)) == "LayerNorm"
    assert (got.train.steps, got.mesh.data) == (1000, -1)
    with toy.refused(
        "--set model.layer: model (Transformer)",
        "no field 'layer'; did you mean 'layers'?",
    ):
        toy.experiment("model.layer=3")
    with toy.refused("train.batch_size=16 is not divisible by train.accumulate=3"):
        toy.experiment("train.accumulate=3")
    with toy.refused(
        "model.vocab_size=300", "byte tokenizer has 257", "set model.vocab_size=257"
    ):
        toy.experiment("model.vocab_size=300")


def test_an_unknown_experiment_suggests_the_nearest():
    with toy.refused("no experiment 'shakespear'; did you mean 'shakespeare'?", "tiny"):
        experiment.load("shakespear")
