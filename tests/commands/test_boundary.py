"""The rules that choose a boundary. The counts of layers are those of real models."""

import numpy as np
import pytest

from pypop_gguf import PopError
from pypop_gguf.boundary_rules import choose_boundary, skipped_share

IMPORTANCE = np.array([50, 20, 10, 8, 6, 4, 2, 0], dtype=np.float32)  # 8 layers, 100 in all; the last one is always 0


@pytest.mark.parametrize(
    ("n_layer", "boundary"),
    [(1, 1), (2, 2), (3, 2), (12, 8), (16, 11), (28, 19), (32, 22), (36, 24), (48, 32), (80, 54)],
)
def test_default_skips_a_third_rounded_down(n_layer, boundary):
    assert choose_boundary(n_layer, n_layer - 1).boundary == boundary


@pytest.mark.parametrize(("ratio", "boundary"), [(0, 12), (0.08, 12), (0.1, 11), (0.25, 9), (0.5, 6), (0.99, 1)])
def test_prune_ratio_is_rounded_down_to_layers(ratio, boundary):
    assert choose_boundary(12, 11, prune_ratio=ratio).boundary == boundary


def test_ratio_written_as_a_fraction_skips_that_many_layers():
    for n_layer in range(1, 101):
        chosen = [choose_boundary(n_layer, n_layer - 1, prune_ratio=skip / n_layer).boundary for skip in range(n_layer)]
        assert chosen == [n_layer - skip for skip in range(n_layer)]


def test_explicit_boundary_is_taken_as_it_is():
    assert [choose_boundary(12, 11, boundary=str(b)).boundary for b in (1, 7, 12)] == [1, 7, 12]


def test_lossless_is_the_last_layer_that_writes_to_the_cache():
    assert choose_boundary(12, 11, boundary="lossless").boundary == 11
    assert choose_boundary(30, 14, boundary="lossless").boundary == 14  # The upper layers share their caches.


@pytest.mark.parametrize(("loss", "boundary"), [(0, 7), (0.019, 7), (0.02, 6), (0.06, 5), (0.3, 2), (0.5, 1), (1, 1)])
def test_max_importance_loss_cuts_as_deep_as_it_allows(loss, boundary):
    choice = choose_boundary(8, 7, max_importance_loss=loss, importance=IMPORTANCE)
    assert choice.boundary == boundary
    assert choice.skipped_share <= loss
    assert boundary == 1 or skipped_share(IMPORTANCE, boundary - 1) > loss


def test_skipped_share_counts_the_layers_from_the_boundary_on():
    assert choose_boundary(8, 7, boundary="4", importance=IMPORTANCE).skipped_share == pytest.approx(0.12)
    assert choose_boundary(8, 7, boundary="8", importance=IMPORTANCE).skipped_share == 0
    assert choose_boundary(8, 7, boundary="lossless", importance=IMPORTANCE).skipped_share == 0


def test_skipped_share_is_unknown_without_importance():
    assert choose_boundary(8, 7).skipped_share is None


def test_scores_of_zero_skip_no_share():
    assert skipped_share(np.zeros(8, dtype=np.float32), 1) == 0


def test_choice_names_its_rule():
    assert choose_boundary(12, 11).rule == "--prune-ratio 0.3333"
    assert choose_boundary(12, 11, boundary="lossless").rule == "--boundary lossless"
    assert choose_boundary(8, 7, max_importance_loss=0.1, importance=IMPORTANCE).rule == "--max-importance-loss 0.1"


@pytest.mark.parametrize("boundary", ["0", "13", "-1", "8.0", "x", "", "²", "٣"])
def test_boundary_out_of_range_is_refused_with_the_range(boundary):
    with pytest.raises(PopError, match=r'is out of range: give .*"lossless"'):
        choose_boundary(12, 11, boundary=boundary)


@pytest.mark.parametrize("ratio", [-0.1, 1, 2, float("nan"), float("inf")])
def test_prune_ratio_out_of_range_is_refused_with_the_range(ratio):
    with pytest.raises(PopError, match="give at least 0 and less than 1"):
        choose_boundary(12, 11, prune_ratio=ratio)


@pytest.mark.parametrize("loss", [-0.1, 1.1, float("nan")])
def test_max_importance_loss_out_of_range_is_refused_with_the_range(loss):
    with pytest.raises(PopError, match="give 0 to 1"):
        choose_boundary(8, 7, max_importance_loss=loss, importance=IMPORTANCE)


def test_max_importance_loss_without_importance_is_refused():
    with pytest.raises(PopError, match="leave out --no-importance"):
        choose_boundary(8, 7, max_importance_loss=0.1)


def test_ratio_never_stops_above_a_boundary_that_is_free():
    assert choose_boundary(30, 19, prune_ratio=0.1).boundary == 19
    assert choose_boundary(30, 19, prune_ratio=0).boundary == 30


def test_importance_of_zero_everywhere_cannot_choose():
    with pytest.raises(PopError, match="give --boundary"):
        choose_boundary(12, 11, max_importance_loss=0.1, importance=np.zeros(12))
