"""What the README says can be done, can be done."""

import dataclasses
import pathlib
import re
import shlex
import typing

import pytest
from absl import flags
from absl.testing import flagsaver

from lm import batches, config, experiment, hosts, loop, main
from lm.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"^```\n(.*?)^```", README, re.M | re.S))
SPANS = re.findall(
    r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
)
COMMANDS = [
    line
    for line in BLOCKS.splitlines()
    if line.startswith("python -m lm.main") and "NAME" not in line
]
PARTS = [p for p in config.to_json(experiment.load("tiny")) if p != "name"]


def parsed(command):
    """Returns the values of the flags of a command line."""
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        rest = flags.FLAGS(shlex.split(command, comments=True)[2:])
        assert len(rest) == 1, rest
        return {name: flags.FLAGS[name].value for name in flags.FLAGS}


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_is_understood(command):
    values = parsed(command)
    assert values["mode"] in main.MODES
    name = values["experiment"] or values["workdir"].rpartition("/")[2]
    imported = {"smollm2": "smollm2_finetune", "minilm": "classify_spam"}
    name = imported.get(name, name)
    config.override(experiment.load(name), values["set"])


@pytest.mark.parametrize(
    "assignment",
    sorted(
        {
            text.removeprefix("--set ").strip('"')
            for text in SPANS
            if re.fullmatch(r"(--set )?[a-z_]+(\.[a-z_0-9]+)+=.+", text)
        }
    ),
)
def test_an_assignment_in_the_text_has_a_field_and_a_type(assignment):
    try:
        config.override(
            experiment.load("shakespeare"), [assignment.replace("=N", "=2")]
        )
    except ConfigError as error:  # a check of other fields may refuse it alone
        assert not str(error).startswith("--set"), error


@pytest.mark.parametrize(
    "path",
    sorted(
        {s for s in SPANS if re.fullmatch(rf"({'|'.join(PARTS)})(\.[a-z_0-9]+)+", s)}
    ),
)
def test_a_path_in_the_text_is_a_field(path):
    leaves = {*config.flatten(experiment.load("shakespeare"))}
    for objective in typing.get_args(batches.Objective):
        leaves |= {f"objective.{field.name}" for field in dataclasses.fields(objective)}
    assert any(leaf == path or leaf.startswith(f"{path}.") for leaf in leaves)


def test_the_make_targets_exist():
    named = set(re.findall(r"^make ([a-z-]+)", BLOCKS, re.M))
    named |= {m[1] for s in SPANS if (m := re.match(r"make ([a-z-]+)", s))}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"train", "test"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.M))


def test_the_files_and_experiments_named_exist():
    files = [
        s for s in SPANS if re.fullmatch(r"(lm|experiments|docs|tests)/\S+\.\w+", s)
    ]
    missing = [f for f in files if "NAME" not in f and not (ROOT / f).exists()]
    assert not missing
    table = README.partition("| experiment | what |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == experiment.names()


def test_the_modes_and_exit_codes_are_those_of_the_program():
    modes = README.partition("| mode | what it does |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", modes, re.M) == list(main.MODES)
    codes = README.partition("| code | meaning |")[2].partition("\n\n")[0]
    assert [int(c) for c in re.findall(r"^\| (\d+)", codes, re.M)] == [
        loop.DONE,
        main.FAILED,
        main.WRONG_USE,
        loop.PREEMPTED,
        hosts.LOST,
    ]
