"""`dither generate`: text before and after quantization, side by side."""

from typing import Annotated, Any

import typer

from dither.cli.evaluate import source_of
from dither.cli.options import Debug, Device, Json, Quiet, chosen_device
from dither.cli.terminal import Terminal

Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder of a language model.", show_default=False)]
Prompt = Annotated[list[str], typer.Option(help="What the text begins with; may be repeated.", show_default=False)]
Reference = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model to compare with (default: what OUT was made from).",
                 show_default=False),
]  # fmt: skip
NewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")]
TopK = Annotated[
    int | None, typer.Option(min=1, metavar="K", help="Draw among the K likeliest (default: all).", show_default=False)
]
DrawSeed = Annotated[int, typer.Option("--seed", min=0, help="Decides what is drawn; both models get the same noise.")]


def generate(
    out: Out,
    prompt: Prompt,
    reference: Reference = None,
    max_new_tokens: NewTokens = 50,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    seed: DrawSeed = 0,
    json: Json = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Let a language model go on from a prompt, beside the model it was made from.

    Examples:

        dither generate llama-int4/ --prompt "The capital of France is"

        dither generate llama-int4/ --reference llama/ --prompt "Once upon a time" --temperature 0.8 --top-k 50
    """
    with Terminal(json=json, quiet=quiet, debug=debug) as terminal:
        from dither.evaluation.generation import Sampling, common_start

        sampling = Sampling(max_new_tokens, temperature, top_k, seed)
        place, against = chosen_device(device), reference or source_of(out)
        with terminal.progress("generating") as progress:
            texts = _texts(out, prompt, sampling, place, against, progress)
            before = [] if against is None else _texts(against, prompt, sampling, place, None, progress)
        for text, original in zip(texts, before, strict=False):
            text["original"] = original
            text["same_tokens"] = common_start(text["tokens"], original["tokens"])
        terminal.show({"schema": 1, "kind": "generate", "model": out, "reference": against, "texts": texts})
        for text in texts:
            _show(terminal, text)


def _texts(
    folder: str, prompts: list[str], sampling: Any, device: str | None, fallback: str | None, progress: Any
) -> list[dict[str, Any]]:
    """What the model of a folder writes; `fallback` is a folder whose tokenizer serves where it has none."""
    from pathlib import Path

    from dither.evaluation.generation import encode, generate, stops
    from dither.models.network import load_tokenizer, open_network
    from dither.nn.linear import cache_weights

    network = open_network(folder, device or "cpu")
    cache_weights(network.model)
    if network.tokenizer is None and fallback is not None:
        network.tokenizer = load_tokenizer(Path(fallback))
    found = []
    for number, prompt in enumerate(prompts):
        made = generate(network.model, encode(network, prompt, sampling.max_new_tokens), sampling, stops(network))
        written = network.tokenizer.decode(list(made.tokens), skip_special_tokens=True)  # type: ignore[union-attr]
        found.append(
            {"prompt": prompt, "text": written, "tokens": list(made.tokens), "tokens_per_s": made.tokens_per_s}
        )
        progress(network.name, number + 1, len(prompts))
    return found


def _show(terminal: Terminal, text: dict[str, Any]) -> None:
    row = {"Prompt": text["prompt"]}
    if "original" in text:
        row |= {"Original": text["original"]["text"]}
    terminal.table([row | {"Quantized" if "original" in text else "Text": text["text"]}])
    speed = f"{text['tokens_per_s']:.1f} tokens a second"
    if "original" not in text:
        terminal.line(speed)
        return
    longest = max(len(text["tokens"]), len(text["original"]["tokens"]))
    same = "the same text" if text["same_tokens"] == longest else f"the first {text['same_tokens']} tokens are the same"
    terminal.line(f"{same}; {text['original']['tokens_per_s']:.1f} → {speed}")
