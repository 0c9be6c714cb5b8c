"""`dither study generation`: a page, tables, and what is refused."""

from pathlib import Path

from tests.cli.conftest import Run, error_line
from tests.export.conftest import save_language_model


def test_the_command_writes_a_page_and_tables(run: Run, tmp_path: Path) -> None:
    llama = save_language_model(tmp_path / "llama")
    options = ("--formats", "fp4:g32", "--temperatures", "0,1", "--max-new-tokens", "4", "--top-k", "5", "--seeds", 1)
    Path("prompts.txt").write_text("the cat\nan inn\n")
    done = run("study", "generation", llama, *options, "--prompts", "prompts.txt", "-o", "study")
    assert done.code == 0, done.err
    assert "Tokens a second" in done.out
    page = Path("study/report.html").read_text()
    assert "Study of generated text" in page
    assert "Against temperature" in page
    assert "the cat" in page
    assert "src=" not in page
    line = error_line(run("study", "generation", llama, "--temperatures", "warm"))
    assert "expected numbers with commas between them, got 'warm'" in line
    assert "'nothing.txt' does not exist" in error_line(run("study", "generation", llama, "--prompts", "nothing.txt"))
