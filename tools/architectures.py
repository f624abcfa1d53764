"""POP on every architecture that llama.cpp can load, against a reference that stock llama.cpp makes alone.

Upstream's generator writes a tiny random model of each. For each: the lossless boundary gives the whole model's logits;
a deep boundary gives what stock gives from a copy of the file whose layers from there on are the identity (their output
projections are zero; they still fill their caches): stock prefills the copy, its state is restored into stock with the
original file, and the last token and three more are decoded.

Run as a script it writes the table: ``python -m tools.architectures docs/architectures.md``. ``make architectures`` does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

from tests.support.pop_reference import squared_error

ROOT = Path(__file__).parents[1]
STOCK = ROOT / "build" / "stock"
WORKER = ROOT / "tests" / "support" / "architecture_worker.py"
TOLERANCE = 1e-9  # normalized squared error, F32

# What a layer adds to the residual stream ends in one of these; the FFN's norm too, for random models without FFN weights.
_OUTPUTS = re.compile(
    r"blk\.(\d+)\.(attn_output|attn_output_b|attn_out|attn_o|attn_vis_out|visexp_attn_out|ssm_out|shortconv\.out_proj|time_mix_output|"
    r"ffn_norm|ffn_down|ffn_down_exps|ffn_down_shexp|ffn_down_chexps|channel_mix_value)\.(weight|bias)$"
    r"|blk\.(\d+)\.(post_attention_norm|post_ffw_norm|attn_post_norm|ffn_post_norm|layer_output_norm|attn_output_norm)\.bias$"
)
# hyper-connections of DeepSeek 4 and GLM 5: how 4 streams are read (8 numbers), then the matrix that mixes them (16)
_STREAM_MIX = re.compile(r"blk\.(\d+)\.hc_(attn|ffn)_(base|scale)\.weight$")
# Their layers do more to the stream than add to it.
_NO_IDENTITY = {
    "minimax-01": "normalizes its residual stream: no copy of it is the identity, so deep boundaries are not compared"
}


@dataclass
class Row:
    """What one model showed. ``errors``: boundary -> squared error against the reference."""

    name: str
    n_layer: int = 0
    lossless: int = 0
    flop_bound: float = float("nan")
    lossless_error: float = float("nan")
    errors: dict[int, float] = field(default_factory=dict)
    effect: float = float("nan")  # of the deepest boundary compared: what POP changes, to judge the error against
    continued: float | None = None  # squared error against the way that repeats the layers below the boundary
    refusal: str | None = None
    note: str = ""
    failures: list[str] = field(default_factory=list)


def generate(target: Path) -> list[Path]:
    """Writes the models, one process an architecture, since the generator stops at the first it cannot build."""
    generator = next(path for path in STOCK.rglob("test-llama-archs*") if path.is_file() and os.access(path, os.X_OK))
    source = (STOCK / "llama-cpp-python/vendor/llama.cpp/src/llama-arch.cpp").read_text()
    names = re.findall(r'\{ LLM_ARCH_\w+,\s+"([\w.-]+)"', source[: source.index("LLM_KV_NAMES")])
    for name in names:
        subprocess.run([generator, "-o", target, "-s", "1", "-a", name], capture_output=True, check=False)
    return sorted(target.glob("*.gguf"))


def identity_copy(path: Path, boundary: int, copy: Path) -> None:
    """A copy of a model in which layers ``boundary`` and above leave the residual stream as it is."""
    shutil.copy(path, copy)
    with copy.open("r+b") as file:
        for tensor in gguf.GGUFReader(path).tensors:
            outputs, mix = _OUTPUTS.search(tensor.name), _STREAM_MIX.search(tensor.name)
            mix = mix if int(tensor.n_elements) in (3, 24) else None
            # talkie adds the scaled embedding at the end of each layer; elsewhere this scale multiplies the stream
            scale = path.name.startswith("talkie") and tensor.name.endswith("layer_output_scale.weight")
            layer = re.match(r"blk\.(\d+)\.", tensor.name)
            if not layer or int(layer[1]) < boundary or not (outputs or mix or scale):
                continue
            if path.name.startswith("qwen2moe") and "ffn_norm" in tensor.name:
                continue  # its shared expert's gate divides by its input
            values = np.zeros(int(tensor.n_elements), np.float32)
            if mix:  # keep how the streams are read, make the matrix that mixes them the identity
                values[:] = np.asarray(tensor.data, np.float32).ravel()
                if mix[3] == "scale":
                    values[2] = 0.0
                else:
                    values[8:] = np.where(np.eye(4, dtype=bool), 40.0, -40.0).ravel()
            file.seek(tensor.data_offset)
            file.write(values.tobytes()[: int(tensor.n_bytes)])


def _run(environment: dict, *arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, WORKER, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def check(path: Path) -> Row:
    """Compares one model with its reference."""
    row = Row(path.stem)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _check(path, row, Path(scratch))
    except RuntimeError as error:
        row.failures.append(str(error))
    return row


def _check(path: Path, row: Row, scratch: Path) -> None:
    found = _run({}, "engine", path, scratch / "engine.npz")
    row.n_layer, row.lossless, row.refusal = found["n_layer"], found["lossless"], found["refusal"]
    if row.refusal:
        return
    row.flop_bound = found["flop_bound"]
    row.failures += [f"b = {boundary}: {error}" for boundary, error in found["errors"].items()]
    engine = dict(np.load(scratch / "engine.npz"))
    full = engine.pop(str(row.n_layer))
    continued = {name.split()[0]: engine.pop(name) for name in list(engine) if name.endswith("continued")}
    if continued:
        row.continued = max(squared_error(logits, engine[boundary]) for boundary, logits in continued.items())
        if not row.continued <= TOLERANCE:
            row.failures.append(f"continued differs from repeated by {row.continued:.0e}")
    row.lossless_error = squared_error(engine.pop(str(row.lossless)), full)
    if not row.lossless_error <= TOLERANCE:
        row.failures.append(f"lossless boundary differs by {row.lossless_error:.0e}")
    row.failures += [
        f"b = {b}: nothing was pruned" for b, n in found["pruned"].items() if n == 0 and int(b) < row.n_layer
    ]

    deep = {int(boundary): logits for boundary, logits in engine.items() if int(boundary) < row.lossless}
    row.note = next((why for name, why in _NO_IDENTITY.items() if row.name.startswith(name)), "")
    if not deep or row.note:
        return
    for boundary in deep:
        identity_copy(path, boundary, scratch / f"{boundary}.gguf")
    copies = [f"{boundary}={scratch / f'{boundary}.gguf'}" for boundary in deep]
    _run({"PYTHONPATH": str(STOCK / "package")}, "stock", path, scratch / "stock.npz", *copies)
    reference = np.load(scratch / "stock.npz")
    for boundary, logits in deep.items():
        row.errors[boundary] = squared_error(logits, reference[str(boundary)])
        if not row.errors[boundary] <= TOLERANCE:
            row.failures.append(f"b = {boundary} differs from stock's reference by {row.errors[boundary]:.0e}")
    row.effect = squared_error(reference[str(min(deep))], full)


def check_all(progress=lambda done, total: None) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        models = generate(Path(directory))
        rows = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for row in pool.map(check, models):
                rows.append(row)
                progress(len(rows), len(models))
    return rows


def table(rows: list[Row]) -> str:
    """The page that is published."""
    served = [row for row in rows if not row.refusal and not row.failures]
    refused = [row for row in rows if row.refusal]
    continued = sum(row.continued is not None for row in served)
    compared = [row for row in served if row.errors]
    exact = sum(max(row.errors.values()) == 0 for row in compared)
    lines = [
        "# Architectures",
        "",
        "Generated by `make architectures` from tiny random models that llama.cpp's own test generator writes, F32, on the CPU.",
        "",
        f"{len(rows)} models: {len(served)} served, {len(refused)} refused with the reason, "
        f"{len(rows) - len(served) - len(refused)} failing. Of the served, {len(compared)} were compared at deep boundaries with a "
        f"reference that stock llama.cpp makes alone (tolerance {TOLERANCE:.0e} normalized squared error; {exact} agree bit for bit). In {continued} the last "
        "prompt token goes on from the boundary.",
        "",
        "- *Lossless*: the last layer that writes to the cache, and the error there against the whole model, over the last prompt",
        "  token and three decoded ones.",
        "- *Deep*: largest error at a third and at half of the layers skipped. *POP's effect*: what pruning itself changes there.",
        "- *Continued*: how far the result is from this where the last prompt token goes on from the boundary instead of repeating the",
        "  layers below it; *repeats* where it does not go on: recurrent states, and caches that were not proven.",
        "- *Bound*: FLOPs of the whole graph over those of the pruned one, a third of the layers skipped, 512 tokens. Tiny models have",
        "  a large share of output layer and attention: real ones lie nearer to 1.5. Hybrids gain less: a skipped recurrent layer still",
        "  computes its state.",
        "",
        "| Model | Layers | Lossless | Error there | Deep | POP's effect | Continued | Bound | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.refusal:
            lines.append(f"| {row.name} | {row.n_layer} | | | | | | | refused: {row.refusal} |")
            continue
        deep = f"{max(row.errors.values()):.0e}" if row.errors else "N/A"
        effect = f"{row.effect:.0e}" if row.errors else "N/A"
        note = "; ".join(row.failures) or row.note
        continued = "repeats" if row.continued is None else f"{row.continued:.0e}"
        lines.append(
            f"| {row.name} | {row.n_layer} | {row.lossless} | {row.lossless_error:.0e} | {deep} | {effect} | {continued} | {row.flop_bound:.2f} | {note} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    rows = check_all(lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr, flush=True))
    Path(sys.argv[1]).write_text(table(rows))
    for row in rows:
        for failure in row.failures:
            print(f"{row.name}: {failure}")
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
