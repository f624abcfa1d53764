"""Copies a GGUF file with its ``pop.*`` keys replaced; every other byte of keys and tensors stays as it was.

Called by the converter. Also owns ``replacing``, through which every tool here writes: beside the target, then renamed; and
``scratch``, the directory for that, which the next run removes where this one was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from gguf import GGUFValueType

from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import GGUFHeader, read_header
from pypop_gguf.gguf_files.metadata import PopMetadata

try:
    import fcntl
except ImportError:  # Windows, where a directory with an open file in it cannot be renamed
    fcntl = None

_CHUNK_BYTES = 16 << 20
_SCRATCH = ".pop-gguf-"
_LEFT = f"{_SCRATCH}left-"


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """Gives a directory inside ``directory`` for files on the way; gone with all that is in it when the block ends.

    A killed run cannot remove its own: each holds a lock as long as its run lives, and those without are removed here first.

    Raises:
        PopError: ``directory`` is missing or cannot be written to.
    """
    for path in directory.glob(f"{_SCRATCH}*"):
        _remove_if_left(path)
    try:
        made, lock = _make_locked(directory)
    except OSError as error:
        raise PopError(f"cannot write to {directory}: {error.strerror or error}") from error
    try:
        yield made
    finally:
        if not fcntl:
            lock.close()
        with contextlib.suppress(OSError):
            _remove(made)
        lock.close()


def _make_locked(directory: Path) -> tuple[Path, BinaryIO]:
    while True:
        made = Path(tempfile.mkdtemp(dir=directory, prefix=_SCRATCH))
        try:
            lock = (made / "lock").open("xb")
        except FileNotFoundError:  # another run took it for a dead one's before it had its lock
            continue
        except OSError:
            made.rmdir()
            raise
        if fcntl:
            with contextlib.suppress(
                OSError
            ):  # a file system without locks: then nobody can tell when this run is over
                fcntl.flock(lock, fcntl.LOCK_EX)
        if (made / "lock").exists():
            return made, lock
        lock.close()


def _remove_if_left(directory: Path) -> None:
    with contextlib.suppress(OSError):
        if directory.name.startswith(_LEFT):
            shutil.rmtree(directory)
        elif not (directory / "lock").exists():
            directory.rmdir()  # empty: its run was killed before it had its lock, or makes another
        else:
            with (directory / "lock").open("r+b") as lock:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where its run lives
                    _remove(directory)
            if not fcntl:
                _remove(directory)
            print(f"removed {directory}, which a killed run left", file=sys.stderr)


def _remove(directory: Path) -> None:
    """Removes it under a name that says that no run needs it, so that the next one can go on where this one is killed."""
    left = directory.with_name(_LEFT + directory.name.removeprefix(_SCRATCH))
    directory.rename(left)
    shutil.rmtree(left)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Gives a path to write to on the same file system, and renames it to ``target`` once the block has succeeded.

    Raises:
        PopError: The directory is missing or cannot be written to, or the disk is full.
    """
    with scratch(target.absolute().parent) as directory:
        beside = directory / target.name
        try:
            yield beside
            os.replace(beside, target)
        except OSError as error:
            raise PopError(f"cannot write {target}: {error.strerror or error}") from error


def adapter_path(model: Path, boundary: int) -> Path:
    """Where ``PopLlama`` looks for the adapter of a model file."""
    return model.with_name(f"{model.stem}.pop-b{boundary}.gguf")


def check_free_space(directory: Path, needed: int) -> None:
    """Refuses before anything is written what will not fit.

    Args:
        directory: Where to write.
        needed: Bytes.

    Raises:
        PopError: There is less.
    """
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise PopError(f"cannot write to {directory}: {error.strerror or error}") from error
    if free < needed:
        raise PopError(f"not enough space in {directory}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def copy_with_metadata(
    source: Path, target: Path, metadata: PopMetadata, progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes ``target`` as ``source`` with these ``pop.*`` keys and no others. The two may be the same file.

    Args:
        source: A GGUF file; of a split one, the first shard.
        target: Replaced as a whole, or left alone.
        metadata: What to write.
        progress: Called with bytes written and bytes in all.

    Raises:
        PopError: The source cannot be read, or the target not written.
    """
    old_header = read_header(source)
    header = _header(old_header, metadata)
    total = len(header) + max(0, old_header.file_bytes - old_header.data_offset)
    check_free_space(target.parent, total)
    with replacing(target) as beside, source.open("rb") as old, beside.open("xb") as new:
        new.write(header)
        old.seek(old_header.data_offset)
        while chunk := old.read(_CHUNK_BYTES):
            new.write(chunk)
            if progress:
                progress(new.tell(), total)
        new.flush()
        os.fsync(new.fileno())


def _header(old: GGUFHeader, metadata: PopMetadata) -> bytes:
    """All that stands before the tensor data, padded. Kept keys and tensor infos are copied as raw bytes."""
    kept = [field.raw for name, field in old.fields.items() if not name.startswith("pop.")]
    added = [_packed(old.order, *key_value) for key_value in metadata.key_values()]
    counts = struct.pack(f"{old.order}IQQ", old.version, old.n_tensors, len(kept) + len(added))
    header = b"".join([b"GGUF", counts, *kept, *added, old.tensor_infos])
    return header + bytes(-len(header) % old.alignment)


def _packed(order: str, key: str, value, kind: GGUFValueType) -> bytes:
    def text(string: str) -> bytes:
        raw = string.encode()
        return struct.pack(f"{order}Q", len(raw)) + raw

    head = text(key) + struct.pack(f"{order}I", kind)
    if kind == GGUFValueType.STRING:
        return head + text(value)
    if kind == GGUFValueType.ARRAY:
        integers = all(isinstance(item, int) for item in value)
        kind, code = (GGUFValueType.UINT32, "I") if integers else (GGUFValueType.FLOAT32, "f")
        return head + struct.pack(f"{order}IQ{len(value)}{code}", kind, len(value), *value)
    return head + struct.pack(f"{order}I", value)
