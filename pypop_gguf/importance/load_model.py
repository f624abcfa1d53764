"""Load a model and its tokenizer from what users have: a Hugging Face directory, a hub id or a GGUF file.

The commands call this before they estimate layer importance. Whatever goes wrong ends in a
``PopError``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pypop_gguf.errors import PopError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEVICES = ("auto", "cpu", "cuda", "mps")
_INSTALL = "pip install '.[convert]' in the source tree"


def load_for_importance(
    path_or_hub_id: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model, also one nested in a vision-language model, ready for ``compute_importance``.

    Args:
        path_or_hub_id: A directory with config.json, safetensors weights and a tokenizer; a hub id; or a GGUF file of
            an architecture that Transformers can read.
        device: The device to load to. ``"auto"`` takes CUDA, else MPS, else the CPU.
        dtype: The type of the weights. ``"auto"`` is the checkpoint's own type, except on the CPU, where it is float32
            because the CPU is slow at the other types.
        trust_remote_code: Whether to run Python code that comes with the model.

    Returns:
        The model, in evaluation mode and without gradients for its weights, and its tokenizer.

    Raises:
        PopError: There is no model, its weights are incomplete or not safetensors, it is no causal language model, the
            device is not available, the GPU has too little memory, or torch or transformers is not installed.
    """
    if device not in _DEVICES:
        raise PopError(f"device is {device!r}; use one of {', '.join(_DEVICES)}")
    if dtype not in _DTYPES:
        raise PopError(f"dtype is {dtype!r}; use one of {', '.join(_DTYPES)}")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise PopError(f"importance needs torch and transformers ({error}); {_INSTALL}") from error

    torch_device = _resolve_device(device)
    name = str(path_or_hub_id)
    source, gguf = _resolve_source(path_or_hub_id)
    if dtype == "auto" and torch_device.type == "cpu":
        dtype = "float32"
    options = {**gguf, "trust_remote_code": trust_remote_code}

    with _errors_as_pop_error(name, bool(gguf)):
        config = transformers.AutoConfig.from_pretrained(source, **options)
        auto_class = _choose_auto_class(name, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        # Transformers dequantizes a GGUF file itself, so there are no safetensors to insist on.
        weights = {} if gguf else {"use_safetensors": True}
        model, report = auto_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **weights, **options)
    if report["missing_keys"]:  # Transformers fills missing weights with random numbers.
        raise PopError(
            f"{name} lacks {len(report['missing_keys'])} weights of {type(model).__name__}, "
            f"e.g. {min(report['missing_keys'])}; give a complete causal language model"
        )
    try:
        model = model.to(torch_device).eval().requires_grad_(False)
    except torch.cuda.OutOfMemoryError as error:
        raise PopError(f"{name} does not fit into GPU memory; use bfloat16 or the CPU") from error
    _check_causal(name, model)
    return model, tokenizer


def _resolve_device(device: str) -> torch.device:
    """Return the torch device of this name, or the best available one for ``"auto"``.

    Raises:
        PopError: The device is not available.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(kind for kind, present in available.items() if present)
    if not available[device]:
        raise PopError(f"device {device} is not available to torch; use cpu or auto")
    return torch.device(device)


def _resolve_source(path_or_hub_id: str | Path) -> tuple[str, dict[str, str]]:
    """Return the path or hub id to give to ``from_pretrained``, and its ``gguf_file`` option for a GGUF file.

    Raises:
        PopError: The path does not exist or holds no model.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PopError(f"{path} has no config.json; give a Hugging Face model directory")
        return str(path), {}
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise PopError(f"{path} is not a .gguf file; give a model directory, a hub id or a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    # A hub id is "name" or "owner/name". Anything else can only be meant as a path.
    parts = str(path_or_hub_id).split("/")
    is_hub_id = isinstance(path_or_hub_id, str) and len(parts) <= 2 and all(parts) and "\\" not in path_or_hub_id
    if not is_hub_id or parts[0] in (".", "..", "~") or path.suffix.lower() == ".gguf":
        raise PopError(f"{path_or_hub_id} does not exist; give a model directory, a hub id or a .gguf file")
    return str(path_or_hub_id), {}


@contextmanager
def _errors_as_pop_error(name: str, is_gguf: bool) -> Iterator[None]:
    """Turn any error of loading into a PopError of one line; Transformers raises errors of nearly every type."""
    try:
        yield
    except PopError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"cannot load {name}: {lines[0].rstrip('.') if lines else type(error).__name__}"
        if is_gguf:
            advice = "importance is optional for a GGUF file, so leave it out"
        elif "safetensors" in reason:
            advice = "only safetensors weights are read, convert the checkpoint to them"
        else:
            advice = "give a complete model directory, a hub id or a .gguf file"
        raise PopError(f"{reason}; {advice}") from error


def _choose_auto_class(name: str, config: Any) -> Any:
    """Return the class of Transformers that loads a model of this configuration.

    Raises:
        PopError: The configuration is not that of a causal language model.
    """
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise PopError(f"{name} is an encoder-decoder model; only decoders that read their prompt causally can be used")
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    raise PopError(f"{name} ({config.model_type}) is not a causal language model; give one that generates text")


def _check_causal(name: str, model: PreTrainedModel) -> None:
    """Check that the last token does not change what earlier ones predict, because some encoders load as causal models.

    Raises:
        PopError: The last token changes the predictions, so the model is not causal.
    """
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        first, second = (
            model(input_ids=torch.tensor([[0, 1, 2, last]], device=device), use_cache=False).logits[0, :3].float()
            for last in (0, 1)
        )
    # Rounding may depend on the other tokens, where tokens are grouped by expert for example. The change that an
    # encoder makes is far larger.
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps) * first.abs().max()
    if (first - second).abs().max() > tolerance:
        raise PopError(f"{name} reads its prompt in both directions; give a causal language model, not an encoder")
