"""The table of ablations: its row POP is POP, its row "whole" is the whole model, and each other row differs."""

import numpy as np
import pytest
import torch

from pypop_gguf.importance.calibration import Sample
from tests.support import pop_reference
from tools import ablations
from tools.ablations import Variant

N_PROMPT = 40


@pytest.fixture
def model(reference_models):
    return reference_models["llama"]


def log_probs(model, variant) -> np.ndarray:
    sample = Sample(tuple(model.tokens(50)), N_PROMPT)
    return ablations.continuation_log_probs(model.torch_model, model.layers, sample, variant)


def reference(model, boundary, *ends) -> np.ndarray:
    logits = pop_reference.logits(model.torch_model, model.layers, model.tokens(50)[:-1], boundary, N_PROMPT, *ends)
    return torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()


@pytest.mark.parametrize(("head", "tail"), [(0, 1), (5, 1), (0, 7), (5, 7)])
def test_pop_rows_equal_the_other_reference(model, head, tail):
    found = log_probs(model, Variant("POP", (3, 4, 5), head=head, tail=tail))
    assert pop_reference.squared_error(found, reference(model, 3, head, tail)) <= 1e-9


def test_whole_row_is_the_whole_model(model):
    assert pop_reference.squared_error(log_probs(model, Variant("whole", tail=N_PROMPT)), reference(model, 6)) <= 1e-9


def test_rows_differ_from_pop_and_from_each_other(model):
    rows = ablations.variants(6, 2, np.array([0.5, 0.1, 0.4, 0.3, 0.2, 0.6]))
    assert [row.skipped for row in rows if row.both_stages] == [(1, 4), (4, 5)]
    assert [row.skipped for row in rows if row.name.startswith("every")] == [(2, 5)]
    found = [log_probs(model, row) for row in rows if not row.sparsity]
    for i, one in enumerate(found):
        assert all(pop_reference.squared_error(one, other) > 1e-6 for other in found[:i]), rows[i].name


def test_wanda_drops_the_least_weights_times_inputs(model):
    sample = Sample(tuple(model.tokens(30)), 20)
    inputs = []
    matrix = model.layers[0].self_attn.q_proj
    hook = matrix.register_forward_pre_hook(lambda _module, args: inputs.append(args[0][0]))
    pruned = ablations.wanda(model.torch_model, model.layers, [sample], 0.25)
    hook.remove()
    weight = pruned.model.layers[0].self_attn.q_proj.weight
    score = matrix.weight.abs() * inputs[0].norm(dim=0)
    assert ((weight == 0).sum(dim=1) == 16).all()  # a quarter of 64 in each row
    assert (
        score[weight == 0].reshape(64, 16).max(dim=1).values <= score[weight != 0].reshape(64, 48).min(dim=1).values
    ).all()
    assert not (matrix.weight == 0).any()  # the model itself is untouched
