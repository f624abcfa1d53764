"""The carried llama-cpp-python and the native library in it, loaded so that two builds never mix.

``_vendor/llama_cpp`` holds llama-cpp-python's Python files, its ``lib/`` our patched libraries; a ``.pth`` file puts
``_vendor`` at the end of ``sys.path``, so ``import llama_cpp`` finds it where no other llama-cpp-python is installed.
``load()`` prefers the carried one over an installed one, which is left alone, and refuses one that is already loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from cffi import FFI

from pypop_gguf import parent
from pypop_gguf.errors import PopError

_DECLARATIONS = """
    bool llama_pop_set_boundary(struct llama_context * ctx, int32_t boundary);
    bool llama_pop_set_ends(struct llama_context * ctx, int32_t n_head, int32_t n_tail);
    void llama_pop_set_sequence(struct llama_context * ctx, int32_t seq_id, bool prunes);
    void llama_pop_set_continuation(struct llama_context * ctx, bool continues);
    bool llama_pop_continues(const struct llama_context * ctx);
    int32_t llama_pop_get_boundary(const struct llama_context * ctx);
    uint64_t llama_pop_n_pruned(const struct llama_context * ctx);
    uint64_t llama_pop_n_pruned_in(const struct llama_context * ctx, int32_t seq_id);
    int64_t llama_pop_plan_us(const struct llama_context * ctx);
    double llama_pop_graph_flops(
        struct llama_context * ctx, int32_t boundary, int32_t n_tokens, int32_t n_seqs, int32_t n_outputs);
    int32_t llama_pop_n_layer(const struct llama_model * model);
    int32_t llama_pop_lossless_boundary(const struct llama_model * model);
    int32_t llama_pop_min_tokens(const struct llama_model * model);
    bool llama_pop_supports(const struct llama_model * model, int32_t boundary);
    struct llama_adapter_lora * llama_pop_adapter_init(struct llama_model * model, const char * path);
    int32_t llama_pop_adapter_boundary(const struct llama_adapter_lora * adapter);
    bool llama_pop_add_adapter(struct llama_context * ctx, struct llama_adapter_lora * adapter);
    void llama_pop_clear_adapters(struct llama_context * ctx);
    uint64_t llama_pop_fingerprint(const struct llama_model * model);
    const char * llama_pop_last_error(void);
"""

_ffi = FFI()
_ffi.cdef("struct llama_context; struct llama_model; struct llama_adapter_lora;" + _DECLARATIONS)
_native = None


def vendor_dir() -> Path:
    """The directory with the carried ``llama_cpp`` package and llama.cpp's converter.

    Raises:
        ImportError: The package is not installed (a bare source tree has no native part).
    """
    beside = Path(__file__).resolve().parent / "_vendor"
    if beside.is_dir():
        return beside
    # Run from the source tree or installed in place: the native part lies with the installed distribution.
    with contextlib.suppress(metadata.PackageNotFoundError):
        installed = Path(str(metadata.distribution("pypop-gguf").locate_file("pypop_gguf/_vendor")))
        if installed.is_dir():
            return installed
    raise ImportError("pypop_gguf has no native library here: install it with `pip install .` in the source tree")


def load() -> ModuleType:
    """Imports the carried ``llama_cpp`` and binds ``llama_pop_*``.

    Returns:
        The ``llama_cpp`` package; from now on ``import llama_cpp`` anywhere in this process gives the same one.

    Raises:
        ImportError: Another llama-cpp-python is already loaded, an environment variable points to another library, or the carried
            one is missing or damaged.
    """
    global _native
    if _native is not None:
        return sys.modules["llama_cpp"]

    vendor = vendor_dir()
    for variable in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"):
        path = os.environ.get(variable)
        if path and Path(path).resolve() != (vendor / "llama_cpp" / "lib").resolve():
            raise ImportError(f"{variable}={path} points to another llama.cpp library: unset it to use pypop_gguf")

    if "llama_cpp" not in sys.modules:
        sys.path.insert(0, str(vendor))
        try:
            importlib.import_module("llama_cpp")
        except (
            OSError,
            RuntimeError,
            AttributeError,
        ) as error:  # no file, not loadable, other functions than llama_cpp expects
            raise ImportError(_broken(vendor, str(error).splitlines()[0])) from error
        finally:
            sys.path.remove(str(vendor))
    module = sys.modules["llama_cpp"]
    library = parent.native_library(module)
    if not hasattr(library, "llama_pop_set_boundary"):
        if Path(module.__file__).parent == vendor / "llama_cpp":
            raise ImportError(_broken(vendor, "it is a build without POP"))
        raise ImportError(
            f"llama_cpp was already imported from {Path(module.__file__).parent}, a build without POP: put `from pypop_gguf "
            "import PopLlama` before `import llama_cpp`, or uninstall llama-cpp-python (pypop_gguf carries it)"
        )
    _native = _ffi.dlopen(parent.library_path(library))
    ggml = parent.ggml_library()
    if (
        ggml.ggml_backend_reg_count() == 0
    ):  # built with GGML_BACKEND_DL: variants for several processors, the best is taken
        with captured_log():  # else each process prints which
            ggml.ggml_backend_load_all_from_path(os.fsencode(vendor / "llama_cpp" / "lib"))
    return module


def _broken(vendor: Path, reason: str) -> str:
    library = vendor / "llama_cpp" / "lib"
    return f"the native library in {library} cannot be used ({reason}): build it again with `pip install .` in the source tree"


def _context(ctx: int):
    return _ffi.cast("struct llama_context *", ctx)


def _model(model: int):
    return _ffi.cast("struct llama_model *", model)


def _last_error() -> str:
    return _ffi.string(_native.llama_pop_last_error()).decode("utf-8", "replace")


def set_boundary(ctx: int, boundary: int) -> None:
    """Sets a context's boundary (1..L, L = off) from the next decode on.

    Raises:
        PopError: The model cannot be pruned there; the context keeps the boundary it had.
    """
    if not _native.llama_pop_set_boundary(_context(ctx), boundary):
        raise PopError(_last_error())


def add_adapter(ctx: int, model: int, path: str | os.PathLike) -> int:
    """Gives a context fitted K/V projections for the boundary that it returns.

    Raises:
        PopError: The file cannot be read, or is for another model.
    """
    adapter = _native.llama_pop_adapter_init(_model(model), os.fsencode(path))
    if adapter == _ffi.NULL:
        raise PopError(_last_error())
    if not _native.llama_pop_add_adapter(_context(ctx), adapter):
        raise PopError(f"{path}: {_last_error()}")
    return _native.llama_pop_adapter_boundary(adapter)


def clear_adapters(ctx: int) -> None:
    _native.llama_pop_clear_adapters(_context(ctx))


def fingerprint(path: str | os.PathLike) -> str:
    """Of a model file's norms: equal for all files of one model, however quantized.

    Raises:
        PopError: llama.cpp cannot load the file.
    """
    llama_cpp = load()
    with captured_log() as errors:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not model:
            raise PopError(load_failure(path, errors))
        try:
            return f"{_native.llama_pop_fingerprint(_model(model)):016x}"
        finally:
            llama_cpp.llama_model_free(model)


def set_ends(ctx: int, n_head: int, n_tail: int) -> None:
    """Which prompt tokens run every layer besides the last: the first ``n_head`` of each sequence, the last ``n_tail``.

    Raises:
        PopError: ``n_head`` is below 0 or ``n_tail`` below 1.
    """
    if not _native.llama_pop_set_ends(_context(ctx), n_head, n_tail):
        raise PopError(_last_error())


def set_continuation(ctx: int, continues: bool) -> None:
    """Whether tokens that ask for logits go on from the boundary (as from the start) or repeat the layers below it."""
    _native.llama_pop_set_continuation(_context(ctx), continues)


def continues(ctx: int) -> bool:
    """Whether they do go on at the boundary in force: not over recurrent states."""
    return _native.llama_pop_continues(_context(ctx))


def plan_ms(ctx: int) -> float:
    """Milliseconds spent on building and planning graphs since the context was made."""
    return _native.llama_pop_plan_us(_context(ctx)) / 1e3


def n_pruned(ctx: int) -> int:
    """Tokens that went through a pruned graph since the context was made."""
    return _native.llama_pop_n_pruned(_context(ctx))


def graph_flops(ctx: int, n_tokens: int, n_seqs: int, boundary: int, n_outputs: int) -> float:
    """Floating-point operations of one micro-batch's matrix products and attentions, counted from its real graph.

    Attention counts the whole context: size ``n_ctx`` to the prompt.

    Args:
        ctx: Context.
        n_tokens: Tokens of the micro-batch, over all sequences.
        n_seqs: Its sequences.
        boundary: 1..L; counts where ``n_outputs`` is 0, any other micro-batch runs the whole model.
        n_outputs: Tokens that ask for logits.
    """
    return _native.llama_pop_graph_flops(_context(ctx), boundary, n_tokens, n_seqs, n_outputs)


def n_layer(model: int) -> int:
    """Layers of the trunk, L."""
    return _native.llama_pop_n_layer(_model(model))


def lossless_boundary(model: int) -> int:
    """The last layer that writes to the cache."""
    return _native.llama_pop_lossless_boundary(_model(model))


def refusal(model: int, boundary: int = 1) -> str | None:
    """Why this model cannot be pruned at a boundary (1..L) as far as its architecture tells, or None."""
    return None if _native.llama_pop_supports(_model(model), boundary) else _last_error()


@contextlib.contextmanager
def captured_log():
    """Collects llama.cpp's log instead of printing it; yields the list of its error lines."""
    llama_cpp = load()
    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _user_data) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(parent.log_callback(llama_cpp), ctypes.c_void_p(0))


@dataclass(frozen=True)
class ModelSupport:
    """What POP can do with a model file.

    Attributes:
        architecture: ``general.architecture``.
        n_layer: Layers of the trunk, L, without multi-token-prediction layers.
        lossless_boundary: The last layer that writes to the cache; pruning there changes nothing.
        refusal: Why the model has no prefill to prune, or None.
    """

    architecture: str
    n_layer: int
    lossless_boundary: int
    refusal: str | None


def describe_model(path: str | os.PathLike) -> ModelSupport:
    """Asks llama.cpp about a model file without loading its weights.

    Raises:
        PopError: llama.cpp cannot load the file (unknown architecture, missing or damaged tensors).
    """
    llama_cpp = load()
    with captured_log() as errors:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.no_alloc = True
        parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not model:
            raise PopError(load_failure(path, errors))
        try:
            text = ctypes.create_string_buffer(128)
            llama_cpp.llama_model_meta_val_str(model, b"general.architecture", text, len(text))
            return ModelSupport(text.value.decode(), n_layer(model), lossless_boundary(model), refusal(model))
        finally:
            llama_cpp.llama_model_free(model)


def load_failure(path: str | os.PathLike, errors: list[str]) -> str:
    """One line from what llama.cpp logged while it failed to load ``path``."""
    # The first line is the cause; those after it say which callers gave up.
    reason = errors[0].split(": ", 1)[-1] if errors else "no reason given"
    return f"{path}: llama.cpp cannot load this model: {reason}"
