"""Layers can lie on several devices: the boundary state crosses between them. The devices are local RPC servers."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT
from tests.support.pop_reference import squared_error
from tests.support.report import report
from tests.support.server import rpc_servers

WORKER = ROOT / "tests" / "support" / "device_worker.py"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with rpc_servers(2, tmp_path_factory.mktemp("servers")) as running:
        yield list(running)


def logits(model, boundary, continues, out, *servers) -> tuple[np.ndarray, int, str]:
    command = [sys.executable, WORKER, model.gguf, boundary, continues, out, *servers]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return np.load(out), json.loads(done.stdout.splitlines()[-1])["pruned"], done.stderr


# The models have 6 layers, of which each server holds half. Each boundary lies elsewhere to the gap between them.
CASES = [
    (name, boundary, continues) for name in ("llama", "gemma3") for boundary in (2, 3, 4, 5) for continues in (1, 0)
]


@pytest.mark.parametrize(
    ("name", "boundary", "continues"),
    [case if case == ("llama", 4, 1) else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_layers_on_two_devices_equal_one(reference_models, servers, tmp_path, name, boundary, continues):
    model = reference_models[name]
    one, _, _ = logits(model, boundary, bool(continues), tmp_path / "one.npy")
    two, n_pruned, log = logits(model, boundary, bool(continues), tmp_path / "two.npy", *servers)
    assert "RPC0" in log and "RPC1" in log  # both devices have layers
    assert n_pruned == 40
    error = squared_error(two, one)
    report(model=name, boundary=boundary, error=error)
    assert error <= 1e-9
