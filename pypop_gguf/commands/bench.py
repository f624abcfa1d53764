"""``pop-gguf bench``: measures time to first token with POP and with stock llama.cpp.

pypop_gguf/bench/measure.py measures, pypop_gguf/bench/report.py turns the raw runs (pypop_gguf/bench/runs.py) into
tables, and pypop_gguf/bench/plot.py draws them. pypop_gguf/bench/advise.py does what ``--advise`` asks for.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pypop_gguf.bench import advise
from pypop_gguf.bench import report as bench_report
from pypop_gguf.bench.measure import measure
from pypop_gguf.bench.plan import make_plan
from pypop_gguf.bench.plot import plot_speedups
from pypop_gguf.bench.runs import Recorder, read_csv
from pypop_gguf.errors import PopError
from pypop_gguf.plotting import check_plot
from pypop_gguf.rpc import add_rpc_argument
from pypop_gguf.terminal import add_kernels_argument, choose_kernels, integer_list

PROMPTS, ADVISED_PROMPT = [32, 128, 512, 2048], 512  # tokens

DESCRIPTION = """\
Measures the time to the first token and the time per generated token, with POP and without. In each case, two stock
processes first run against each other. Then stock llama.cpp, POP at each boundary, and POP off take turns. With --runs
1, these turns are all: the two stock processes are not compared first. Every run is appended to the CSV file at once,
and Ctrl-C prints the tables of what was measured so far. With --advise, it searches the settings that read a prompt
fastest on this machine instead, and its last line has their arguments."""

EPILOG = """\
Prompts are random tokens, the same for every engine. `pop-gguf random-model` writes a model to measure on without a
download. Two processes hold the model in memory at the same time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL.gguf", help="model to measure; left out with --from-csv"
    )
    parser.add_argument(
        "--prompt",
        type=integer_list,
        metavar="N,N",
        help="lengths of the prompts in tokens (default: 32,128,512,2048; with --advise, one length, 512)",
    )
    parser.add_argument(
        "--boundary",
        type=integer_list,
        metavar="B,B",
        help="boundaries to measure (default: the file's, or the lossless one if upper layers share a cache, or two "
        "thirds of the layers)",
    )
    parser.add_argument(
        "--parallel",
        type=integer_list,
        default=[1, 8],
        metavar="N,N",
        help="numbers of prompts that are read at once (default: 1,8)",
    )
    parser.add_argument(
        "--decode",
        type=int,
        default=32,
        metavar="N",
        help="number of tokens to generate after each prompt (default: 32)",
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="number of rounds of each case (default: 5)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="number of threads (default: the cores this process may use)"
    )
    parser.add_argument(
        "--ubatch", type=int, default=512, metavar="N", help="length of a micro-batch in tokens (default: 512)"
    )
    parser.add_argument(
        "--repeat",
        action="store_true",
        help="also measure POP without continuation: the last prompt tokens run all layers in a pass of their own",
    )
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="also measure half of the sequences reading their prompts while the others write",
    )
    parser.add_argument(
        "--flash-attn",
        choices=("auto", "on", "off"),
        default="auto",
        help="flash attention of all engines; auto is wherever llama.cpp can compute it (default: auto)",
    )
    parser.add_argument(
        "--cache-type",
        choices=("F16", "Q8_0"),
        default="F16",
        help="type of the cached keys and values of all engines (default: F16)",
    )
    add_kernels_argument(parser)
    add_rpc_argument(parser, "append", "; give it twice with other servers, because two processes hold the model")
    parser.add_argument(
        "--stock",
        type=Path,
        metavar="DIR",
        help="directory with an unpatched llama_cpp package (default: compare with POP off)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file to append every run to")
    parser.add_argument(
        "--from-csv",
        type=Path,
        metavar="FILE",
        help="make the tables and the plot from the runs in this file, and measure nothing",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="file to plot the speed-ups into; FILE.svg is written beside it"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--advise",
        action="store_true",
        help="search the fastest threads, micro-batch, flash attention and kernels for this model on this machine; "
        "--prompt and --runs alone go with it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, or reads what was measured, and prints it.

    Raises:
        PopError: The arguments do not fit the model, or an engine failed. The runs before are in the CSV.
    """
    if arguments.advise:
        return _advise(arguments)
    arguments.prompt = arguments.prompt or PROMPTS
    if arguments.plot:
        check_plot(arguments.plot)
    interrupted = False
    if arguments.from_csv:
        if arguments.model or arguments.csv:
            raise PopError("--from-csv measures nothing: drop it, or MODEL.gguf and --csv")
        runs = read_csv(arguments.from_csv)
    else:
        choose_kernels(arguments)
        plan = make_plan(arguments)
        recorder = Recorder(arguments.csv)
        try:
            measure(plan, recorder)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            recorder.close()
        runs = recorder.runs
    summary = bench_report.summarize(runs)
    if interrupted:
        print(f"interrupted after {len(runs)} runs", file=sys.stderr)
    elif not summary:
        raise PopError(f"{arguments.from_csv}: no case in it is complete enough to compare")
    if arguments.json:
        print(json.dumps(bench_report.as_json(summary), indent=2))
    elif summary:
        print("\n\n".join(bench_report.format_tables(setting, cases) for setting, cases in summary.items()))
    if arguments.plot and summary:
        plot_speedups(summary, arguments.plot)
    return 130 if interrupted else 0


def _advise(arguments: argparse.Namespace) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, default in vars(parser.parse_args([])).items():
        if name not in ("model", "advise", "prompt", "runs") and getattr(arguments, name) != default:
            raise PopError(f"--{name.replace('_', '-')} does not go with --advise: leave it out")
    arguments.prompt = arguments.prompt or [ADVISED_PROMPT]
    if len(arguments.prompt) > 1:
        raise PopError("--advise takes one length of a prompt: give one number to --prompt")
    plan = make_plan(arguments)
    best, trials, setting = advise.search(plan)
    print(advise.format_report(plan, setting, best, trials))
    return 0
