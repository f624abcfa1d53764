// What llama-server says at its root when it was built without the web page. tools/build_page.py builds the page.
#pragma once

#define POP_NO_PAGE                                                                                                    \
    "This server was built without its web page: run `make page` in the source tree of pypop_gguf, and start "         \
    "`pop-gguf serve` again.\n"
