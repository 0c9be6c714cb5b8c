"""Generate with llama.cpp from a GGUF file that `dither export --to gguf` wrote, and compare with dither's own model.

Runs in an environment with llama-cpp-python and numpy; dither is not needed there:

    dither generate OUT --prompt "…" --max-new-tokens 32 --json > dither.json
    dither export OUT --to gguf -o OUT-gguf
    python benchmarks/gguf_llama_cpp.py OUT-gguf/*.gguf --reference dither.json

Printed for each prompt of the JSON: both texts, how many greedy tokens they share from the start, and llama.cpp's
tokens a second. llama.cpp rounds activations to 8 bits, so texts may part where two tokens are nearly as likely.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any


def main() -> None:
    """Read the arguments, then write from every prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", help="the file")
    parser.add_argument("--reference", required=True, help="what `dither generate --json` printed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="a JSON file for the results")
    arguments = parser.parse_args()
    from llama_cpp import Llama

    model = Llama(arguments.gguf, n_ctx=512, n_threads=arguments.threads, verbose=False)
    texts = json.loads(Path(arguments.reference).read_text())["texts"]
    rows = [compare(model, text) for text in texts]
    for row in rows:
        print(f"prompt:    {row['prompt']!r}\ndither:    {row['dither']!r}\nllama.cpp: {row['llama_cpp']!r}")
        print(f"{row['same_tokens']} of {row['tokens']} tokens shared, {row['tokens_per_s']:.1f} tokens a second\n")
    if arguments.output:
        data = {"file": Path(arguments.gguf).name, "size_bytes": Path(arguments.gguf).stat().st_size, "rows": rows}
        Path(arguments.output).write_text(json.dumps(data, indent=1) + "\n")


def compare(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """One prompt: greedy tokens of llama.cpp beside those of dither."""
    prompt = model.tokenize(text["prompt"].encode(), add_bos=False, special=True)
    expected, found = text["tokens"], []
    start = perf_counter()
    for token in model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
        found.append(int(token))
        if len(found) == len(expected):
            break
    seconds = perf_counter() - start
    pairs = list(zip(found, expected, strict=True))
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return {
        "prompt": text["prompt"],
        "dither": text["text"],
        "llama_cpp": model.detokenize(found).decode(errors="replace"),
        "tokens": len(expected),
        "same_tokens": same,
        "tokens_per_s": len(found) / seconds,
    }


if __name__ == "__main__":
    main()
