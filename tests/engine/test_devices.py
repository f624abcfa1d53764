"""Layers can lie on several devices: the boundary state crosses between them. The devices are local RPC servers."""

import contextlib
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT
from tests.support.pop_reference import squared_error
from tests.support.process import accepts_connections, free_port, running_process

WORKER = ROOT / "tests" / "support" / "device_worker.py"
BUILD = ROOT / "build" / "rpc" / "package" / "pypop_gguf" / "_vendor"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(BUILD)}
N_LAYER = 6

pytestmark = pytest.mark.slow


@pytest.fixture
def ports(tmp_path):
    """Ports of two devices, each of which is a process."""
    if not BUILD.is_dir():
        pytest.skip("the build with the RPC backend is missing: run `make test-slow`")
    with contextlib.ExitStack() as devices:
        found = []
        for i in range(2):
            port = free_port()
            is_ready = functools.partial(accepts_connections, port)
            command = [sys.executable, WORKER, "serve", port]
            devices.enter_context(running_process(command, tmp_path / f"device{i}.txt", is_ready, ENVIRONMENT))
            found.append(port)
        yield found


def logits(model, boundary, continues, out, *ports) -> tuple[np.ndarray, int, str]:
    command = [sys.executable, WORKER, "run", model.gguf, boundary, continues, out, *ports]
    done = subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(out), json.loads(done.stdout.splitlines()[-1])["pruned"], done.stderr


@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize("boundary", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_layers_on_two_devices_equal_one(reference_models, ports, tmp_path, name, boundary, continues):
    model = reference_models[name]
    one, _, _ = logits(model, boundary, continues, tmp_path / "one.npy")
    two, n_pruned, log = logits(model, boundary, continues, tmp_path / "two.npy", *ports)
    assert "RPC0" in log and "RPC1" in log  # both devices have layers
    assert n_pruned == 40
    assert squared_error(two, one) <= 1e-9
