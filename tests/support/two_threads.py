"""Runs two contexts of one model in two threads, and checks that each answers as it does alone.

They have other boundaries, heads, tails and prompts. tools/sanitized.py runs this as a script with model files.
"""

import sys
import threading

import numpy as np

from pypop_gguf import native
from tests.support.engine import Engine, llama_cpp

TOKENS = np.random.default_rng(0).integers(3, 128, 90).tolist()
ROUNDS = 8


def work(engine: Engine, boundaries: tuple[int, ...]) -> np.ndarray:
    """Reads prompts at these boundaries in turn. Returns the logits of a token after each, F32 [rounds, n_vocab]."""
    rows = []
    for i in range(ROUNDS):
        native.set_boundary(engine.context, boundaries[i % len(boundaries)])
        native.set_ends(engine.context, n_head=i % 3, n_tail=1 + i % 2)
        native.set_continuation(engine.context, i % 2 == 0)
        llama_cpp.llama_memory_clear(engine.memory, True)
        engine.prefill(TOKENS[i:])
        rows.append(engine.step(5, len(TOKENS) - i))
    return np.stack(rows)


def main(path: str) -> None:
    plans = (2, 5), (3, 6)
    own = dict(n_threads=2, n_threads_batch=2)
    with Engine(path, **own) as first, Engine(path, model=first.model, **own) as second:
        engines = first, second
        alone = [work(engine, plan) for engine, plan in zip(engines, plans)]
        together: list = [None, None]

        def run(i: int) -> None:
            together[i] = work(engines[i], plans[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(2):
            assert engines[i].n_pruned > 0 and np.array_equal(together[i], alone[i])
    print(f"{path}: two threads answer as one")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(path)
