"""Copies a GGUF file with its ``pop.*`` keys replaced; every other byte of keys and tensors stays as it was.

Also owns how every command here writes a file. What is written goes to ``<target>.part`` beside the target and is
renamed to the target when it is whole, so that the target is always the old file or the whole new one. The ``.part`` is
locked as long as its run lives. What a killed run has left is removed by the next run for the same target.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGUFValueType

from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import GGUFHeader, read_header
from pypop_gguf.gguf_files.metadata import PopMetadata

try:
    import fcntl
except ImportError:  # Windows has no such locks, and does not rename a file that is open.
    fcntl = None  # type: ignore[assignment]

_CHUNK_BYTES = 16 << 20


def part_path(target: Path, what: str = "") -> Path:
    """Returns where ``target``, or another file on the way to it, is written. See :func:`writing`."""
    return target.with_name(f"{target.name}.part-{what}" if what else f"{target.name}.part")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Gives this run alone the right to write ``target``, and yields the path to write to.

    Within the block, any ``part_path(target, what)`` may be written too. All of them are removed at the end of the
    block, unless :func:`replace_together` has made them targets.

    Raises:
        PopError: Another run writes the same target, or the directory is missing or cannot be written to.
    """
    if target.is_dir():
        raise PopError(f"cannot write {target}: it is a directory; give a file")
    part = part_path(target)
    try:
        file = _open_locked(part)
    except BlockingIOError as error:
        raise PopError(f"another run is writing {target}: wait until it has ended, or give another name") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PopError(
                f"cannot write {target}: a file beside it would have too long a name; give a shorter one"
            ) from error
        raise PopError(f"cannot write to {target.absolute().parent}: {error.strerror or error}") from error
    with contextlib.closing(file):
        try:
            if target.exists():
                _copy_permissions(target, part, stat.S_IWUSR)  # before the first byte: what is private stays private
            _remove_others(target)
            yield part
        finally:
            if _is_at(file, part):  # not renamed
                _remove_others(target)
                with contextlib.suppress(OSError):
                    part.unlink()


def _open_locked(part: Path) -> BinaryIO:
    """Creates ``part`` and locks it. What a killed run has left there is removed: its children may still write it.

    Raises:
        BlockingIOError: Another run has the lock.
    """
    while True:
        try:
            file: BinaryIO = part.open("xb")
            is_left = False
        except FileExistsError:
            try:
                file, is_left = part.open("rb+"), True
            except FileNotFoundError:  # The other run has ended meanwhile, or this is a link that leads nowhere.
                if part.is_symlink():
                    part.unlink(missing_ok=True)
                continue
        try:
            if fcntl is None:
                file.close()
            else:
                _lock(file)
            if _is_at(file, part):
                if not is_left:
                    return file
                part.unlink()
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # This file system has no locks, so nothing can tell whether another run is writing.


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Returns whether the open file is still the one at ``path``: another run may have renamed or removed it."""
    try:
        return file.closed or os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _remove_others(target: Path, keep: Collection[Path] = ()) -> None:
    """Removes the files on the way to ``target``, which only the run that has the lock may have.

    Their names cannot be those of another target's files, such as x.gguf.bak.part beside x.gguf.
    """
    for path in target.parent.glob(f"{glob.escape(target.name)}.part-*"):
        if path not in keep:
            with contextlib.suppress(OSError):
                path.unlink()


def replace_together(parts: Mapping[Path, Path], stale: Collection[Path] = ()) -> None:
    """Renames written files to their targets, given as target -> part, so that no old file is ever beside a new one.

    A file keeps the permissions of the one that it replaces; a new companion gets those of the first target. First all
    targets but the first are removed, then the files are renamed in their order. So whenever a run is killed,
    the first target has the companions that it came with, or none.

    Args:
        parts: The files, the first of them being the model.
        stale: Files that belong to what stood at the first target before. They are removed too.

    Raises:
        PopError: A file cannot be written to the disk or renamed.
    """
    first, *companions = parts
    for target, part in parts.items():
        with _naming(target), part.open("rb+") as file:
            _copy_permissions(target if target.exists() else parts[first], part)
            os.fsync(file)
    _remove_others(first, keep=parts.values())
    try:
        for target in {*companions, *stale}:
            with _naming(target):
                target.unlink(missing_ok=True)
        for target, part in parts.items():
            with _naming(target):
                os.replace(part, target)
    finally:
        for target in companions:
            with contextlib.suppress(OSError):
                parts[target].unlink(missing_ok=True)


def _copy_permissions(source: Path, target: Path, extra: int = 0) -> None:
    """Gives a file the owner, the mode with ``extra`` bits and the attributes of another one, as far as users may."""
    status = source.stat()
    with contextlib.suppress(OSError, AttributeError):  # Windows has no owners.
        os.chown(target, status.st_uid, status.st_gid)
    with contextlib.suppress(OSError):  # Some file systems have no modes to change.
        os.chmod(target, stat.S_IMODE(status.st_mode) | extra)
    with contextlib.suppress(OSError, AttributeError):  # Only Linux has these; access control lists are among them.
        for name in os.listxattr(source):
            os.setxattr(target, name, os.getxattr(source, name))


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a path to write to, and renames that file to ``target`` once the block has succeeded.

    Raises:
        PopError: As :func:`writing`, or the disk is full.
    """
    with writing(target) as part, _naming(target):
        yield part
        replace_together({target: part})


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PopError(f"cannot write {target}: {error.strerror or error}") from error


def check_free_space(directory: Path, needed: int) -> None:
    """Checks that there is space for a file before it is written.

    Args:
        directory: Where the file will be.
        needed: Its bytes.

    Raises:
        PopError: There is less space.
    """
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise PopError(f"cannot write to {directory}: {error.strerror or error}") from error
    if free < needed:
        raise PopError(f"not enough space in {directory}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def copy_with_metadata(
    source: Path, target: Path, metadata: PopMetadata, progress: Callable[[int, int], object] | None = None
) -> None:
    """Replaces ``target`` by a copy of ``source`` with these ``pop.*`` keys and no others.

    Args:
        source: A GGUF file; of a split one, the first shard.
        target: The file to replace, which may be ``source``. If this fails, it stays as it was.
        metadata: The keys to write.
        progress: Called with the bytes that are written and the bytes in all.

    Raises:
        PopError: The source cannot be read, or the target cannot be written.
    """
    with writing(target) as part:
        write_copy(source, target, metadata, progress)
        replace_together({target: part})


def write_copy(
    source: Path, target: Path, metadata: PopMetadata, progress: Callable[[int, int], object] | None = None
) -> None:
    """Writes the copy of :func:`copy_with_metadata` to ``part_path(target)``, within ``writing(target)``."""
    old_header = read_header(source)
    header = _build_header(old_header, metadata)
    total = len(header) + max(0, old_header.file_bytes - old_header.data_offset)
    check_free_space(target.absolute().parent, total)
    part = part_path(target)
    with _naming(target), source.open("rb") as old, part.open("wb") as new:
        if not target.exists():  # then its permissions are those of the source, as far as the umask allows
            with contextlib.suppress(OSError):
                os.chmod(part, stat.S_IMODE(part.stat().st_mode & source.stat().st_mode) | stat.S_IWUSR)
        new.write(header)
        old.seek(old_header.data_offset)
        while chunk := old.read(_CHUNK_BYTES):
            new.write(chunk)
            if progress:
                progress(new.tell(), total)


def _build_header(old: GGUFHeader, metadata: PopMetadata) -> bytes:
    """Returns everything before the tensor data, padded. Kept keys and tensor infos are copied as raw bytes."""
    kept = [field.raw for name, field in old.fields.items() if not name.startswith("pop.")]
    added = [_pack(old.order, *key_value) for key_value in metadata.key_values()]
    counts = struct.pack(f"{old.order}IQQ", old.version, old.n_tensors, len(kept) + len(added))
    header = b"".join([b"GGUF", counts, *kept, *added, old.tensor_infos])
    return header + bytes(-len(header) % old.alignment)


def _pack(order: str, key: str, value: Any, kind: GGUFValueType) -> bytes:
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
