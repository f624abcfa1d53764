"""POP serves every architecture that llama.cpp can load, or refuses it with a reason."""

import pytest

from tools import architectures


@pytest.mark.slow
def test_every_architecture_equals_its_reference_or_is_refused():
    if not any(architectures.STOCK.rglob("test-llama-archs*")):
        pytest.skip("the generator of tiny models is not built: run `make test-slow`")
    rows = architectures.check_all()
    assert len(rows) > 100
    assert {row.name: row.failures for row in rows if row.failures} == {}
    # These are the diffusion models, and the one that runs its layers in cycles.
    assert {row.name for row in rows if row.refusal} == {
        "dream-dense",
        "llada-dense",
        "llada-moe-moe",
        "rnd1-moe",
        "hrm_text-dense",
    }
