"""Runs the Python program that it reads from stdin, with limits on memory, files and processes.

code_runner.py runs this file by its path: ``python -I limited_program.py < PROGRAM``. The exit status is ``COMPLETED``
only if the program has run to its end: one that exits early, even with status 0, has not.
"""

import sys

COMPLETED = 87
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20


def set_limits() -> None:
    """Limits this process. Windows has none of these limits."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


if __name__ == "__main__":
    program = compile(sys.stdin.buffer.read(), "<program>", "exec")
    set_limits()
    exec(program, {"__name__": "__main__"})
    sys.exit(COMPLETED)
