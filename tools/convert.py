"""Converts a model as ``pop-gguf convert`` does: ``python tools/convert.py MODEL --outfile FILE``."""

import sys

from pypop_gguf.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
