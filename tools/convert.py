"""``python tools/convert.py`` is ``pop-gguf convert``: writes a GGUF with layer importance and ``pop.*`` metadata."""

import sys

from pypop_gguf.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
