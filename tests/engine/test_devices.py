"""Layers split over devices: the boundary state crosses from one to the other. The devices are RPC servers on loopback."""

import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.support.paths import ROOT
from tests.support.pop_reference import squared_error

WORKER = ROOT / "tests" / "support" / "device_worker.py"
BUILD = ROOT / "build" / "rpc" / "package" / "pypop_gguf" / "_vendor"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(BUILD)}
N_LAYER = 6

pytestmark = pytest.mark.slow


@pytest.fixture
def ports():
    """Two devices, each a process with a port."""
    if not BUILD.is_dir():
        pytest.skip("the build with the RPC backend is missing: run `make test-slow`")
    found, servers = [], []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            found.append(free.getsockname()[1])
        command = [sys.executable, WORKER, "serve", str(found[-1])]
        servers.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for port in found:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
    yield found
    for server in servers:
        server.kill()
        server.communicate()


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
    assert "RPC0" in log and "RPC1" in log  # both devices hold layers
    assert n_pruned == 40
    assert squared_error(two, one) <= 1e-9
