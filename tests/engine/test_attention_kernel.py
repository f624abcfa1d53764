"""The kernel of csrc/pop-attention.cpp, compared with exact attention and with ggml's own kernel.

A process with POP_KERNELS=off runs ggml's. It also runs for fewer than MIN_QUERIES queries.
"""

import platform

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from tests.support.products import Attention, in_process

MIN_QUERIES = 9

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernel is for x86")


def causal(queries: int, keys: int, window: int = 10**6) -> np.ndarray:
    """Returns the mask of queries at the end of the keys, each of which sees the `window` keys up to its own."""
    distance = np.arange(keys - queries, keys)[:, None] - np.arange(keys)[None, :]
    return np.where((distance >= 0) & (distance < window), 0.0, -np.inf)[None, None]


def attention(queries: int, keys: int, heads: int, groups: int, size: int, mask=None, **options) -> Attention:
    """``options`` may hold the number of sequences, the size of the values, sinks and threads."""
    chance = np.random.default_rng(7)
    sequences, value_size = options.pop("sequences", 1), options.pop("value_size", size)
    made = [
        2 * chance.standard_normal((sequences, n_heads, n, n_values))
        for n_heads, n, n_values in ((heads, queries, size), (groups, keys, size), (groups, keys, value_size))
    ]
    return Attention(made[0].astype(np.float32), *(x.astype(np.float16) for x in made[1:]), mask, **options)


def exact(asked: Attention) -> np.ndarray:
    share = asked.query.shape[1] // asked.key.shape[1]
    kind = GGMLQuantizationType(asked.kind)
    key, value = (dequantize(quantize(x.astype(np.float32), kind), kind) for x in (asked.key, asked.value))
    query, key, value = (x.astype(np.float64) for x in (asked.query, key, value))
    products = query @ np.repeat(key, share, axis=1).transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1])
    if asked.mask is not None:
        products = products + asked.mask.astype(np.float64)
    if asked.sinks is not None:
        sinks = np.broadcast_to(asked.sinks[None, :, None, None], (*products.shape[:3], 1))
        products = np.concatenate([products, sinks], axis=-1)
    weights = np.exp(products - products.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    output = weights[..., : key.shape[2]] @ np.repeat(value, share, axis=1)
    return output.transpose(0, 2, 1, 3)


CASES = {
    "causal": attention(100, 128, 6, 2, 64, causal(100, 128)),
    "few queries": attention(MIN_QUERIES, 70, 3, 3, 32, causal(MIN_QUERIES, 70)),
    "window": attention(200, 300, 7, 1, 64, causal(200, 300, 40)),
    "no mask": attention(33, 65, 4, 2, 128),
    "numbers in the mask": attention(20, 80, 2, 1, 16, causal(20, 80) + np.linspace(-3, 0, 80)),
    "several sequences": attention(
        17, 64, 4, 2, 96, np.concatenate([causal(17, 64), causal(17, 64, 5)]), sequences=2, value_size=48
    ),
    "sinks": attention(40, 64, 4, 2, 64, causal(40, 64), sinks=np.array([-1.0, 0.0, 3.0, 20.0], np.float32)),
    "large numbers": Attention(
        *(30 * x for x in (lambda a: (a.query, a.key))(attention(30, 64, 2, 2, 64))),
        attention(30, 64, 2, 2, 64).value,
        causal(30, 64),
    ),
}


for _kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16"):
    _options = dict(sequences=2, value_size=96, kind=int(GGMLQuantizationType[_kind]))
    CASES[f"cache of {_kind}"] = attention(50, 90, 4, 2, 64, causal(50, 90), **_options)


@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_ggml(name):
    asked = CASES[name]
    wanted = exact(asked)
    outputs = {setting: in_process([asked], setting)[0][0] for setting in ("off", "on", "avx2")}
    errors = {setting: np.abs(output - wanted).max() for setting, output in outputs.items()}
    for setting in ("on", "avx2"):
        assert errors[setting] <= max(1.5 * errors["off"], 1e-5), errors
        assert not np.array_equal(outputs[setting], outputs["off"])


def test_row_that_sees_nothing_is_zero():
    mask = causal(20, 64)
    mask[:, :, 3] = -np.inf
    ((output, _),) = in_process([attention(20, 64, 2, 1, 64, mask)], "on")
    assert not output[:, 3].any() and np.isfinite(output).all()


def test_same_with_any_number_of_threads():
    mask = causal(100, 128)
    one, two = (attention(100, 128, 6, 2, 64, mask, n_threads=n) for n in (1, 2))
    (a, _), (b, _), (c, _) = in_process([one, two, two], "on")
    assert np.array_equal(a, b) and np.array_equal(b, c)


def test_fewer_queries_stay_with_ggml():
    asked = [attention(n, 64, 4, 2, 64, causal(n, 64)) for n in range(1, MIN_QUERIES)]
    for (a, _), (b, _) in zip(in_process(asked, "on"), in_process(asked, "off"), strict=True):
        assert np.array_equal(a, b)
