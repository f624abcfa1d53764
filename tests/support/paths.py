"""Where things lie in the source tree."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "models" / "lab-llama-12l"
STOCK = ROOT / "build" / "stock" / "package"
