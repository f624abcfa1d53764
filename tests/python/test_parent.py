"""The private parts of llama-cpp-python that the package uses: all stand in ``parent.py``, and each of them exists.

Where this fails after the pinned llama-cpp-python has moved, third_party/README.md says what each name is used for.
"""

import ast
import gc
import inspect
import weakref
from pathlib import Path

import llama_cpp
import pytest
from llama_cpp.llama_chat_format import Llava15ChatHandler, MTMDChatHandler

import pypop_gguf
from pypop_gguf import PopError, PopLlama, images, parent
from pypop_gguf.cache_record import CacheRecord
from pypop_gguf.call import Call

PACKAGE = Path(pypop_gguf.__file__).parent
PARENT = PACKAGE / "parent.py"
OPTIONS = dict(n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(path: Path, of_self: bool) -> set[str]:
    """The private attributes that a file uses of ``self``, or those of all else and llama_cpp's private modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")) == of_self:
                found.add(node.attr)
        elif not of_self and isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found |= {module for module in modules if module.startswith("llama_cpp._")}
    return found


@pytest.fixture(scope="module")
def plain(bundled_gguf):
    llm = llama_cpp.Llama(str(bundled_gguf), **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture(params=[MTMDChatHandler, Llava15ChatHandler])
def handler(request, tmp_path):
    """A handler that never reads: its projector is an empty file."""
    (tmp_path / "mmproj.gguf").touch()
    return request.param(str(tmp_path / "mmproj.gguf"), verbose=False)


def test_every_private_name_exists(plain, handler):
    owners = {
        "_lib": llama_cpp.llama_cpp,
        "_name": llama_cpp.llama_cpp._lib,
        "_logger": llama_cpp,
        "_stack": plain,
        "_requires_eval": plain,
        "_seed": plain,
        "_batch": plain,
        "_ctx": plain,
        "_model": plain,
        "_mtmd_cpp": handler,
        "_init_mtmd_context": handler,
    }
    own = {"_below"}  # of parent.Overlay
    assert private_names(PARENT, of_self=False) - own == set(owners)
    assert [name for name, owner in owners.items() if not hasattr(owner, name)] == []
    # What is public in an object that is private.
    for owner, names in {
        plain._batch: ("set_batch", "batch"),
        plain._ctx: ("decode", "kv_cache_seq_rm", "kv_cache_clear"),
        llama_cpp._logger: ("llama_log_callback",),
        handler._mtmd_cpp: ("mtmd_helper_log_set", "mtmd_tokenize", "mtmd_helper_eval_chunk_single"),
    }.items():
        assert [name for name in names if not hasattr(owner, name)] == []
    assert parent.ggml_library().ggml_backend_reg_count() > 0


def test_no_other_file_uses_private_names():
    names = {path: private_names(path, of_self=False) for path in PACKAGE.rglob("*.py") if path != PARENT}
    found = {path.relative_to(PACKAGE).as_posix(): used for path, used in names.items() if used}
    assert found == {"bench/worker.py": {"_lib"}}  # it runs stock llama.cpp too, in a process without this package


def test_subclasses_neither_use_nor_hide_private_names_of_their_parent(plain):
    theirs = {name for name in {*dir(plain), *vars(plain)} if is_private(name)}
    assert len(theirs) > 20
    layers = PopLlama.__mro__[: PopLlama.__mro__.index(llama_cpp.Llama)]
    assert len(layers) == 3
    for layer in layers:
        ours = private_names(Path(inspect.getfile(layer)), of_self=True)
        ours |= {name for name in vars(layer) if is_private(name)}
        assert ours & theirs == set() and len(ours) > 10


# Stand-ins for chat handlers


class Talkative(MTMDChatHandler):
    """A user's handler with a method that calls its parent's, and state of its own."""

    def _init_mtmd_context(self, llama_model):
        super()._init_mtmd_context(llama_model)

    def greet(self):
        self.greeted = getattr(self, "greeted", 0) + 1
        return self._mtmd_cpp.mtmd_default_marker()


def test_stand_in_shares_the_handlers_state_and_replaces_nothing(tmp_path):
    (tmp_path / "mmproj.gguf").touch()
    handler = Talkative(str(tmp_path / "mmproj.gguf"), verbose=False)
    module, before = handler._mtmd_cpp, dict(vars(handler))
    with parent.handler_with(handler, mtmd_default_marker=lambda: b"ours") as stand_in:
        assert isinstance(stand_in, Talkative) and stand_in.greet() == b"ours"
        assert stand_in._mtmd_cpp.mtmd_tokenize is module.mtmd_tokenize
        assert vars(handler) == {**before, "greeted": 1} and handler._mtmd_cpp is module
    assert stand_in.greet() == handler.greet() == module.mtmd_default_marker() != b"ours"
    assert handler.greeted == 3


def test_overlay_gives_its_own_attributes_and_passes_all_others_on():
    class Model:
        n_tokens, n_batch = 3, 7

        def reset(self):
            self.n_tokens = 0

    model = Model()
    overlay = parent.Overlay(model, reset=lambda: "ours")
    overlay.n_tokens = 5
    assert (model.n_tokens, overlay.n_tokens, overlay.n_batch, overlay.reset()) == (5, 5, 7, "ours")
    model.reset()
    assert overlay.n_tokens == 0
    with pytest.raises(AttributeError, match="'Model' object has no attribute 'foo'"):
        _ = overlay.foo


@pytest.fixture
def open_model(bundled_gguf, tmp_path, monkeypatch):
    """Opens a model whose handler has no projector to load."""
    (tmp_path / "mmproj.gguf").touch()
    monkeypatch.setattr(Talkative, "_init_mtmd_context", lambda self, llm: None)
    handler = Talkative(str(tmp_path / "mmproj.gguf"), verbose=False)
    return lambda: PopLlama(str(bundled_gguf), pop=False, chat_handler=handler, **OPTIONS)


def begin_reading(llm):
    return images.reading(llm, Call(12), CacheRecord(64, 12, 11), llm.reset)


def test_handler_that_is_reading_is_refused_and_is_free_afterwards(open_model):
    model = open_model()
    handler, module = model.chat_handler, model.chat_handler._mtmd_cpp
    with begin_reading(model) as stand_in:
        assert stand_in.chat_handler is not handler and model.chat_handler is handler
        with pytest.raises(PopError, match=r"^this chat handler is reading another prompt: "), begin_reading(model):
            pass
    with pytest.raises(RuntimeError, match="in the handler"), begin_reading(model):
        raise RuntimeError("in the handler")
    with begin_reading(model):
        pass
    assert model.chat_handler is handler and handler._mtmd_cpp is module
    model.close()


def test_reading_leaves_nothing_that_holds_the_model(open_model):
    """Its memory is free at once, not when the garbage collector comes by."""
    gc.disable()
    try:
        model = open_model()
        with begin_reading(model) as stand_in:
            assert stand_in.n_ctx() == model.n_ctx()
        alive, handler = weakref.ref(model), model.chat_handler
        del model, stand_in
        assert alive() is None and handler.greet()
    finally:
        gc.enable()
