"""The house plan, held: floors, lengths, imports, one table of mesh axes, live links."""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from lm.nn import rope

ROOT = pathlib.Path(__file__).parent.parent
FILE_LINES, FUNCTION_LINES = 400, 60

# A module imports from lower floors and from its own subpackage. A half is a landing: on
# the floor it is named after, but above what lies there.
FLOORS = {
    "lm": 0.0,  # the package itself: a docstring
    "lm.config": 0.0,
    "lm.sharding": 0.5,
    "lm.trees": 0.5,
    "lm.metrics": 0.5,
    "lm.terminal": 0.5,
    "lm.plot": 0.5,
    "lm.stop": 0.5,
    "lm.heap": 0.5,
    "lm.executables": 0.5,
    "lm.hosts": 0.5,
    "lm.lookout": 0.75,
    "lm.data": 1.0,
    "lm.batches": 1.5,
    "lm.scores": 1.0,
    "lm.nn": 1.0,
    "lm.schedules": 1.0,
    "lm.matrices": 1.0,
    "lm.models": 2.0,
    "lm.objectives": 2.5,
    "lm.optim": 2.5,
    "lm.sampling": 2.5,
    "lm.beam": 2.75,
    "lm.experiment": 3.0,
    "lm.program": 3.25,
    "lm.stacked": 3.4,
    "lm.gathering": 3.3,
    "lm.gradients": 3.4,
    "lm.train": 3.5,
    "lm.generate": 3.75,
    "lm.checkpoint": 4.0,
    "lm.evaluate": 4.0,
    "lm.resume": 4.0,
    "lm.plan": 4.0,
    "lm.convert": 4.25,
    "lm.compress": 4.0,
    "lm.log": 4.5,
    "lm.start": 4.5,
    "lm.loop": 5.0,
    "lm.main": 6.0,
    "experiments": 6.0,
}

# Imported where they are used: slow to load, or not needed by every run.
LAZY = {
    *("matplotlib", "orbax", "sentencepiece", "tensorboardX", "tensorflow_datasets"),
    *("rouge_score", "sacrebleu", "snowballstemmer", "stop_words"),  # of extras
    *("gguf", "jinja2", "safetensors", "tokenizers"),  # the extra hf
}
THIRD_PARTY = LAZY | {
    "absl",
    "array_record",
    "etils",
    "flax",
    "grain",
    "importlib_resources",
    "jax",
    "jaxtyping",
    "numpy",
    "optax",
    "rich",
}

MESH_AXES = {"pipe", "data", "fsdp", "seq", "expert", "tensor"}
TAKES_MESH_AXES = {
    *("P", "PartitionSpec", "psum", "pmean", "pmax", "pmin", "psum_scatter"),
    *("all_gather", "all_to_all", "ppermute", "axis_index", "axis_size", "make_mesh"),
}


def _files(*folders: str) -> list[pathlib.Path]:
    found = (p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    return sorted(p.relative_to(ROOT) for p in found)


SOURCES = _files("lm", "experiments")
PYTHON = [*SOURCES, *_files("tests", "benchmarks", "tools")]


def _tree(path: pathlib.Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def _module(path: pathlib.Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").exists()


def _imports(node: ast.AST) -> Iterator[str]:
    """Yields what an import statement brings in, as module names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import; write the module's whole name"
        base = node.module or ""
        for alias in node.names:
            full = f"{base}.{alias.name}"
            yield full if _is_module(full) else base


def _unit(module: str) -> str:
    """Returns the file or subpackage of the plan that a module belongs to."""
    return ".".join(module.split(".")[: 2 if module.startswith("lm.") else 1])


def _on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _on_import(node)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_down_the_floors(path: pathlib.Path) -> None:
    unit = _unit(_module(path))
    assert unit in FLOORS, f"{unit} has no floor: give it one in FLOORS"
    for node in ast.walk(_tree(path)):
        for name in _imports(node):
            if name.split(".")[0] not in ("lm", "experiments"):
                continue
            target = _unit(name)
            assert target == unit or FLOORS[target] < FLOORS[unit], (
                f"{path}:{node.lineno}: {unit} (floor {FLOORS[unit]}) imports {name} "
                f"(floor {FLOORS[target]})"
            )


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_third_party_imports_are_on_the_list(path: pathlib.Path) -> None:
    tree = _tree(path)
    known = THIRD_PARTY | sys.stdlib_module_names | {"lm", "experiments"}
    used = {name.split(".")[0] for node in ast.walk(tree) for name in _imports(node)}
    assert used <= known, f"{path}: {sorted(used - known)} not among the dependencies"
    early = {name.split(".")[0] for n in _on_import(tree) for name in _imports(n)}
    assert not early & LAZY, f"{path}: import {sorted(early & LAZY)} where it is used"


def test_no_slow_import_before_the_first_line_of_main() -> None:
    script = (
        "import sys, lm.main; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # grain itself brings tensorstore and, with it, the package orbax.
    assert not set(done.stdout.split()) & (LAZY - {"orbax"})


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_files_and_functions_are_short(path: pathlib.Path) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES, f"{path} has {lines} lines"
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"


def _mesh_axis_strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields mesh axes named in specs, in collectives and in looks at a mesh's shape."""
    for node in ast.walk(tree):
        inside: list[ast.AST] = []
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            if name in TAKES_MESH_AXES:
                inside = [*node.args, *(k.value for k in node.keywords)]
        elif isinstance(node, ast.Subscript):
            inside = [node.slice] if "mesh.shape" in ast.unparse(node.value) else []
        for constant in (c for part in inside for c in ast.walk(part)):
            if isinstance(constant, ast.Constant) and constant.value in MESH_AXES:
                yield node.lineno, constant.value  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_mesh_axes_are_named_in_one_table_only(path: pathlib.Path) -> None:
    if path == pathlib.Path("lm/sharding.py"):
        return
    found = list(_mesh_axis_strings(_tree(path)))
    assert not found, f"{path}: {found}: name a logical axis, lm/sharding.py maps it"


def test_mesh_axes_are_found_where_they_hide() -> None:
    code = "a = jax.P(None, ('data', 'fsdp')); b = jax.lax.psum(x, 'tensor')"
    assert [axis for _, axis in _mesh_axis_strings(ast.parse(code))] == [
        *("data", "fsdp", "tensor")
    ]
    code = "layout.mesh.shape['pipe'], split['data'], spec('expert'), open('data')"
    assert [axis for _, axis in _mesh_axis_strings(ast.parse(code))] == ["pipe"]


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_every_file_has_a_name_of_its_own_and_a_docstring(path: pathlib.Path) -> None:
    assert not {"utils", "util", "common", "helpers", "misc"} & {*path.parts, path.stem}
    assert ast.get_docstring(_tree(path)) or not (ROOT / path).read_text().strip()


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_nothing_is_left_for_later(path: pathlib.Path) -> None:
    notes = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X"))
    found = re.findall(rf"\b({notes})\b", (ROOT / path).read_text(encoding="utf-8"))
    assert not found, f"{path}: do it, or say in an issue what is missing"


PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: pathlib.Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link and not link.startswith("mailto:"):
            assert (page.parent / link).exists(), f"{page.name}: {link} is missing"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: rope.mscale("many"), BeartypeCallHintViolation),
        (lambda: rope.Linear(factor="many"), BeartypeCallHintViolation),
        (lambda: rope.rope_tables(rope.Rope(), 8, jnp.zeros(3, int)), TypeCheckError),
    ],
    ids=["function", "dataclass", "shape"],
)
def test_types_and_shapes_are_checked_in_all_tests(call, error):
    """By what tests/conftest.py puts on the functions of lm."""
    with pytest.raises(error):
        call()
