"""``--kernels`` of the commands that measure a model. Each runs in a process of its own: an engine reads it once."""

import hashlib
import json
import platform
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest

from pypop_gguf import PopLlama, cli
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernels are for x86")


def digest(model: str, **options) -> str:
    """Returns a digest of the logits after a prompt."""
    llm = PopLlama(model, pop=False, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, **options)
    llm.eval([1, *range(260, 340)])
    row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
    return hashlib.sha256(row.tobytes()).hexdigest()


# The command has computed by now, so the engine has read its setting and keeps it.
CODE = """
import json, sys
from pypop_gguf import cli
from tests.commands.test_kernels_argument import digest

assert cli.main(sys.argv[2:]) == 0
print(json.dumps(digest(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> str:
    """A tiny random model, whose products our kernels compute."""
    path = str(tmp_path_factory.mktemp("random") / "tiny.gguf")
    assert cli.main(["random-model", "tiny", path, "--outtype", "q8_0"]) == 0
    return path


@pytest.mark.parametrize("command", ["eval", "tune", "prepare"])
def test_kernels_of_the_command_are_those_that_were_asked_for(command, quantized, short_texts, tmp_path):
    texts, options = str(short_texts), ["--boundary", "4", "--samples", "2", "--threads", "1"]
    arguments = {
        "eval": ["eval", quantized, texts, "--no-generate", *options],
        "tune": ["tune", quantized, "--text", texts, "--max-kl", "9", *options],
        "prepare": ["prepare", quantized, "--text", texts, "--outfile", str(tmp_path / "out.gguf"), *options],
    }[command]
    found = []
    for kernels in ("on", "off"):
        done = subprocess.run(
            [sys.executable, "-c", CODE, quantized, *arguments, "--kernels", kernels],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    with_kernels, without = found
    assert with_kernels != without == digest(quantized, pop_kernels=False)
