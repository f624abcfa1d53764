"""Runs nginx with the configuration in docs/server.md in front of servers: for tests, and for tools/bench_proxy.py."""

import contextlib
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.support.paths import ROOT
from tests.support.process import accepts_connections, free_port, running_process
from tests.support.server import new_client

# This is the path of the program, or None where it is not installed.
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
# nginx keeps its files here and runs as one process of this user, so it neither needs nor gives up rights of root.
PLACES = """
daemon off; master_process off; pid nginx.pid; error_log stderr; events {}
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
"""


@contextlib.contextmanager
def proxy(directory: Path, *ports: int) -> Iterator[httpx.Client]:
    """Runs nginx, which has to be installed, in front of one or two servers, and yields a client of it.

    Args:
        directory: An existing directory for its files.
        ports: The ports of the servers. If there is only one, docs/server.md's line of the second server is left out.
    """
    port = free_port()
    text = re.search(r"^```nginx\n(.+?)^```$", (ROOT / "docs" / "server.md").read_text(), re.M | re.S)[1]
    for documented, used in itertools.zip_longest((8080, 8081, 8082), (port, *ports)):
        address = f"127.0.0.1:{documented}"
        assert address in text
        if used is None:
            text = re.sub(rf"^.*{re.escape(address)}.*\n", "", text, flags=re.M)
        else:
            text = text.replace(address, f"127.0.0.1:{used}")
    (directory / "nginx.conf").write_text(f"{PLACES}{text}}}\n")
    command = [NGINX, "-p", directory, "-c", directory / "nginx.conf"]
    with (
        running_process(command, directory / "nginx.txt", lambda: accepts_connections(port)),
        new_client(port) as client,
    ):
        yield client
