"""Measures how far each token of an answer is from the whole model's while the prompt is completed.

The whole model answers a prompt. Its answer is then put behind a pruned prompt token by token, and the KL divergence
to the whole model is taken before each token: with the skipped layers' own weights, with fitted ones, and with fitted
ones while some tokens of the prompt are completed before each token of the answer after the first. The whole model that
reads the prompt in pieces of 64 tokens shows how much rounding alone changes. The prompts and the fit are those of
tools/real_quality.py. OUT.jsonl gets a line for each prompt, and a run that was interrupted goes on where it stopped.

    python -m tools.completion_quality smollm2-135m --boundary 20,15 --data DATA --out OUT.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pypop_gguf import PopLlama, native
from pypop_gguf.fitting import steps
from pypop_gguf.fitting.texts import encode_chat, read_prompts
from pypop_gguf.quality.score import log_softmax
from pypop_gguf.terminal import aligned, available_cores, check_ranges, integer_list, progress
from tools.real_models import MODELS, fetch
from tools.real_quality import make_prompts
from tools.reporting import one_line_errors

_PIECE = 64  # tokens
SHOWN = (1, 2, 4, 8, 16, 32)  # tokens of the answer, counted from 1


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--boundary", type=integer_list, required=True, metavar="B,B")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl")
    parser.add_argument(
        "--chunk",
        type=integer_list,
        default=[16, 64],
        metavar="N,N",
        help="tokens that are completed before each token of the answer (default: 16,64)",
    )
    parser.add_argument("--prompts", type=int, default=40, metavar="N", help="prompts of each kind (default: 40)")
    parser.add_argument("--threads", type=int, default=available_cores())
    arguments = parser.parse_args()

    check_ranges(arguments, boundary=1, chunk=1, prompts=1, threads=1)
    source = fetch(arguments.model)
    adapters = {
        boundary: arguments.out.with_name(f"{arguments.out.stem}.b{boundary}.gguf") for boundary in arguments.boundary
    }
    if not all(path.exists() for path in adapters.values()):
        fitter = steps.open_whole(source, arguments.threads)
        steps.fit(fitter, source, read_prompts(fitter, None, steps.CONTEXT)[0], adapters)
        fitter.close()
    llm = open_model(source, arguments.threads)
    loaded = {boundary: native.adapter_init(llm.model, path) for boundary, path in adapters.items()}
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(row["kind"], row["number"]) for row in rows}
    prompts = list(make_prompts(arguments.data, arguments.prompts))
    with (
        progress(total=len(prompts), description=arguments.model, unit="prompts") as bar,
        arguments.out.open("a") as out,
    ):
        for kind, number, text in prompts:
            if (kind, number) not in done:
                tokens = encode_chat(llm, [{"role": "user", "content": text}], steps.CONTEXT)
                kl = measure(llm, tokens, loaded, arguments.chunk)
                rows.append({"kind": kind, "number": number, "prompt_tokens": len(tokens), "kl": kl})
                print(json.dumps(rows[-1]), file=out, flush=True)
            bar.update()
    print(table(rows))
    return 0


def open_model(source: Path, n_threads: int) -> PopLlama:
    return PopLlama(
        str(source),
        pop=False,
        pop_adapter=False,
        pop_head=steps.HEAD,
        pop_complete="call",
        n_ctx=steps.CONTEXT + steps.ANSWER,
        n_batch=steps.CONTEXT + steps.ANSWER,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        flash_attn=True,
        verbose=False,
    )


def measure(llm: PopLlama, prompt: Sequence[int], adapters: dict, chunks: Sequence[int]) -> dict[str, list[float]]:
    """Returns the KL divergence before each token of the answer, in nats, by the name of the boundary and the way."""
    n_layer = llm.pop.n_layer
    native.clear_adapters(llm.ctx)
    answer, whole = _answer(llm, prompt)

    def divergence(boundary: int, chunk: int) -> list[float]:
        log_p = _log_probabilities(llm, prompt, answer, boundary, chunk)
        return [round(float(kl), 7) for kl in (np.exp(whole) * (whole - log_p)).sum(axis=1)]

    found = {f"{n_layer} whole, in pieces": divergence(n_layer, 0)}
    found |= {f"{boundary} plain": divergence(boundary, 0) for boundary in adapters}
    for adapter in adapters.values():
        native.add_adapter(llm.ctx, adapter)
    for boundary in adapters:
        found[f"{boundary} fitted"] = divergence(boundary, 0)
        found |= {f"{boundary} fitted, {chunk} completed": divergence(boundary, chunk) for chunk in chunks}
    return found


def _answer(llm: PopLlama, prompt: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Returns the greedy answer of the whole model, and its log-probabilities before each token."""
    answer: list[int] = []
    rows = [_begin(llm, prompt, llm.pop.n_layer)]
    ends = {llm.token_eos()}
    while len(answer) < steps.ANSWER:
        answer.append(int(rows[-1].argmax()))
        if answer[-1] in ends or len(answer) == steps.ANSWER:
            break
        rows.append(_step(llm, answer[-1]))
    return answer, log_softmax(np.stack(rows))


def _log_probabilities(
    llm: PopLlama, prompt: Sequence[int], answer: Sequence[int], boundary: int, chunk: int
) -> np.ndarray:
    if boundary == llm.pop.n_layer:  # other micro-batches round in another way, which no completion can avoid
        llm.score(prompt[:_PIECE], [0], pop=False)
        for start in range(_PIECE, len(prompt), _PIECE):
            llm.eval(prompt[start : start + _PIECE])
        rows = [llm._logits_of(1)[0]]
    else:
        rows = [_begin(llm, prompt, boundary)]
    for token in answer[:-1]:
        if chunk:
            llm.complete_cache(chunk)
        rows.append(_step(llm, token))
    return log_softmax(np.stack(rows))


def _begin(llm: PopLlama, prompt: Sequence[int], boundary: int) -> np.ndarray:
    return llm.score(prompt, [0], boundary=boundary)[0]  # the logits behind the prompt, which is then cached


def _step(llm: PopLlama, token: int) -> np.ndarray:
    llm.eval([token])
    return llm._logits_of(1)[0]


def table(rows: Sequence[dict]) -> str:
    """Returns the means over all prompts whose answers are long enough."""
    lines = [("", *(f"token {at}" for at in SHOWN), "all")]
    for name in rows[0]["kl"]:
        answers = [row["kl"][name] for row in rows]
        means = [np.mean([one[at - 1] for one in answers if len(one) >= at] or [np.nan]) for at in SHOWN]
        everything = np.mean([np.mean(one) for one in answers])
        lines.append((name, *(f"{mean:.4f}" for mean in means), f"{everything:.4f}"))
    return "\n".join(aligned(lines))


if __name__ == "__main__":
    sys.exit(main())
