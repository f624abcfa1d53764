"""Runs a script of llama.cpp in a process where Transformers does not run Python code that comes with a model.

The converter runs this file by its path: ``python no_remote_code.py SCRIPT ARGUMENTS``. It imports nothing of
pypop_gguf, because the script brings its own version of the gguf package.
"""

import os
import runpy
import sys


def forbid_remote_code() -> None:
    """Replaces the two functions of Transformers through which every class that a model brings is loaded.

    Other modules of Transformers import them by name, so this has to run before those modules are imported.
    """
    from transformers import dynamic_module_utils

    def refuse(*_args, **_kwargs):
        raise ValueError(
            "the model brings Python code of its own, which is not run: give --trust-remote-code where you trust it"
        )

    def resolve(trust_remote_code, model_name, has_local_code, has_remote_code, *_args, **_kwargs):
        return False if has_local_code or not has_remote_code else refuse()

    dynamic_module_utils.resolve_trust_remote_code = resolve
    dynamic_module_utils.get_class_in_module = refuse


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])  # as if the script itself had been started
    forbid_remote_code()
    runpy.run_path(sys.argv[0], run_name="__main__")
