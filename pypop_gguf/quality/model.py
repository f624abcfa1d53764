"""Opens the model that ``pop-gguf eval`` and ``pop-gguf tune`` measure, and has the arguments that they share."""

from __future__ import annotations

import argparse
from pathlib import Path

from pypop_gguf import PopLlama, library
from pypop_gguf.boundary_rules import check_support, default_boundary
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.adapters import find_adapters
from pypop_gguf.gguf_files.metadata import read_metadata
from pypop_gguf.terminal import (
    add_gpu_layers_argument,
    add_kernels_argument,
    available_cores,
    check_ranges,
    choose_kernels,
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that :func:`open_model` reads."""
    parser.add_argument(
        "--samples", type=int, default=40, metavar="N", help="largest number of samples of each file (default: 40)"
    )
    parser.add_argument(
        "--context",
        type=int,
        default=512,
        metavar="N",
        help="length of the longest sample in tokens, the prompt and the text after it together (default: 512)",
    )
    parser.add_argument(
        "--head",
        type=int,
        metavar="H",
        help="number of first prompt tokens that run every layer (default: the file's, or 0)",
    )
    parser.add_argument(
        "--tail",
        type=int,
        metavar="T",
        help="number of last prompt tokens that run every layer (default: the file's, or 1)",
    )
    adapters = parser.add_mutually_exclusive_group()
    adapters.add_argument(
        "--adapter",
        type=Path,
        nargs="+",
        metavar="FILE.gguf",
        help="adapters with fitted projections, one file for each boundary that shall use one (default: those beside "
        "the model, for the boundaries that are measured)",
    )
    adapters.add_argument("--no-adapter", action="store_true", help="measure without adapters")
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing samples (default: 0)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="number of threads (default: the cores this process may use)"
    )
    add_kernels_argument(parser)
    add_gpu_layers_argument(parser)


def open_model(
    arguments: argparse.Namespace, boundaries: list[int] | None, mmproj: Path | None = None
) -> tuple[PopLlama, list[int]]:
    """Opens the model with a context of ``--context`` tokens.

    Args:
        arguments: The parsed arguments of :func:`add_model_arguments`, and ``model``.
        boundaries: The boundaries to measure; None measures the default one.
        mmproj: Projector of a model that reads images.

    Returns:
        The model, and the boundaries to measure.

    Raises:
        PopError: The model cannot be read or pruned there, an adapter is not for it, or a number is out of range.
    """
    check_ranges(arguments, samples=1, context=16, threads=1)
    choose_kernels(arguments)
    stored = read_metadata(arguments.model)
    support = library.describe_model(arguments.model)
    check_support(arguments.model, support)
    boundaries = boundaries or [default_boundary(support, stored)]
    for boundary in boundaries:
        if not 1 <= boundary <= support.n_layer:
            raise PopError(f"--boundary {boundary} is out of range: give 1 to {support.n_layer}")
    threads = arguments.threads or available_cores()
    if mmproj and not mmproj.is_file():
        raise PopError(f"--mmproj {mmproj}: no such file; give the model's projector")
    chat_format = library.load().llama_chat_format
    beside = {} if arguments.adapter or arguments.no_adapter else find_adapters(arguments.model)
    beside = {at: path for at, path in beside.items() if at in boundaries}
    llm = PopLlama(
        str(arguments.model),
        pop_boundary=boundaries[-1],
        pop_head=arguments.head,
        pop_tail=arguments.tail,
        pop_min_tokens=0,
        pop_adapter=arguments.adapter or list(beside.values()),
        n_ctx=arguments.context,
        n_batch=arguments.context,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=arguments.gpu_layers,
        chat_handler=chat_format.MTMDChatHandler(str(mmproj), verbose=False) if mmproj else None,
        verbose=False,
    )
    for at in sorted(set(beside) - set(llm.pop.adapters)):
        raise PopError(f"{beside[at]} was fitted for another boundary than its name says: give --no-adapter")
    trained = int(llm.metadata.get(f"{support.architecture}.context_length", arguments.context))
    if arguments.context > trained:
        raise PopError(
            f"--context {arguments.context} is more than the {trained} tokens that the model was trained for: "
            "give fewer"
        )
    return llm, boundaries


def label_boundary(llm: PopLlama, boundary: int) -> str:
    """Returns how tables name a boundary: its number, and whether it is the whole model or has fitted projections."""
    if boundary == llm.pop.n_layer:
        return f"{boundary} (whole)"
    return f"{boundary} (fitted)" if boundary in llm.pop.adapters else str(boundary)
