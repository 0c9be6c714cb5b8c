"""How commands speak: errors, progress, tables of any width, and help that comes at once."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tests.cli.conftest import Run
from typer.testing import CliRunner

from dither.cli import app, terminal
from dither.cli.layout import layout
from dither.cli.progress import Bar, Sparse
from dither.cli.terminal import Terminal
from dither.errors import DitherError, PathError

COMMANDS = ("demo", "quantize", "evaluate", "compare", "inspect", "methods")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PathError("no\n such  file"), 1, "error: no such file\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (MemoryError(), 1, "error: out of memory; use fewer pictures (--samples, --count) or another --device\n"),
        (KeyError("x"), 70, "error: unexpected KeyError: 'x'; run again with --debug to see where\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_every_exception_becomes_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_give_up_output", lambda: None)
    with pytest.raises(typer.Exit) as exit_, Terminal(json=False, quiet=False, debug=False):
        raise error
    assert exit_.value.exit_code == code
    assert capsys.readouterr() == ("", line)


def test_notes_of_an_error_follow_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = DitherError("it failed")
    error.add_note("what is done is saved")
    with pytest.raises(typer.Exit), Terminal(json=True, quiet=False, debug=False):
        raise error
    assert capsys.readouterr().err == "error: it failed (what is done is saved)\n"


def test_debug_shows_the_traceback(run: Run) -> None:
    done = run("inspect", "nowhere", "--debug")
    assert done.code == 1
    assert "Traceback" in done.err
    assert done.err.endswith("error: model folder 'nowhere' does not exist\n")


def test_json_holds_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(json=True, quiet=False, debug=False) as out:
        out.note("not said")
        out.line("not said")
        out.table([{"a": "not shown"}])
        out.show({"x": [float("nan"), (1.5, float("inf"))]})
    assert "".join(capsys.readouterr().out.split()) == '{"x":[null,[1.5,null]]}'


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8}){0,6}", fullmatch=True),
            st.integers(0, 10**9),
            st.lists(st.text("abcdefgh", min_size=1, max_size=9), min_size=1, max_size=9),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(60, 140),
)
def test_no_table_loses_text_or_is_too_wide(drawn: list[tuple[str, int, list[str]]], width: int) -> None:
    rows = [{"Name": name, "Number": str(number), "Reason": " ".join(words)} for name, number, words in drawn]
    table, caption = layout(rows, width, "", ("Number",), ())
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    everything = text + "\n".join(caption)
    assert all(word in everything for _, number, words in drawn for word in [*words, str(number)])


def test_repeated_formats_get_short_names_explained_below() -> None:
    long, other = "int4:channel:asym:percentile", "int4:channel:asym:percentile:dual"
    rows = [{"Layer": str(n), "Weights": long if n < 3 else other, "Inputs": long} for n in range(6)]
    table, caption = layout(rows, 80, "", (), ())
    assert [str(column.header) for column in table.columns] == ["Layer", "Weights"]
    assert caption == [f"int4.a = {long}", f"int4.b = {other}", f"Inputs: {long}"]


def test_minor_columns_step_back_where_it_is_narrow() -> None:
    rows = [{"Layer": "x" * 30, "Kind": "Linear", "Number": "1"}]
    assert [str(column.header) for column in layout(rows, 24, "", (), ("Kind",))[0].columns] == ["Layer", "Number"]
    assert len(layout(rows, 80, "", (), ("Kind",))[0].columns) == 3


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [0.0], list[str]()
    monkeypatch.setattr("dither.cli.progress.monotonic", lambda: clock[0])
    progress = Sparse(lines.append, "erq")
    for unit in range(40):
        clock[0] += 1
        progress(f"unit {unit}", unit + 1, 40)
    assert lines == ["erq: 15 of 40, unit 14", "erq: 30 of 40, unit 29"]


def test_a_bar_shows_the_unit_and_begins_anew_for_another_phase() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Bar(console, "erq") as bar:
        bar("vit.layers.0", 1, 3)
        bar("evaluating", 10, 100)
        assert [task.total for task in bar.progress.tasks] == [100]
        assert "evaluating" in bar.progress.tasks[0].description


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_and_the_common_options(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    assert f"dither {command}" in result.stdout.split("Examples:")[1]
    assert all(option in result.stdout for option in ("--json", "--device", "--seed", "--quiet", "--debug"))
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("dither ")


def test_help_loads_nothing_heavy_and_comes_at_once() -> None:
    code = (
        "import sys, atexit; from dither.cli import main; sys.argv = ['dither', 'methods', '--help'];"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules))));"
        "main()"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.perf_counter() - started < 5  # measured: 0.4 s on an idle machine


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "code", "said"), [(True, 1, ""), (False, 1, "No space left")])
def test_standard_output_that_fails_is_no_traceback(closed: bool, code: int, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from dither.cli import main; main()", "methods", "--json"]
    if closed:
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)
