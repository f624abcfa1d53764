"""``python -m pypop_gguf`` is ``pop-gguf``."""

import sys

from pypop_gguf.cli import main

sys.exit(main())
