"""The carried llama-cpp-python and the native library in it, loaded so that two builds never mix.

``_vendor/llama_cpp`` holds llama-cpp-python's Python files, its ``lib/`` our patched libraries. A ``.pth`` file puts
``_vendor`` at the end of ``sys.path``, so ``import llama_cpp`` finds it where no other llama-cpp-python is installed.
``load()`` prefers the carried one over an installed one, which is left alone, and refuses one that is already loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from pypop_gguf import parent
from pypop_gguf.errors import PopError


def vendor_dir() -> Path:
    """Returns the directory with the carried ``llama_cpp`` package and llama.cpp's converter.

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


_loaded: ModuleType | None = None
_loading = threading.RLock()


def load() -> ModuleType:
    """Imports the carried ``llama_cpp``.

    Returns:
        The ``llama_cpp`` package. From now on ``import llama_cpp`` anywhere in this process gives the same one.

    Raises:
        ImportError: Another llama-cpp-python is already loaded, an environment variable points to another library, or
            the carried one is missing or damaged.
    """
    with _loading:  # Python's lock of imports does not cover what follows the import.
        return _loaded or _load()


def _load() -> ModuleType:
    global _loaded
    vendor = vendor_dir()
    for variable in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"):
        path = os.environ.get(variable)
        if path and Path(path).resolve() != (vendor / "llama_cpp" / "lib").resolve():
            raise ImportError(f"{variable}={path} points to another llama.cpp library: unset it to use pypop_gguf")

    if "llama_cpp" not in sys.modules:
        sys.path.insert(0, str(vendor))
        try:
            importlib.import_module("llama_cpp")
        except (OSError, RuntimeError, AttributeError) as error:  # a file is missing, damaged, or has other functions
            raise ImportError(_broken(vendor, str(error).splitlines()[0])) from error
        finally:
            sys.path.remove(str(vendor))
    module = sys.modules["llama_cpp"]
    if not hasattr(parent.native_library(module), "llama_pop_open"):
        origin = Path(str(module.__file__)).parent
        if origin == vendor / "llama_cpp":
            raise ImportError(_broken(vendor, "it is a build without POP"))
        raise ImportError(
            f"llama_cpp was already imported from {origin}, a build without POP: put "
            "`from pypop_gguf import PopLlama` before `import llama_cpp`, or uninstall llama-cpp-python "
            "(pypop_gguf carries it)"
        )
    _loaded = module
    ggml = parent.ggml_library()
    with captured_log():  # also installs the log callback
        if ggml.ggml_backend_reg_count() == 0:  # built with GGML_BACKEND_DL: the best of several variants is loaded
            ggml.ggml_backend_load_all_from_path(os.fsencode(vendor / "llama_cpp" / "lib"))  # logs which one
    return module


def _broken(vendor: Path, reason: str) -> str:
    library = vendor / "llama_cpp" / "lib"
    advice = "build it again with `pip install .` in the source tree"
    if missing := re.search(r"(lib(cuda|cublas|vulkan|amdhip|hipblas|rocblas)\S*): cannot open", reason):
        reason = f"it was built for a graphics device, and {missing[1]} is missing"
        advice = f"install the driver and the libraries of the device, or {advice}"
    return f"the native library in {library} cannot be used ({reason}): {advice}"


# The log
#
# llama.cpp has one log callback for the whole process. Ours is installed when the library is loaded and stays: it keeps
# the error lines of threads that capture, and passes all lines on to the callback that it has replaced. Only
# llama-cpp-python's own callback, which prints, does not get what a thread captures. Where somebody sets a callback
# later, the next capture puts ours before that one.

_ERROR = 4  # GGML_LOG_LEVEL_ERROR

_capturing = threading.local()
_installing = threading.Lock()
# The replaced callbacks with their user data. Ours gets the index of the one to call as its user data, so that it still
# calls the right one if somebody who has read it by llama_log_get() sets it again.
_replaced: list[tuple] = []
_callback = None


def _on_log(level: int, text: bytes, index: int | None) -> None:
    captures = getattr(_capturing, "stack", None)
    if captures and level == _ERROR:
        captures[-1].append(text.decode("utf-8", "replace").strip())
    # another index: a callback that was set at this moment, whose user data came with it
    callback, user_data = _replaced[index or 0] if (index or 0) < len(_replaced) else _replaced[-1]
    if not captures or _address(callback) != _address(parent.log_callback(load())):
        callback(level, text, user_data)


def _install_callback() -> None:
    global _callback
    llama_cpp = load()
    with _installing:
        if _callback is None:
            _callback = llama_cpp.llama_log_callback(_on_log)
        current, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(current), ctypes.byref(user_data))
        if _address(current) == _address(_callback):
            return
        entry = _address(current), user_data.value
        known = [(_address(callback), data) for callback, data in _replaced]
        if entry not in known:
            _replaced.append((current, user_data.value))
            known.append(entry)
        llama_cpp.llama_log_set(_callback, ctypes.c_void_p(known.index(entry)))


def _address(callback) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """Keeps what llama.cpp logs on this thread from being printed; yields the list of its error lines."""
    _install_callback()
    stack = _capturing.__dict__.setdefault("stack", [])
    errors: list[str] = []
    stack.append(errors)
    try:
        yield errors
    finally:
        stack.pop()


# Model files


@dataclass(frozen=True)
class ModelSupport:
    """The properties of a model file that decide how POP can prune it.

    Attributes:
        architecture: ``general.architecture``.
        n_layer: Number of layers, L, without those for multi-token prediction.
        lossless_boundary: The last layer that writes to the cache. Pruning there changes nothing.
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
    from pypop_gguf import native  # it imports this module

    llama_cpp = load()
    with _opened_model(path, no_alloc=True, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE) as model:
        text = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_meta_val_str(model, b"general.architecture", text, len(text))
        return ModelSupport(
            text.value.decode(), native.n_layer(model), native.lossless_boundary(model), native.refusal(model)
        )


def fingerprint(path: str | os.PathLike) -> str:
    """Returns a hash of a model file's norm weights, in hexadecimal. It is the same for all quantizations of a model.

    Raises:
        PopError: llama.cpp cannot load the file.
    """
    from pypop_gguf import native  # it imports this module

    with _opened_model(path, n_gpu_layers=0) as model:
        return f"{native.fingerprint(model):016x}"


@contextlib.contextmanager
def _opened_model(path: str | os.PathLike, **parameters) -> Iterator[int]:
    llama_cpp = load()
    with captured_log() as errors:
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        for name, value in parameters.items():
            setattr(model_parameters, name, value)
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_parameters)
        if not model:
            raise PopError(load_failure(path, errors))
        try:
            yield model
        finally:
            llama_cpp.llama_model_free(model)


def load_failure(path: str | os.PathLike, errors: list[str]) -> str:
    """Makes one line of what llama.cpp logged while it failed to load ``path``."""
    # The first line is the cause; those after it say which callers gave up.
    reason = errors[0].split(": ", 1)[-1] if errors else "no reason given"
    on_device = any(re.search(r"failed to allocate (?!CPU)\S+ buffer", error) for error in errors)
    advice = "; put fewer layers on the GPU (--gpu-layers, n_gpu_layers)" if on_device else ""
    return f"{path}: llama.cpp cannot load this model: {reason}{advice}"
