"""Shows how our kernels change the numbers of a whole model: `python -m tools.kernel_quality MODEL.gguf --text FILE`.

The first table compares perplexity and log probabilities of a text with kernels on and with llama.cpp's own (off). What
rounding alone does is shown by llama.cpp with attention computed in another way (flash attention off).

The second table, for each of `--types`, has the squared error of the logits over their square: against the same weights
in F32, with kernels on and off. The model's weights are quantized again to each type.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pypop_gguf import PopError, PopLlama, library
from pypop_gguf.quality.score import log_softmax
from pypop_gguf.terminal import aligned, available_cores, check_ranges
from tools.reporting import one_line_errors

ON, OFF = dict(pop_kernels=True), dict(pop_kernels=False)
REFERENCE = dict(pop_kernels=False, flash_attn=False)
_ROWS = 16


def read_text(path: Path) -> str:
    """Returns the text of a file. A JSON file is a list of texts."""
    text = path.read_text(encoding="utf-8")
    return "\n\n".join(json.loads(text)) if path.suffix == ".json" else text


def logits_of(model: Path, chunks: list[list[int]], options: dict) -> Iterator[np.ndarray]:
    """Yields the logits of each chunk, F32 [tokens - 1, n_vocab]. Row i predicts token i + 1."""
    llm = _open(model, len(chunks[0]), **options)
    for chunk in chunks:
        yield llm.score(chunk[:1], chunk[1:])
    llm.close()


def _open(model: Path, n_ctx: int, **options) -> PopLlama:
    threads = available_cores()
    return PopLlama(
        str(model),
        pop=False,
        n_ctx=n_ctx,
        n_batch=n_ctx,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
        **options,
    )


def tokenize(model: Path, text: str, n_tokens: int, n_context: int) -> list[list[int]]:
    """Returns the first tokens of a text, in chunks of `n_context` tokens.

    Raises:
        PopError: The text is too short.
    """
    llm = PopLlama(str(model), vocab_only=True, verbose=False)
    tokens = llm.tokenize(text.encode()[: 16 * n_tokens])
    llm.close()
    n_chunks = n_tokens // n_context
    if n_chunks < 1 or len(tokens) < n_chunks * n_context:
        raise PopError(f"the text has {len(tokens)} tokens: give at least {n_context}, and --tokens up to that")
    return [tokens[i * n_context : (i + 1) * n_context] for i in range(n_chunks)]


def compare_texts(model: Path, chunks: list[list[int]]) -> list[str]:
    """Returns the first table."""
    losses: dict[str, list[np.ndarray]] = {"off": [], "on": [], "off, no flash attention": []}
    divergences: dict[str, list[np.ndarray]] = {name: [] for name in losses}
    agree: dict[str, list[np.ndarray]] = {name: [] for name in losses}
    ways = dict(zip(losses, (OFF, ON, REFERENCE), strict=True))
    for chunk, *logits in zip(chunks, *(logits_of(model, chunks, options) for options in ways.values()), strict=True):
        for start in range(0, len(chunk) - 1, _ROWS):
            targets = chunk[start + 1 : start + 1 + _ROWS]
            base = log_softmax(logits[0][start : start + _ROWS])
            for name, one in zip(losses, logits, strict=True):
                other = base if name == "off" else log_softmax(one[start : start + _ROWS])
                losses[name].append(-other[np.arange(len(targets)), targets])
                divergences[name].append((np.exp(base) * (base - other)).sum(axis=-1))
                agree[name].append(base.argmax(axis=-1) == other.argmax(axis=-1))
    n = sum(map(len, losses["off"]))
    table: list[list[object]] = [
        ["kernels", "tokens", "perplexity", "loss - loss of off", "KL from off", "same top token"]
    ]
    for name in losses:
        loss, base_loss = np.concatenate(losses[name]), np.concatenate(losses["off"])
        difference = loss - base_loss
        error = difference.std(ddof=1) / np.sqrt(n)
        table.append(
            [
                name,
                n,
                f"{np.exp(loss.mean()):.4f}",
                f"{difference.mean():+.6f} +- {error:.6f}",
                f"{np.concatenate(divergences[name]).mean():.2e}",
                f"{np.concatenate(agree[name]).mean():.2%}",
            ]
        )
    return aligned(table)


def requantize(source: Path, target: Path, outtype: str) -> None:
    """Writes a file with other types of weights; the source may be quantized itself.

    Raises:
        PopError: llama.cpp cannot do this.
    """
    llama_cpp = library.load()
    parameters = llama_cpp.llama_model_quantize_default_params()
    names = {"f32": "LLAMA_FTYPE_ALL_F32"}
    parameters.ftype = getattr(llama_cpp, names.get(outtype, f"LLAMA_FTYPE_MOSTLY_{outtype.upper()}"))
    parameters.allow_requantize = True
    parameters.nthread = available_cores()
    with library.captured_log() as errors:
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)) != 0:
            raise PopError(f"{source}: cannot be written as {outtype}: {errors[:1] or 'no reason given'}")


def compare_errors(model: Path, chunks: list[list[int]], types: list[str]) -> list[str]:
    """Returns the second table."""
    table: list[list[object]] = [["type", "error on", "error off", "on / off", "of each chunk"]]
    for outtype in types:
        with tempfile.TemporaryDirectory() as directory:
            quantized, exact = Path(directory, "quantized.gguf"), Path(directory, "f32.gguf")
            requantize(model, quantized, outtype)
            requantize(quantized, exact, "f32")
            rows = []  # the squares of the logits of each chunk, and of their errors
            ways = ((exact, REFERENCE), (quantized, ON), (quantized, OFF))
            for wanted, *computed in zip(*(logits_of(path, chunks, options) for path, options in ways), strict=True):
                differences = (wanted, *(one - wanted for one in computed))
                rows.append([np.square(one, dtype=np.float64).sum() for one in differences])
        size, on, off = np.sum(rows, axis=0)
        ratios = sorted(on_here / off_here for _, on_here, off_here in rows)
        by_chunk = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {np.median(ratios):.3f}"
        table.append([outtype, f"{on / size:.3e}", f"{off / size:.3e}", f"{on / off:.3f}", by_chunk])
    return aligned(table)


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a text, or a JSON list of texts")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text that are read (default: 4096)")
    parser.add_argument("--context", type=int, default=512, help="tokens that are read at once (default: 512)")
    parser.add_argument("--types", nargs="*", default=[], metavar="TYPE", help="types for the second table, e.g. q8_0")
    parser.add_argument("--error-tokens", type=int, default=1024, help="tokens for the second table (default: 1024)")
    arguments = parser.parse_args()
    check_ranges(arguments, context=2, error_tokens=1, tokens=0)
    text = read_text(arguments.text)
    if arguments.tokens:
        chunks = tokenize(arguments.model, text, arguments.tokens, arguments.context)
        print(*compare_texts(arguments.model, chunks), sep="\n", flush=True)
    if arguments.types:
        chunks = tokenize(arguments.model, text, arguments.error_tokens, arguments.context)
        print(*compare_errors(arguments.model, chunks, arguments.types), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
