"""Two contexts of one model work in two threads at once."""

import pytest

from tests.support import two_threads


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_two_contexts_of_one_model_answer_alike_in_two_threads(reference_models, name):
    two_threads.main(str(reference_models[name].gguf))
