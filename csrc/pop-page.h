// The text that llama-server has at its root if it was built without the web page, which tools/build_page.py builds.
#pragma once

#define POP_NO_PAGE                                                                                                    \
    "This server was built without its web page: run `make page` in the source tree of pypop_gguf, and start "         \
    "`pop-gguf serve` again.\n"
