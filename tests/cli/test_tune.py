"""`dither tune`: trials that are kept one by one, the best that can be made again, and data that stay apart."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import PROCESSOR, Run, error_line, noise_pictures
from tests.export.conftest import save_language_model

import dither
from dither.engine.local import InProcess
from dither.provenance import model_sha256
from dither.quantune.bench import Bench
from dither.tuning.trial import Outcome

FAST = ("--methods", "rtn,gptq", "--try", "search=minmax", "--try", "granularity=channel,g16", "--try", "samples=2,4",
        "--try", "ends=quantized,kept", "--activations", "int4", "--strategy", "random")  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def compared(folder: Path) -> list[dict[str, Any]]:
    """The trials without what no two runs share."""
    return [{key: value for key, value in one.items() if key != "time_s"} for one in lines(folder)[1:]]


def test_the_best_is_saved_with_a_recipe_that_makes_it_again(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path, tmp_path: Path
) -> None:
    test = noise_pictures(tmp_path / "final", seed=9, count=6)
    done = run("tune", tiny_model, "--calibration", calibration, "--data", pictures, "--test", test, *FAST,
               "--trials", 5, "--json", "-o", "out")  # fmt: skip
    assert done.code == 0, done.err
    assert len(done.data["trials"]) == 5
    kept = [trial for trial in done.data["trials"] if trial["error"] is None]
    best = done.data["best"]
    assert best["figures"]["top1"] == max(trial["figures"]["top1"] for trial in kept)
    assert best["test"]["count"] == 6
    assert {"trials.jsonl", "report.html", "report.json", "best"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    command = best["command"].split()
    assert command[:2] == ["dither", "quantize"]
    again = run(*command[1:], "--quiet")
    assert again.code == 0, again.err
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / "best" / name).read_bytes()
    shown = run("inspect", "out")
    assert shown.code == 0, shown.err


def test_people_get_a_table_and_are_told_that_one_set_was_split(
    run: Run, tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    done = run("tune", tiny_model, "--calibration", pictures, *FAST, "--trials", 3, "-o", "out")
    assert done.code == 0, done.err
    assert "the best of 3 trials" in done.out
    assert "was split: 4 pictures to calibrate on, 6 others that judge trials" in " ".join(done.out.split())
    assert "test it on other data" in " ".join(done.out.split())
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "What each choice did" in page


def test_more_pictures_to_judge_by_than_there_are_are_refused_with_the_reason(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path
) -> None:
    common = ("tune", tiny_model, *FAST, "--trials", 2, "-o", "out")
    line = error_line(run(*common, "--calibration", pictures, "--count", 10))
    assert "judged by 6 pictures of" in line
    assert "the 4 others calibrate; give --data" in line
    line = error_line(run(*common, "--calibration", calibration, "--data", pictures, "--count", 11))
    assert "judged by 10 pictures of" in line
    assert "others" not in line


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_with_the_same_trials(
    tiny_model: Path, calibration: Path, pictures: Path, tmp_path: Path
) -> None:
    code = """
import sys, dither
model, calibration, pictures, output = sys.argv[1:]
dither.tune(model, calibration, output, data=pictures, trials=6, methods=["rtn", "gptq"], strategy="genetic",
            among={"samples": [2, 4]}, progress=lambda what, done, total: print(done, flush=True))
"""
    arguments = [str(tiny_model), str(calibration), str(pictures), str(tmp_path / "killed")]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["1\n", "2\n"]
        os.kill(child.pid, signal.SIGKILL)
    assert 2 <= len(lines(tmp_path / "killed")) - 1 < 6
    with (tmp_path / "killed" / "trials.jsonl").open("a") as file:
        file.write('{"number": 4, "figu')  # as if the kill had come while it wrote
    options: dict[str, Any] = {"data": pictures, "methods": ["rtn", "gptq"], "strategy": "genetic"}
    options["among"] = {"samples": [2, 4]}
    before = compared_first(tmp_path / "killed", 2)
    dither.tune(tiny_model, calibration, tmp_path / "killed", trials=6, resume=True, **options)
    dither.tune(tiny_model, calibration, tmp_path / "whole", trials=6, **options)
    assert compared(tmp_path / "killed") == compared(tmp_path / "whole")
    assert compared(tmp_path / "killed")[:2] == before
    more = dither.tune(tiny_model, calibration, tmp_path / "whole", trials=8, resume=True, **options)
    assert len(more.data["trials"]) == 8
    assert compared(tmp_path / "whole")[:6] == compared(tmp_path / "killed")


def compared_first(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first whole lines of a file whose last one may be torn."""
    found = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()[1 : count + 1]]
    return [{key: value for key, value in one.items() if key != "time_s"} for one in found]


def test_a_trial_that_fails_is_written_down_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, run: Run, tiny_model: Path, calibration: Path, pictures: Path, tmp_path: Path
) -> None:
    whole = Bench.run

    def fragile(self: Bench, task: Any) -> Outcome:
        return Outcome(task.number, error="out of memory") if task.method == "gptq" else whole(self, task)

    monkeypatch.setattr(Bench, "run", fragile)
    done = run("tune", tiny_model, "--calibration", calibration, "--data", pictures, *FAST, "--trials", 6, "--json",
               "-o", "out")  # fmt: skip
    assert done.code == 0, done.err
    assert {row["error"] for row in lines(tmp_path / "out")[1:]} == {None, "out of memory"}
    assert done.data["best"]["configuration"]["method"] == "rtn"
    monkeypatch.setattr(Bench, "run", lambda self, task: Outcome(task.number, error="out of memory"))
    done = run("tune", tiny_model, "--calibration", calibration, "--data", pictures, *FAST, "--trials", 2, "-o", "none")
    assert "all 2 trials failed; the first: out of memory" in error_line(done)


def test_a_method_that_breaks_is_an_error_of_its_trial_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, calibration: Path, pictures: Path
) -> None:
    from dither.data import open_data
    from dither.quantune import bench as module
    from dither.tuning.trial import Task

    bench = Bench(tiny_model, open_data(calibration), open_data(pictures))
    good = bench.run(Task(3, {}, "rtn", {"weights": "int4"}, 2, 0))
    assert (good.number, good.error) == (3, None)
    assert good.figures["kl"] > 0  # type: ignore[operator]
    assert "99" in str(bench.run(Task(4, {}, "rtn", {}, 99, 0)).error)

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr(module, "quantize", broken)
    assert bench.run(Task(5, {}, "rtn", {}, 2, 0)).error == "KeyError: 'x'"


def test_trials_run_elsewhere_give_the_same_search(
    tiny_model: Path, calibration: Path, pictures: Path, tmp_path: Path
) -> None:
    import pickle  # what other processes are sent with

    class Remote(InProcess):
        def map(self, function: Any, tasks: Any) -> Any:
            def sent(x: Any) -> Any:
                return pickle.loads(pickle.dumps(x))

            return iter([sent(sent(function)(sent(task))) for task in tasks])

    class Apart:
        map = Remote().map

    options: dict[str, Any] = {"data": pictures, "methods": ["rtn"], "strategy": "random", "trials": 4, "workers": 2}
    dither.tune(tiny_model, calibration, tmp_path / "remote", run_on=Apart(), **options)
    found = sorted(compared(tmp_path / "remote"), key=lambda one: one["number"])
    dither.tune(tiny_model, calibration, tmp_path / "here", run_on=InProcess(), **options)
    assert found == compared(tmp_path / "here")


def test_a_module_stays_as_it_was_and_the_search_is_known_by_its_weights(
    tiny: Any, calibration: Path, pictures: Path, tmp_path: Path
) -> None:
    network = tiny("ResNetForImageClassification", num_labels=2)
    network.model.config.id2label, network.model.config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    network.model.save_pretrained(tmp_path / "resnet")
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    model = type(network.model).from_pretrained(tmp_path / "resnet").eval()  # its name tells where the processor is
    before = model_sha256(model.state_dict().items())
    made = dither.tune(
        model, calibration, tmp_path / "out", data=pictures, methods=["rtn"], trials=1, strategy="random",
        objective="kl", device="cpu",
    )  # fmt: skip
    assert model_sha256(model.state_dict().items()) == before
    assert made.data["provenance"]["model_sha256"] == before
    assert lines(tmp_path / "out")[0]["fingerprint"]["model"] == before
    saved = json.loads((tmp_path / "out" / "best" / "report.json").read_text())
    assert saved["provenance"]["model_sha256"] == before


def test_limits_are_kept_and_a_limit_that_nothing_keeps_is_an_error(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path
) -> None:
    base = ("tune", tiny_model, "--calibration", calibration, "--data", pictures, *FAST, "--weights", "int2,int8")
    done = run(*base, "--trials", 4, "--objective", "size", "--limit", "kl=1000", "--json", "-o", "out")
    assert done.code == 0, done.err
    sizes = [trial["figures"]["size_bytes"] for trial in done.data["trials"]]
    assert done.data["best"]["figures"]["size_bytes"] == min(sizes)
    done = run(*base, "--trials", 3, "--limit", "kl=0.000000001", "-o", "strict")
    assert "none of 3 trials kept the limits" in error_line(done)
    assert Path("strict/report.html").is_file()
    done = run(*base, "--trials", 3, "--limit", "size=1kB", "-o", "small")
    assert "the smallest takes" in error_line(done)


def test_data_that_overlap_are_refused(run: Run, tiny_model: Path, calibration: Path, pictures: Path) -> None:
    base = ("tune", tiny_model, "--calibration", calibration, *FAST, "-o", "out")
    assert "overlap" in error_line(run(*base, "--data", pictures, "--test", pictures))
    assert "do not overlap" in error_line(run(*base, "--data", pictures, "--test", calibration))
    assert not Path("out").exists()


@pytest.mark.parametrize(("given", "message"), [
    (("--limit", "size"), "such as size=20MB"),
    (("--objective", "speed"), "expected objective to be accuracy"),
    (("--objective", "perplexity"), "give no perplexity, only accuracy, kl, size"),
    (("--strategy", "bayes"), "expected strategy xgboost, random"),
    (("--try", "samples=500"), "from 1 to 8"),
    (("--methods", "gtpq"), "did you mean 'gptq'"),
    (("--from", "nowhere.jsonl", "--strategy", "xgboost"), "nowhere.jsonl"),
    (("--try", "granularity=g7"), "group size 7"),
])  # fmt: skip
def test_bad_input_is_one_line_before_any_trial(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path, given: tuple[str, ...], message: str
) -> None:
    base = ("tune", tiny_model, "--calibration", calibration, "--data", pictures, *FAST, "-o", "out")
    done = run(*base, *given)
    assert message in error_line(done)
    assert not Path("out/trials.jsonl").exists()


def test_a_folder_in_use_or_the_search_of_another_seed_is_refused(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path, tmp_path: Path
) -> None:
    base = ("tune", tiny_model, "--calibration", calibration, "--data", pictures, *FAST, "--trials", 1)
    assert run(*base, "-o", "out").code == 0
    assert "pass --resume" in error_line(run(*base, "-o", "out"))
    assert "another seed" in error_line(run(*base, "-o", "out", "--resume", "--seed", 1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is not empty" in error_line(run(*base, "-o", "mine"))


def test_what_was_learned_on_one_model_begins_the_search_on_another(
    run: Run, tiny_model: Path, calibration: Path, pictures: Path
) -> None:
    pytest.importorskip("xgboost")
    base = ("tune", tiny_model, "--calibration", calibration, "--data", pictures, *FAST[:-2], "--json")
    assert run(*base, "--trials", 6, "-o", "one").code == 0
    done = run(*base, "--trials", 2, "--from", "one/trials.jsonl", "--objective", "kl", "-o", "two")
    assert done.code == 0, done.err
    assert any("began with 6 trials of tiny_vit" in note for note in done.data["notes"])


def test_a_text_is_split_and_its_first_part_makes_the_best_again(run: Run, tmp_path: Path) -> None:
    save_language_model(tmp_path / "llama")
    words = ("the cat", "an inn", "a hat in the tin", "that is an ant", "it is the hat")
    text = "\n".join(" ".join(words[(k * k + n) % 5] for n in range(4)) for k in range(120))
    (tmp_path / "text.txt").write_text(text + "\n")
    few = (
        "--methods",
        "rtn,gptq",
        "--try",
        "search=minmax",
        "--try",
        "scheme=asym,sym",
        "--try",
        "ends=quantized,kept",
    )
    start = ("tune", "llama", "--calibration", "text.txt")
    assert "samples" in error_line(run(*start, "--try", "samples=9999", "-o", "out"))
    done = run(*start, "--strategy", "genetic", *few, "--try", "granularity=g32",  # nothing was left in its folder
               "--try", "samples=2,6", "--length", 16, "--count", 4, "--trials", 3, "--json", "-o", "out")  # fmt: skip
    assert done.code == 0, done.err
    assert done.data["settings"]["objective"] == "perplexity"
    assert done.data["best"]["figures"]["perplexity"] == min(t["figures"]["perplexity"] for t in done.data["trials"])
    assert any("calibration.txt" in note for note in done.data["notes"])
    assert any("all layers are kept" in note for note in done.data["notes"])  # its one block is first and last
    again = run(*done.data["best"]["command"].split()[1:], "--quiet")
    assert again.code == 0, again.err
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/best/model.safetensors").read_bytes()
