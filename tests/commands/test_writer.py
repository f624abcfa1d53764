"""A copy with other pop.* keys keeps everything else byte for byte, also in files that are out of the ordinary."""

import contextlib
import os
import stat
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest

from pypop_gguf import PopError, PopLlama, cli
from pypop_gguf.gguf_files.metadata import PopMetadata, read_metadata
from pypop_gguf.gguf_files.writer import (
    check_free_space,
    copy_with_metadata,
    part_path,
    replace_together,
    replacing,
    writing,
)
from tests.support.gguf_files import (
    ARRAY,
    FLOAT32,
    STRING,
    UINT32,
    insert_raw_key,
    raw_keys,
    raw_tensors,
    write_keys,
    write_model,
)

SCORES = np.array([5, 4, 3, 2, 1, 0], dtype=np.float32)
METADATA = PopMetadata(
    boundary=4, importance_prefill=SCORES, importance_decode=SCORES + 1, calibration_source="bundled"
)


def assert_kept(source_keys, source_tensors, target):
    assert raw_keys(target) == source_keys
    assert raw_tensors(target) == source_tensors
    reader = gguf.GGUFReader(target)
    assert reader.data_offset % reader.alignment == 0
    assert [tensor.name for tensor in reader.tensors] == list(source_tensors)


def test_copy_keeps_every_tensor_byte_and_every_other_key(bundled_gguf, tmp_path):
    target = tmp_path / "copy.gguf"
    before = bundled_gguf.read_bytes()
    copy_with_metadata(bundled_gguf, target, PopMetadata(boundary=8))
    assert_kept(raw_keys(bundled_gguf), raw_tensors(bundled_gguf), target)
    assert list(raw_keys(target)) == list(raw_keys(bundled_gguf))  # in their order
    assert gguf.GGUFReader(target).get_field("general.architecture").contents() == "llama"
    assert bundled_gguf.read_bytes() == before
    assert read_metadata(target).boundary == 8


@pytest.mark.parametrize(
    "keys",
    [
        [("general.alignment", 64, UINT32)],
        [("general.alignment", 8, UINT32)],
        [("made.up", [0.5, -1.5], ARRAY, FLOAT32), ("general.tags", ["a", "", "ß" * 33], ARRAY, STRING)],
    ],
    ids=["alignment 64", "alignment 8", "arrays"],
)
def test_copy_keeps_alignment_and_arrays(tmp_path, keys):
    source, target = write_model(tmp_path / "a.gguf", *keys), tmp_path / "b.gguf"
    copy_with_metadata(source, target, METADATA)
    assert_kept(raw_keys(source), raw_tensors(source), target)
    assert PopLlama(str(target), n_ctx=32, verbose=False).pop.boundary == 4


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ARRAY, struct.pack("<IQ", STRING, 0)),
        (ARRAY, struct.pack("<IQIQI", ARRAY, 1, UINT32, 1, 7)),
        (gguf.GGUFValueType.FLOAT64, struct.pack("<d", 0.1)),
        (gguf.GGUFValueType.UINT8, b"\x07"),
    ],
    ids=["empty array", "nested array", "float64", "uint8"],
)
def test_copy_keeps_keys_of_rare_types(tmp_path, kind, value):
    source, target = write_model(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    insert_raw_key(source, "made.up", kind, value)
    copy_with_metadata(source, target, METADATA)
    assert_kept(raw_keys(source), raw_tensors(source), target)
    assert raw_keys(target)["made.up"].endswith(struct.pack("<I", kind) + value)


def test_copy_onto_itself_keeps_the_rest(tmp_path):
    path = write_model(tmp_path / "a.gguf")
    keys, tensors = raw_keys(path), raw_tensors(path)
    copy_with_metadata(path, path, METADATA)
    assert_kept(keys, tensors, path)
    assert read_metadata(path).boundary == 4
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_second_run_replaces_the_pop_keys(tmp_path):
    path = write_model(tmp_path / "a.gguf", ("pop.colour", "red", STRING))
    copy_with_metadata(path, path, METADATA)
    copy_with_metadata(path, path, PopMetadata(boundary=2))
    assert read_metadata(path) == PopMetadata(boundary=2)
    assert "pop.colour" not in gguf.GGUFReader(path).fields


def test_two_runs_write_the_same_bytes(tmp_path):
    source = write_model(tmp_path / "a.gguf")
    copy_with_metadata(source, tmp_path / "b.gguf", METADATA)
    copy_with_metadata(tmp_path / "b.gguf", tmp_path / "c.gguf", METADATA)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_big_endian_copy_stays_big_endian(tmp_path):
    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_model(source, ("made.up", [1.5, 2.5], ARRAY, FLOAT32), endianess=gguf.GGUFEndian.BIG)
    copy_with_metadata(source, target, METADATA)
    assert_kept(raw_keys(source), raw_tensors(source), target)
    assert target.read_bytes()[4:8] == struct.pack(">I", 3)
    found = read_metadata(target)
    assert (found.boundary, found.calibration_source) == (4, "bundled")
    np.testing.assert_array_equal(found.importance_prefill, SCORES)


def test_file_without_tensors_is_copied(tmp_path):
    source, target = write_keys(tmp_path / "a.gguf", n_layer=6), tmp_path / "b.gguf"
    copy_with_metadata(source, target, METADATA)
    assert_kept(raw_keys(source), {}, target)
    assert read_metadata(target).boundary == 4


def test_split_model_gets_its_keys_in_the_first_shard_only(tmp_path):
    write_model(tmp_path / "m", split_max_tensors=30)
    shards = sorted(tmp_path.iterdir())
    assert [shard.name for shard in shards] == [f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    other, keys, tensors = shards[1].read_bytes(), raw_keys(shards[0]), raw_tensors(shards[0])
    assert cli.main(["convert", str(shards[0]), "--outfile", str(shards[0])]) == 0
    assert_kept(keys, tensors, shards[0])
    assert shards[1].read_bytes() == other
    llm = PopLlama(str(shards[0]), n_ctx=32, verbose=False)
    assert (llm.pop.boundary, llm.pop.source) == (4, "file")


def test_split_model_quantizes_to_one_file(tmp_path):
    write_model(tmp_path / "m", split_max_tensors=30)
    target = tmp_path / "whole.gguf"
    assert (
        cli.main(["convert", str(tmp_path / "m-00001-of-00002.gguf"), "--outtype", "q8_0", "--outfile", str(target)])
        == 0
    )
    assert PopLlama(str(target), n_ctx=32, verbose=False).pop.boundary == 4


def test_split_model_refuses_a_name_that_llama_cpp_would_not_load(tmp_path, capfd):
    write_model(tmp_path / "m", split_max_tensors=30)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["convert", str(before[0])]) == 1
    assert "is split: give --outfile" in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_space_is_checked_before_anything_is_written(tmp_path):
    check_free_space(tmp_path, 1)
    with pytest.raises(PopError, match=r"not enough space in .*: 1000000000\.00 GB needed, .* GB free"):
        check_free_space(tmp_path, 10**18)


def test_run_leaves_files_of_other_targets_alone(tmp_path):
    """Their names begin with the name of this target."""
    others = {tmp_path / name: name for name in ("x.gguf.001.part", "x.gguf.bak", "x.gguf.zip.part")}
    for path, text in others.items():
        path.write_text(text)
    with writing(tmp_path / "x.gguf.bak") as other:
        other.write_text("half")
        with replacing(tmp_path / "x.gguf") as part:
            part.write_text("whole")
        assert other.read_text() == "half"
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {**others, tmp_path / "x.gguf": "whole"}


def test_system_without_locks_writes_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr("pypop_gguf.gguf_files.writer.fcntl", None)
    with replacing(tmp_path / "x.gguf") as part:
        part.write_text("whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a permission on Windows")
def test_link_that_leads_nowhere_is_removed_like_what_a_killed_run_has_left(tmp_path):
    """It runs in a process of its own, which can be stopped if it does not end."""
    (tmp_path / "x.gguf.part").symlink_to(tmp_path / "nowhere")
    code = "import sys; from pathlib import Path; from pypop_gguf.gguf_files.writer import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as part: part.write_text('whole')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.gguf")], check=True, timeout=60)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_file_that_is_replaced_keeps_its_permissions(tmp_path, mode):
    path = write_model(tmp_path / "a.gguf")
    path.chmod(mode)
    with contextlib.suppress(OSError, AttributeError):  # not every file system has them
        os.setxattr(path, "user.colour", b"red")
    before = path.stat(), _attributes(path)
    seen = []
    copy_with_metadata(path, path, METADATA, lambda *_: seen.append((tmp_path / "a.gguf.part").stat().st_mode & 0o077))
    after = path.stat()
    assert stat.S_IMODE(after.st_mode) == mode and (after.st_uid, after.st_gid) == (before[0].st_uid, before[0].st_gid)
    assert _attributes(path) == before[1]
    assert seen and {bits | mode for bits in seen} == {mode}  # nobody else could read it meanwhile
    assert read_metadata(path).boundary == 4


def _attributes(path):
    return {name: os.getxattr(path, name) for name in os.listxattr(path)} if hasattr(os, "listxattr") else {}


def test_copy_and_adapter_of_a_private_model_are_private(tmp_path):
    source, target = write_model(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    source.chmod(0o600)
    copy_with_metadata(source, target, METADATA)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    adapter = tmp_path / "b.pop-b4.gguf"
    with writing(target) as part:
        part.write_bytes(target.read_bytes())
        part_path(target, "adapter").write_bytes(b"new")
        replace_together({target: part, adapter: part_path(target, "adapter")})
    assert stat.S_IMODE(adapter.stat().st_mode) == 0o600 and adapter.read_bytes() == b"new"


def test_copy_of_a_public_model_has_the_permissions_of_a_new_file(tmp_path):
    source = write_model(tmp_path / "a.gguf")
    (tmp_path / "new").touch()
    source.chmod(0o666)
    copy_with_metadata(source, tmp_path / "b.gguf", METADATA)
    assert (tmp_path / "b.gguf").stat().st_mode == (tmp_path / "new").stat().st_mode
