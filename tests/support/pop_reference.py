"""POP written a second time, in PyTorch on transformers. The tests compare the engine with it.

Prefill runs all prompt tokens between head and tail with hooks that make each layer from the boundary on return its
input. Such a layer still runs, so its keys and values of the boundary state reach the cache. Head and tail, and all
tokens that follow, run through the whole model on that cache.
"""

import numpy as np
import torch


def logits(
    model,
    decoder_layers,
    tokens: list[int],
    boundary: int,
    n_prompt: int,
    head: int = 0,
    tail: int = 1,
    added=None,
    further=None,
) -> np.ndarray:
    """Returns the logits of the last prompt token and of every token after it.

    Args:
        model: A causal language model of transformers, F32.
        decoder_layers: Its decoder layers, in order.
        tokens: Prompt and continuation, [T].
        boundary: First skipped layer of the prefill; len(decoder_layers) skips none.
        n_prompt: Tokens of the prompt, N.
        head: First tokens of the prompt that run through the whole model.
        tail: Last tokens of the prompt that run through the whole model.
        added: For some modules, a matrix [n_out, n_in] that the pruned pass adds to the weight, or such a matrix and a
            shift [n_out] that it adds to the output.
        further: For pairs of modules, a matrix by which the pruned pass multiplies what the first one reads, and adds
            the product to what the second one writes.

    Returns:
        F32 [T - N + 1, n_vocab].
    """

    def skip(_layer, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    read = {}

    def remember(module, args):
        read[module] = args[0]

    ids = torch.tensor([tokens])
    with torch.no_grad():
        cache = model(input_ids=ids[:, :head], use_cache=True).past_key_values if head else None
        hooks = [layer.register_forward_hook(skip, with_kwargs=True) for layer in decoder_layers[boundary:]]
        hooks += [
            module.register_forward_hook(lambda _module, args, output, add=add: output + args[0] @ add[0].T + add[1])
            for module, add in ((module, _with_shift(change)) for module, change in (added or {}).items())
        ]
        for (source, target), matrix in (further or {}).items():
            hooks.append(source.register_forward_pre_hook(remember))
            hooks.append(
                target.register_forward_hook(
                    lambda _module, _args, output, source=source, matrix=matrix: output + read[source] @ matrix.T
                )
            )
        try:
            pruned = ids[:, head : n_prompt - tail]
            cache = model(input_ids=pruned, past_key_values=cache, use_cache=True).past_key_values
        finally:
            for hook in hooks:
                hook.remove()
        rows = []
        for position in range(n_prompt - tail, len(tokens)):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1].float().numpy())
    return np.stack(rows[tail - 1 :])


def _with_shift(change) -> tuple:
    return change if isinstance(change, tuple) else (change, 0)


def squared_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the normalized squared error, |actual - expected|^2 / |expected|^2."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(((actual - expected) ** 2).sum() / (expected**2).sum())
