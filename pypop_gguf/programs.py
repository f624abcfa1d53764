"""The programs of llama.cpp that are built with the package: where they lie, and how a command becomes one of them."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pypop_gguf import library
from pypop_gguf.errors import PopError


def find(name: str, option: str) -> Path:
    """Returns the path of a program that was built with the package.

    Args:
        name: The program's name.
        option: The option of the build that leaves the program out.

    Raises:
        PopError: The package was built without it.
    """
    program = library.vendor_dir() / "llama_cpp" / "lib" / (f"{name}.exe" if os.name == "nt" else name)
    if not program.is_file():
        raise PopError(f"{program} is missing: build the package without {option}")
    return program


if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes

    def _let_children_end_too() -> None:
        """Lets Windows end the programs that this process starts when this process ends, in whatever way."""
        kernel = ctypes.WinDLL("kernel32")
        kernel.CreateJobObjectW.restype = kernel.GetCurrentProcess.restype = wintypes.HANDLE
        kernel.SetInformationJobObject.argtypes = wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD
        kernel.AssignProcessToJobObject.argtypes = wintypes.HANDLE, wintypes.HANDLE
        # This is a JOBOBJECT_EXTENDED_LIMIT_INFORMATION of 144 bytes. Its flags stand behind the first 16, and
        # the only one that is set is KILL_ON_JOB_CLOSE.
        limits = struct.pack("16xI124x", 0x2000)
        job = kernel.CreateJobObjectW(None, None)
        # Windows may refuse this. The program then works as well, but may outlive this process.
        kernel.SetInformationJobObject(job, 9, limits, len(limits))
        kernel.AssignProcessToJobObject(job, kernel.GetCurrentProcess())


def become(command: Sequence[str]) -> NoReturn:
    """Replaces this process by a program. On Windows it waits for the program, and ends with its exit status.

    Raises:
        PopError: It cannot be started.
    """
    sys.stdout.flush()
    try:
        if sys.platform == "win32":  # No program replaces a process there, so this one waits for it.
            _let_children_end_too()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both, and the program decides.
            sys.exit(ctypes.c_int(subprocess.call(command)).value)  # A crash has a status above what exit() takes.
        os.execv(command[0], list(command))
    except OSError as error:
        raise PopError(f"{command[0]} cannot be started ({error.strerror}): install the package again") from error


def check_address(hosts: str, port: int) -> None:
    """Checks that a program can listen there: it would say so in many lines, and late.

    Args:
        hosts: Addresses, with commas between them; a name that ends in ``.sock`` is a file and is not checked.
        port: The port.

    Raises:
        PopError: It cannot.
    """
    for host in hosts.split(","):
        if host.endswith(".sock"):
            continue
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                if os.name != "nt":  # there it would allow two servers at one port
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PopError(f"port {port} is in use by another program: give another --port") from error
            if error.errno == errno.EACCES:
                raise PopError(f"port {port} needs more rights: give a --port above 1023") from error
            raise PopError(f"--host {host} is no address of this machine: give one ({error.strerror})") from error
        except UnicodeError as error:  # the name has an empty or a too long part
            raise PopError(f"--host {host} is no address of this machine: give one") from error
