"""llama.cpp's log is captured for one thread at a time and never taken from whoever listens to it.

The lines of these tests are llama.cpp's own.
"""

import ctypes
import threading

import pytest

from pypop_gguf import PopError, PopLlama, library

llama_cpp = library.load()


def fail(path) -> None:
    """llama.cpp logs an error line that names the file."""
    assert not llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())


def log_state() -> tuple:
    callback, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(user_data))
    return callback, user_data


@pytest.fixture
def listen():
    """Sets a log callback of the user's; gives the list that it fills with (line, user data)."""
    before, kept = log_state(), []

    def start(user_data: int = 0) -> list:
        lines = []
        kept.append(llama_cpp.llama_log_callback(lambda level, text, data: lines.append((text.decode(), data or 0))))
        llama_cpp.llama_log_set(kept[-1], ctypes.c_void_p(user_data))
        return lines

    yield start
    llama_cpp.llama_log_set(*before)


def mentions(lines, name: str) -> bool:
    return any(name in (line if isinstance(line, str) else line[0]) for line in lines)


def test_users_callback_hears_the_lines_of_a_block_and_those_around_it(listen, tmp_path):
    heard = listen(user_data=7)
    fail(tmp_path / "before")
    with library.captured_log() as errors:
        fail(tmp_path / "inside")
    assert mentions(errors, "inside") and all("\n" not in error for error in errors)
    fail(tmp_path / "after")
    assert all(mentions(heard, name) for name in ("before", "inside", "after"))
    assert {data for _, data in heard} == {7}
    assert not mentions(errors, "after")


def test_callback_that_the_user_sets_later_replaces_the_earlier_one(listen, tmp_path):
    first = listen()
    with library.captured_log():
        pass
    second = listen()
    fail(tmp_path / "one")
    with library.captured_log():
        pass
    fail(tmp_path / "two")
    assert first == []
    assert mentions(second, "one") and mentions(second, "two")


def test_callback_that_the_user_sets_within_a_block_is_in_force_at_once(listen, tmp_path):
    with library.captured_log():
        heard = listen()
        fail(tmp_path / "inside")
    fail(tmp_path / "after")
    assert mentions(heard, "inside") and mentions(heard, "after")


def test_state_that_the_user_reads_and_sets_again_leads_to_the_same_callback(listen, tmp_path):
    first = listen()
    with library.captured_log():
        pass
    saved = log_state()
    second = listen()
    with library.captured_log():
        pass
    llama_cpp.llama_log_set(*saved)
    fail(tmp_path / "restored")
    assert mentions(first, "restored") and not mentions(second, "restored")


def test_blocks_within_blocks_have_lines_of_their_own(listen, tmp_path):
    heard = listen()
    with library.captured_log() as outer:
        with library.captured_log() as inner:
            fail(tmp_path / "deep")
        fail(tmp_path / "shallow")
    assert mentions(inner, "deep") and not mentions(inner, "shallow")
    assert mentions(outer, "shallow") and not mentions(outer, "deep")
    assert mentions(heard, "deep") and mentions(heard, "shallow")


def test_lines_of_a_block_are_not_printed(capfd, tmp_path):
    llama_cpp._logger.set_verbose(True)
    fail(tmp_path / "before")
    with library.captured_log():
        fail(tmp_path / "inside")
    llama_cpp._logger.set_verbose(False)
    printed = capfd.readouterr().err
    assert "before" in printed and "inside" not in printed


def test_silent_model_leaves_the_users_callback_in_force(listen, bundled_gguf, tmp_path):
    """A plain ``Llama`` tells it what loading logs, too."""
    heard = listen()
    llama_cpp.Llama(str(bundled_gguf), n_ctx=64, verbose=False).close()
    expected = sum("llama_model_loader" in line for line, _ in heard)
    heard.clear()
    PopLlama(str(bundled_gguf), n_ctx=64, verbose=False).close()
    assert sum("llama_model_loader" in line for line, _ in heard) == expected > 10
    (tmp_path / "bad.gguf").write_bytes(bundled_gguf.read_bytes()[:100_000])
    with pytest.raises(PopError):
        PopLlama(str(tmp_path / "bad.gguf"), n_ctx=64, verbose=False)
    fail(tmp_path / "after")
    assert mentions(heard, "after")


def test_two_threads_that_load_at_once_do_not_mix_their_lines(listen, tmp_path):
    heard, errors, together = listen(), {}, threading.Barrier(3)

    def load(name: str, captures: bool) -> None:
        for i in range(50):
            together.wait(60)
            if captures:
                with library.captured_log() as lines:
                    fail(tmp_path / f"{name}-{i}")
                errors[name, i] = lines
            else:
                fail(tmp_path / f"{name}-{i}")

    threads = [
        threading.Thread(target=load, args=arguments) for arguments in (("red", True), ("blue", True), ("loud", False))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 100
    for (name, i), lines in errors.items():
        assert mentions(lines, f"{name}-{i}'")
        assert not any(mentions(lines, other) for other in {"red-", "blue-", "loud-"} - {f"{name}-"}), lines
    assert all(mentions(heard, f"{name}-{i}'") for name in ("loud", "red", "blue") for i in range(50))


def test_model_that_cannot_be_described_is_refused_with_llama_cpps_reason(listen, tmp_path):
    heard = listen()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(PopError, match=r"llama\.cpp cannot load this model: "):
        library.describe_model(tmp_path / "bad.gguf")
    assert mentions(heard, "failed")
