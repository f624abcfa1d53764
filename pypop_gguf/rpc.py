"""Other machines that compute layers of a model: the option ``--rpc`` and llama.cpp's RPC backend behind it.

``serve``, ``chat`` and ``bench`` take the option, and the servers it names are started by ``pop-gguf rpc-server``. A
process that loses a server while it computes ends with one line, which a patch of the RPC backend prints.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import struct
from collections.abc import Sequence

from pypop_gguf import parent
from pypop_gguf.errors import PopError

DEFAULT_PORT = 50052

_ANSWER_S = 5
_HELLO, _CAPABILITIES_BYTES = 14, 24  # RPC_CMD_HELLO and RPC_CONN_CAPS_SIZE, the same in all versions of the protocol


def add_rpc_argument(parser: argparse.ArgumentParser, action: str = "store", more: str = "") -> None:
    """Adds ``--rpc``, whose value is what :func:`reachable_servers` takes."""
    parser.add_argument(
        "--rpc",
        action=action,
        metavar="HOST:PORT,...",
        help="machines that hold the layers of the model and compute them, each by a `pop-gguf rpc-server`; a model is "
        f"spread over them by their free memory{more}",
    )


def reachable_servers(text: str) -> list[str]:
    """Returns the servers of a list such as ``10.0.0.2:50052,10.0.0.3:50052`` after each of them has answered.

    Raises:
        PopError: A part of the list is no address, or nobody answers there as an RPC server does.
    """
    servers = text.split(",")
    for server in servers:
        host, _, port = server.partition(":")
        if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise PopError(f"--rpc {server!r} is no address: give HOST:PORT, and a comma between several")
        if servers.count(server) > 1:
            raise PopError(f"--rpc names {server} twice: give each server once")
        _check_answer(server, host, int(port))
    return servers


def _check_answer(server: str, host: str, port: int) -> None:
    """Greets a server: llama.cpp would wait without end for one that serves another program."""
    try:
        address = str(socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])  # as llama.cpp does
        with socket.create_connection((address, port), timeout=_ANSWER_S) as connection:
            connection.sendall(struct.pack("<BQ", _HELLO, _CAPABILITIES_BYTES) + bytes(_CAPABILITIES_BYTES))
            connection.settimeout(_ANSWER_S)
            if not connection.recv(1):
                raise PopError(f"--rpc {server} is no RPC server: start `pop-gguf rpc-server` there")
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: the name has an empty or a too long part
        raise PopError(f"--rpc {server}: no machine has this name: give its address") from error
    except TimeoutError as error:
        raise PopError(
            f"--rpc {server} gives no answer: it serves one program at a time, so end the other one, or start "
            "`pop-gguf rpc-server` there"
        ) from error
    except OSError as error:
        raise PopError(
            f"--rpc {server} cannot be reached ({error.strerror}): start `pop-gguf rpc-server` there"
        ) from error


def use_servers(servers: Sequence[str]) -> None:
    """Makes the servers devices of this process, on which llama.cpp puts the layers of the models that it loads next.

    The package ``llama_cpp``, ours or an unpatched one, has to be loaded already.

    Raises:
        PopError: llama.cpp was built without the RPC backend.
    """
    ggml = parent.ggml_library()
    handle = ctypes.c_void_p
    ggml.ggml_backend_reg_by_name.argtypes, ggml.ggml_backend_reg_by_name.restype = [ctypes.c_char_p], handle
    ggml.ggml_backend_reg_get_proc_address.argtypes = [handle, ctypes.c_char_p]
    ggml.ggml_backend_reg_get_proc_address.restype = handle
    ggml.ggml_backend_register.argtypes, ggml.ggml_backend_register.restype = [handle], None
    backend = ggml.ggml_backend_reg_by_name(b"RPC")
    if not backend:
        raise PopError("this llama.cpp is built without the RPC backend: build it with -DGGML_RPC=ON")
    address = ggml.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_add_server")
    add_server = ctypes.CFUNCTYPE(handle, ctypes.c_char_p)(address)
    for server in servers:
        ggml.ggml_backend_register(add_server(os.fsencode(server)))
