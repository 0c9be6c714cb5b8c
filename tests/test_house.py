"""The house rules that a program can check: which room may import which, and what no file may do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "dither"
FILES = sorted(SRC.rglob("*.py"))
NAMES = [path.relative_to(SRC).as_posix() for path in FILES]

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70

# The rooms of pure functions on tensors: no model in sight.
TENSOR_ROOMS = ("formats", "statistics", "solvers", "transforms", "allocation", "tuning")
MODEL_ROOMS = ("models", "walk", "methods", "cli", "pipeline", "export", "nn", "report", "engine", "quantune")
FORBIDDEN_IN_TENSOR_ROOMS = (*(f"dither.{room}" for room in MODEL_ROOMS), "transformers", "timm")
FORBIDDEN_IN_METHODS = ("dither.export", "dither.cli", "transformers")
METHOD_PARTS = ("__init__", "base")  # the registry and the base class; every other file of methods/ is a method

FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "marshal", "shelve")
FORBIDDEN_CALLS = ("torch.load", "torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all")
FORBIDDEN_CALLS += ("torch.set_default_dtype", "torch.set_default_device", "random.seed", "np.random.seed")
FORBIDDEN_CALLS += ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every imported name in full (`from a import b` gives `a.b`), wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", node.lineno) for alias in node.names)


def under(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def calls(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every called name as it is written, such as `torch.load` or `.cuda` for a method of an expression."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node.lineno


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def wrong_imports(name: str, tree: ast.Module) -> list[str]:
    """What the file `name` (its path below src/dither) imports against the arrows between the rooms."""
    room, stem = name.split("/", maxsplit=1)[0].removesuffix(".py"), name.removesuffix(".py").split("/")[-1]
    found = []
    for imported, line in imports(tree):
        wrong = imported.startswith(".")  # imports are absolute
        if room in TENSOR_ROOMS:
            wrong |= under(imported, FORBIDDEN_IN_TENSOR_ROOMS)
        if room == "statistics":
            wrong |= under(imported, ("dither",)) and not under(
                imported, ("dither.statistics", "dither.formats", "dither.errors")
            )
        if room == "formats":
            wrong |= under(imported, ("dither",)) and not under(imported, ("dither.formats", "dither.errors"))
        if room == "methods":
            wrong |= under(imported, FORBIDDEN_IN_METHODS)
            wrong |= (
                stem not in METHOD_PARTS
                and under(imported, ("dither.methods",))
                and not under(imported, ("dither.methods.base",))
            )
        if wrong:
            found.append(f"{name}:{line} imports {imported}")
    return found


def wrong_deeds(name: str, tree: ast.Module) -> list[str]:
    """What the file `name` does that no file may do."""
    found = [f"{name}:{node.lineno} asserts" for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    found += [
        f"{name}:{line} imports {imported}" for imported, line in imports(tree) if under(imported, FORBIDDEN_MODULES)
    ]
    found += [
        f"{name}:{line} imports {imported}"
        for imported, line in imports(tree)
        if imported.endswith(".*") or imported == "__future__.annotations"
    ]
    for called, line in calls(tree):
        prints = called == "print" and not name.startswith("cli/")
        if prints or called in FORBIDDEN_CALLS or called.endswith(".cuda"):
            found.append(f"{name}:{line} calls {called}")
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_follow_the_arrows_between_the_rooms(path: Path) -> None:
    assert wrong_imports(path.relative_to(SRC).as_posix(), parsed(path)) == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_file_asserts_prints_unpickles_evaluates_or_touches_global_state(path: Path) -> None:
    assert wrong_deeds(path.relative_to(SRC).as_posix(), parsed(path)) == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_are_short_and_begin_with_what_they_are_for(path: Path) -> None:
    tree = parsed(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    assert [f"{name}: {length} lines" for name, length in functions(tree) if length > MAX_FUNCTION_LINES] == []
    assert not tree.body or ast.get_docstring(tree)


def test_every_method_names_its_source() -> None:
    files = [path for path in (SRC / "methods").glob("*.py") if path.stem not in METHOD_PARTS]
    assert [path.name for path in files if "Source:" not in (ast.get_docstring(parsed(path)) or "")] == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("formats/spec.py", "from dither.statistics.gram import Gram"),
        ("statistics/gram.py", "from dither.solvers.ridge import ridge"),
        ("solvers/ridge.py", "from dither import nn"),
        ("solvers/ridge.py", "def f():\n    import transformers.models"),
        ("allocation/knapsack.py", "import dither.walk"),
        ("methods/erq.py", "from dither.methods.gptq import step"),
        ("methods/erq.py", "from dither.methods import gptq"),
        ("methods/base.py", "from dither import cli"),
        ("walk.py", "from .models import read"),
    ],
)
def test_an_import_against_the_arrows_is_found(name: str, code: str) -> None:
    assert len(wrong_imports(name, ast.parse(code))) == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("statistics/gram.py", "from dither.formats.spec import QuantSpec"),
        ("formats/spec.py", "from dither.errors import SpecError"),
        ("methods/erq.py", "from dither.methods.base import Method"),
        ("methods/__init__.py", "from dither.methods.erq import ERQ"),
        ("walk.py", "from dither.models.read import blocks"),
        ("solvers/ridge.py", "import dithering"),
    ],
)
def test_an_import_along_the_arrows_is_fine(name: str, code: str) -> None:
    assert wrong_imports(name, ast.parse(code)) == []


@pytest.mark.parametrize(
    "code",
    [
        "assert x",
        "print(x)",
        "import pickle",
        "from pickle import loads",
        "torch.load(x)",
        "eval('1')",
        "exec('1')",
        "yaml.load(x)",
        "torch.manual_seed(0)",
        "x.cuda()",
        "model(x).cuda()",
        "from torch import *",
    ],
)
def test_a_forbidden_deed_is_found(code: str) -> None:
    assert len(wrong_deeds("nn/linear.py", ast.parse(code))) == 1


def test_the_command_line_may_print_and_a_model_may_be_put_in_evaluation_mode() -> None:
    assert wrong_deeds("cli/terminal.py", ast.parse("print(x)")) == []
    assert wrong_deeds("walk.py", ast.parse("model.eval()\ntorch.Generator().manual_seed(0)\nyaml.safe_load(x)")) == []
