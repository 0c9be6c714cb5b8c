"""`dither quantize`: a model goes in, a folder with its few-bit copy and a report comes out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dither.cli.options import (
    BatchSize,
    Count,
    Debug,
    Device,
    EngineOption,
    Json,
    Length,
    Model,
    Quiet,
    RayAddress,
    Samples,
    Seed,
    Workers,
    chosen_device,
)
from dither.cli.terminal import ERROR, Terminal, rank

_WHAT = "What to make"
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="OUT", help="New folder for the result.", show_default=False),
]
Name = Annotated[
    str | None,
    typer.Option("--method", "-m", metavar="NAME", help="See `dither methods` (default: erq).", show_default=False,
                 rich_help_panel=_WHAT),
]  # fmt: skip
Format = Annotated[
    str | None,
    typer.Option(metavar="FORMAT", help="Such as int4, int3:g128 or int8:channel:sym.", show_default=False,
                 rich_help_panel=_WHAT),
]  # fmt: skip
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE.yaml", help="Method and fields from a file; other options win over it.",
                 show_default=False, rich_help_panel=_WHAT),
]  # fmt: skip
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A field of the method; may be repeated.", show_default=False,
                 rich_help_panel=_WHAT),
]  # fmt: skip
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers to keep as they are, such as `'*.mlp.*'`; may be repeated.",
                 show_default=False, rich_help_panel=_WHAT),
]  # fmt: skip
Override = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=FORMAT", help="Another weight format for some layers; may be repeated.",
                 show_default=False, rich_help_panel=_WHAT),
]  # fmt: skip
MaybeCalibration = Annotated[
    str | None,
    typer.Option("--calibration", metavar="PATH",
                 help="What to calibrate on. Pictures: a folder, .npz or .csv; text: .txt or .jsonl; `distilled` makes "
                 "pictures from the model's batch normalizations. Methods such as zeroq need none.",
                 show_default=False),
]  # fmt: skip
Size = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="Size of the whole result, such as 2.5MB, for methods that choose bits (zeroq).",
                 show_default=False, rich_help_panel=_WHAT),
]  # fmt: skip
Prune = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share of channels to remove, for methods that prune (udfc).",
                 show_default=False, rich_help_panel=_WHAT),
]  # fmt: skip
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, how large and how long; write nothing.")
]
Runtime = Annotated[
    str | None,
    typer.Option("--for", metavar="RUNTIME", help="Refuse what would not run there: vllm, sglang, transformers, "
                 "llama.cpp or onnx.", show_default=False),
]  # fmt: skip
AllocationFile = Annotated[
    str | None,
    typer.Option("--allocation", metavar="FILE", help="Each layer's format, as `dither allocate` wrote it.",
                 show_default=False, rich_help_panel=_WHAT),
]  # fmt: skip
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in OUT.")]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Read the model block by block (default: where it would take over half "
                 "of the memory).", show_default=False),
]  # fmt: skip
EvaluationData = Annotated[
    str | None,
    typer.Option("--evaluate", metavar="DATA", help="Compare with the original on these pictures or text.",
                 show_default=False),
]  # fmt: skip


def quantize(
    model: Model,
    calibration: MaybeCalibration = None,
    output: Output = None,
    method: Name = None,
    weights: Format = None,
    activations: Format = None,
    recipe: RecipeFile = None,
    set_: Settings = None,
    skip: Skip = None,
    override: Override = None,
    size: Size = None,
    prune: Prune = None,
    allocation: AllocationFile = None,
    samples: Samples = None,
    length: Length = None,
    evaluate: EvaluationData = None,
    count: Count = None,
    dry_run: DryRun = False,
    runtime: Runtime = None,
    resume: Resume = False,
    stream: Stream = None,
    batch_size: BatchSize = 32,
    workers: Workers = 1,
    engine: EngineOption = "auto",
    ray_address: RayAddress = None,
    json: Json = False,
    device: Device = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and save it.

    OUT then opens with `dither.load`, or with transformers' `from_pretrained` after `import dither`.

    Examples:

        dither quantize vit/ --calibration pictures/ -o vit-w4a4/ --weights int4 --activations int4

        dither quantize vit/ --calibration pictures/ -o out/ -m gptq --weights int3:g64 --skip classifier

        dither quantize vit/ --calibration pictures/ --recipe out/recipe.yaml --dry-run

        dither quantize resnet/ --method zeroq --size 2.5MB -o out/

        dither quantize llama/ --calibration text.txt --weights int4:g64:sym --for vllm --dry-run

        dither quantize llama/ --calibration text.txt -o out/ -m gptq --weights int4:g64 --samples 128 --length 512

        dither quantize llama/ --calibration text.txt -o out/ -m gptq --allocation bits.yaml

        torchrun --nproc-per-node 2 -m dither quantize llama/ --calibration text.txt -o out/ -m gptq
    """
    _check(output, dry_run, method, recipe)
    with Terminal(json=json, quiet=quiet, debug=debug, rank=rank()) as terminal:
        from dither import pipeline

        given = {"weights": weights, "activations": activations, "size": size, "prune": prune}
        chosen = _method(recipe, method or "erq", _fields(given, set_ or [], skip or [], override or []))
        _check_data(chosen, calibration)
        common: dict[str, Any] = {"count": samples, "seed": seed, "length": length, "runtime": runtime}
        common |= {"device": chosen_device(device), "stream": stream, "batch_size": batch_size}
        common["allocation"] = allocation
        if dry_run:  # under torchrun on every rank alike; rank 0 shows it
            _show_plan(terminal, pipeline.plan(model, chosen, calibration, **common), output)
            return
        common |= {"resume": resume, "workers": workers, "engine": engine, "ray_address": ray_address}
        common |= {"evaluation": evaluate, "evaluate_count": count}
        _show_result(terminal, _run(terminal, model, chosen, calibration, output, **common), str(output))


def _check(output: str | None, dry_run: bool, method: str | None, recipe: str | None) -> None:
    """Options that belong together."""
    if output is None and not dry_run:
        raise typer.BadParameter("say where the result goes with -o OUT, or use --dry-run", param_hint="--output")
    if method is not None and recipe is not None:
        raise typer.BadParameter("the recipe names its method; give one of the two", param_hint="--method")


def _run(
    terminal: Terminal, model: str, method: Any, calibration: str | None, output: str | None, **options: Any
) -> Any:
    """The report of a quantization; an interrupted one says how to go on."""
    from dither import pipeline

    try:
        with terminal.progress(method.name) as progress:
            result = pipeline.quantize(model, method, calibration, output=output, progress=progress, **options)
    except KeyboardInterrupt as stop:
        if output is not None and (Path(output) / "unfinished").is_dir():
            stop.add_note(f"finished units are kept in {output!r}: repeat the command with --resume to go on")
        raise
    return result.report.data


def _method(recipe: str | None, name: str, fields: dict[str, Any]) -> Any:
    from dither.errors import InputError
    from dither.methods import METHODS, method_class
    from dither.recipe import parse_method, read_recipe

    if recipe:
        return read_recipe(recipe, fields)
    known = method_class(name.partition("+")[0].strip()).model_fields
    for option in ("size", "prune"):
        if option in fields and option not in known:
            able = ", ".join(one for one, kind in METHODS.items() if option in kind.model_fields)
            near = "; dither allocate --size chooses bits for every method" if option == "size" else ""
            raise InputError(f"--{option} goes with the method {able}, not with {name}{near}")
    return parse_method(name, fields)


def _check_data(method: Any, calibration: str | None) -> None:
    if calibration is None and method.without_data() is None:
        raise typer.BadParameter(f"{method.name} needs data: pictures or text", param_hint="--calibration")


def _fields(given: dict[str, Any], settings: list[str], skip: list[str], overrides: list[str]) -> dict[str, Any]:
    """The method's fields as the command line gives them."""
    from dither.recipe import read_setting

    fields: dict[str, Any] = {key: text for key, text in given.items() if text is not None}
    for text in settings:
        if "=" not in text:
            raise typer.BadParameter(f"expected FIELD=VALUE, got {text!r}", param_hint="--set")
        key, value = read_setting(text)
        fields[key] = value
    if skip:
        fields["skip"] = skip
    for text in overrides:
        pattern, equals, spec = text.rpartition("=")
        if not equals:
            raise typer.BadParameter(f"expected PATTERN=FORMAT, got {text!r}", param_hint="--override")
        fields.setdefault("overrides", {})[pattern] = spec
    return fields


def _show_result(terminal: Terminal, report: dict[str, Any], output: str) -> None:
    from dither.report.table import coverage_reasons, summary_rows

    terminal.show({**report, "output": output})
    rows = [{key: row[key] for key in ("figure", "value", "note")} for row in summary_rows(report)]
    terminal.table([{"": row["figure"], "Result": row["value"], "Note": row["note"]} for row in rows])
    _show_promise(terminal, report)
    terminal.table(coverage_reasons(report), "What became of the parameters", ("Modules", "Parameters"))
    terminal.line(f"saved in {output} (report: {Path(output) / 'report.html'})")


def _show_promise(terminal: Terminal, report: dict[str, Any]) -> None:
    """Whether the bits of an allocation came out as it said; nothing where there was none."""
    promise = report.get("allocation")
    if promise is None:
        return
    kept = "as the allocation promised" if promise["as_promised"] else "not what the allocation promised"
    terminal.line(f"{promise['achieved_bits']:.4f} bits a weight, {kept} ({promise['promised_bits']:.4f})")
    if not promise["same_model"]:
        terminal.line("the allocation was measured on another model")


def _show_plan(terminal: Terminal, plan: dict[str, Any], output: str | None) -> None:
    from dither.report.table import count, ratio, seconds, size

    terminal.show(plan)
    layers = [
        {"Layer": row["name"], "Shape": "×".join(map(str, row["shape"])), "Weights": row["weights"],
         "Stored": size(row["nbytes"])}
        for row in plan["layers"]
    ]  # fmt: skip
    terminal.table(layers, f"What {plan['method']} would do", ("Stored",))
    terminal.table([{"Kept layer": name, "Reason": why} for name, why in plan["kept"].items()])
    total, before = plan["size_bytes"], plan["original_bytes"]
    figures = {
        "Units": count(plan["units"]),
        "Layers": f"{len(layers)} quantized, {len(plan['kept'])} kept",
        "Size": f"{size(before)} → {size(total)}, {ratio(before, total)}",
        "Memory, about": f"{size(plan['memory_bytes'])} beside Python's own" + ", block by block" * plan["streamed"],
        "Disk, at most": size(plan["disk_bytes"]),
        "Time, about": seconds(plan["estimated_time_s"]),
    }
    terminal.table([{"": name, "Plan": text} for name, text in figures.items()])
    terminal.line("nothing was written" + ("" if output is None else f"; without --dry-run it goes to {output}"))
    _show_findings(terminal, plan)


def _show_findings(terminal: Terminal, plan: dict[str, Any]) -> None:
    """What a runtime has against the plan, and the exit code that says so; nothing where none was named."""
    from dither.export.runtimes import Finding

    for finding in plan["findings"]:
        word = "would not run" if finding["fatal"] else "note"
        terminal.line(f"{plan['runtime']}, {word}: {Finding(**finding)}")
    if any(finding["fatal"] for finding in plan["findings"]):
        raise typer.Exit(ERROR)
    if plan["runtime"] is not None:
        terminal.line(f"the result would run in {plan['runtime']}")
