"""Programs for another processor or system, which an emulator runs on this machine. They come from tests/programs.

``make arm`` compiles them for Linux on aarch64, and qemu runs them as several kinds of processors. ``make windows``
compiles them for Windows on x86-64, and wine runs them on this machine's processor. For each kind of processor, ggml
loads the most capable of its CPU libraries. ``make amx`` compiles them for x86-64 with AMX. They run on this machine,
and a library emulates the instructions that it lacks.
"""

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Emulator:
    """Runs programs for another processor or system.

    Attributes:
        command: The words in front of the program.
        library: The name, or its beginning, of the CPU library that ggml loads there.
        suffix: The end of a program's name.
        environment: Variables that the emulator needs.
    """

    command: tuple[str, ...]
    library: str
    suffix: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def _qemu(processor: str, library: str) -> Emulator:
    # Debian's cross compiler keeps the system libraries of aarch64 there.
    command = ("qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu")
    return Emulator(command, f"libggml-cpu-{library}.so")


def _wine(programs: str) -> Emulator:
    environment = {
        "WINEPREFIX": str(Path(programs).resolve().parent / "wine"),  # what wine keeps of its Windows
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",  # else wine offers to install parts that a library does not need
        "LC_ALL": "C.UTF-8",
    }
    return Emulator(("wine",), "ggml-cpu-", ".exe", environment)


# `make arm` or `make windows` names the directory of its programs, so that no other run of the tests takes programs
# that were built from older sources.
PROGRAMS_ARM, PROGRAMS_WINDOWS = os.environ.get("POP_ARM"), os.environ.get("POP_WINDOWS")
PROGRAMS = PROGRAMS_ARM or PROGRAMS_WINDOWS
AMX_PROGRAMS = os.environ.get("POP_AMX")  # the same of `make amx`
# These are processors that qemu knows. The first one lacks the dot-product instructions that our kernels need, and the
# last one has those for matrices too.
ARM = {
    "cortex-a57": _qemu("cortex-a57", "armv8.0_1"),
    "cortex-a76": _qemu("cortex-a76", "armv8.2_2"),
    "max": _qemu("max", "armv8.6_2"),
}
EMULATORS = ARM if PROGRAMS_ARM else {"windows": _wine(PROGRAMS_WINDOWS)} if PROGRAMS_WINDOWS else {}


def environment_with(kernels: str | None) -> dict[str, str]:
    """Returns this environment, but POP_KERNELS is ``kernels``, or is missing."""
    others = {name: value for name, value in os.environ.items() if name != "POP_KERNELS"}
    return others if kernels is None else {**others, "POP_KERNELS": kernels}


def name_of(path: Path) -> str:
    """Returns the name by which an emulated program finds a file. Wine shows the files of this machine as a drive."""
    return "Z:" + str(path).replace("/", "\\") if PROGRAMS_WINDOWS else str(path)


def run(name: str, program: str, *arguments: str, given: bytes, kernels: str | None) -> bytes:
    """Returns what a program writes that reads ``given``. POP_KERNELS is ``kernels``, or is missing."""
    emulator = EMULATORS[name]
    command = [*emulator.command, str(Path(PROGRAMS, program + emulator.suffix)), *arguments]
    environment = {**environment_with(kernels), **emulator.environment}
    done = subprocess.run(command, input=given, capture_output=True, env=environment)
    messages = done.stderr.decode(errors="replace")
    assert done.returncode == 0, messages
    assert emulator.library in messages
    return done.stdout


def run_with_amx(program: str, *, given: bytes, kernels: str | None, granted: bool) -> tuple[bytes, tuple[int, int]]:
    """Returns what a program writes that reads ``given``, and how many products of tiles it has computed.

    The first number is that of products of signed and unsigned bytes, which our kernels compute. The second is that of
    all others, such as those of ggml. Linux refuses the tiles to the program where they are not ``granted``.
    """
    environment = {**environment_with(kernels), "EMULATED_TILES": "granted" if granted else "refused"}
    environment["LD_PRELOAD"] = str(Path(AMX_PROGRAMS, "libemulated-tiles.so").resolve())
    done = subprocess.run([Path(AMX_PROGRAMS, program)], input=given, capture_output=True, env=environment)
    messages = done.stderr.decode(errors="replace")
    assert done.returncode == 0, messages
    counted = re.search(r"emulated tiles: (\d+) products of signed and unsigned bytes, (\d+) others", messages)
    return done.stdout, (int(counted[1]), int(counted[2]))
