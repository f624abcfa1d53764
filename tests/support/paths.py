"""Directories of the source tree: its root, the bundled model, and the unpatched llama-cpp-python once it is built."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "models" / "lab-llama-12l"
STOCK = ROOT / "build" / "stock" / "package"
