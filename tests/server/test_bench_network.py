"""tools/bench_network.py: prompts of a split model are read in both ways, and the link delays them."""

import csv
import socket
import struct
import subprocess
import sys
import time
from collections import Counter

from tests.support.paths import ROOT
from tools.bench_network import Link

DELAY_MS = 40


def test_prompts_wait_for_the_link(served_gguf, tmp_path):
    options = ["--boundary", 8, "--prompt", 64, "--delay", f"0,{DELAY_MS}", "--runs", 2, "--csv", tmp_path / "runs.csv"]
    command = [sys.executable, "-m", "tools.bench_network", served_gguf, *options]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    cases = Counter((row["delay_ms"], row["engine"]) for row in rows)
    assert cases == {(delay, engine): 2 for delay in ("0", str(DELAY_MS)) for engine in ("whole", "pop")}
    # The states of a prompt cross the link, and then the logits come back. So do those of each further token.
    delayed = [row for row in rows if row["delay_ms"] == str(DELAY_MS)]
    for row in delayed:
        assert float(row["ttft_ms"]) > 2 * DELAY_MS and float(row["decode_ms_per_token"]) > 2 * DELAY_MS
    assert len(done.stdout.splitlines()) == 3


def test_link_keeps_bytes_and_order_at_its_rate():
    sent = bytes(range(256)) * 4096  # 1 MiB
    with socket.create_server(("127.0.0.1", 0)) as target:
        link = Link(f"127.0.0.1:{target.getsockname()[1]}", bytes_per_s=10 * len(sent))
        link.delay_s = 0.05
        with socket.create_connection(link.address.split(":")) as near, target.accept()[0] as far:
            began = time.monotonic()
            near.sendall(sent)
            near.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: far.recv(1 << 16), b""))
            assert time.monotonic() - began >= 0.15
            assert received == sent
        link.close()


def test_link_tells_that_a_server_was_killed():
    with socket.create_server(("127.0.0.1", 0)) as target:
        link = Link(f"127.0.0.1:{target.getsockname()[1]}", bytes_per_s=1e9)
        with socket.create_connection(link.address.split(":"), timeout=30) as near:
            far = target.accept()[0]
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes as a killed program
            far.close()
            assert near.recv(1) == b""
        link.close()
