"""Programs for processors that this machine does not have.

qemu runs those for Linux on aarch64, which ``make arm`` compiles. For each kind of processor, ggml loads the most
capable of its CPU libraries. Those for x86-64 with AMX, which ``make amx`` compiles, run on this machine, and a library
emulates the instructions that it lacks.
"""

import os
import re
import subprocess
from pathlib import Path

# `make arm` names their directory, so that no other run of the tests takes programs that were built from older sources.
PROGRAMS = os.environ.get("POP_ARM")
AMX_PROGRAMS = os.environ.get("POP_AMX")  # the same of `make amx`
# A processor that qemu knows, and the ggml library that fits it best. The first one lacks the dot-product instructions
# that our kernels need, and the last one has those for matrices too.
PROCESSORS = {"cortex-a57": "armv8.0_1", "cortex-a76": "armv8.2_2", "max": "armv8.6_2"}
SYSTEM = "/usr/aarch64-linux-gnu"  # where Debian's cross compiler keeps the system libraries of aarch64


def environment_with(kernels: str | None) -> dict[str, str]:
    """Returns this environment, but POP_KERNELS is ``kernels``, or is missing."""
    others = {name: value for name, value in os.environ.items() if name != "POP_KERNELS"}
    return others if kernels is None else {**others, "POP_KERNELS": kernels}


def run(processor: str, program: str, *arguments, given: bytes, kernels: str | None) -> bytes:
    """Returns what a program writes that reads ``given``. POP_KERNELS is ``kernels``, or is missing."""
    command = ["qemu-aarch64", "-cpu", processor, "-L", SYSTEM, Path(PROGRAMS, program), *arguments]
    environment = environment_with(kernels)
    done = subprocess.run([*map(str, command)], input=given, capture_output=True, env=environment)
    messages = done.stderr.decode(errors="replace")
    assert done.returncode == 0, messages
    assert f"libggml-cpu-{PROCESSORS[processor]}.so" in messages
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
