"""Runs lm-evaluation-harness on a pruned model, for ``pop-gguf eval --lm-eval``: its tasks and metrics, our engine.

The context of a request is read with the boundary; what is scored or generated runs through the whole model. Tasks with
images (such as MMMU) go through the model's own chat template and projector, as a chat does.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from pypop_gguf.errors import PopError
from pypop_gguf.llama import PopLlama
from pypop_gguf.quality.score import Tokenizer, log_softmax

_IMAGE = "<image>"  # The harness's prompts mark the place of an image by this.

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise PopError(
        f"--lm-eval needs lm-evaluation-harness ({error}): pip install '.[eval]' in the source tree"
    ) from error


class PopLM(TemplateLM):
    """A ``PopLlama`` as the harness's model.

    Args:
        llm: The model; a request that is longer than its context loses the begin of its own context.
        boundary: First layer that prefill skips, L for the whole model.
    """

    def __init__(self, llm: PopLlama, boundary: int) -> None:
        super().__init__()
        self._llm, self._boundary, self._tokenizer = llm, boundary, Tokenizer(llm)
        self.MULTIMODAL = llm.chat_handler is not None  # The harness asks for this name.

    @property
    def eot_token_id(self) -> int:
        return self._llm.token_eos()

    @property
    def prefix_token_id(self) -> int:
        bos = self._llm.token_bos()
        return bos if bos >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return Path(self._llm.model_path).stem

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self._tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool = False, **_kwargs) -> list[int]:
        return self._tokenizer(string, add_special_tokens)["input_ids"]

    def _loglikelihood_tokens(self, requests: list, **_kwargs) -> list[tuple[float, bool]]:
        return [self._loglikelihood(context, continuation) for _, context, continuation in requests]

    def _loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        context = context[-(self._llm.n_ctx() - len(continuation)) :] or [self.prefix_token_id]
        log_p = log_softmax(self._llm.score(context, continuation, boundary=self._boundary))
        rows = np.arange(len(continuation))
        return float(log_p[rows, continuation].sum()), bool((log_p.argmax(axis=1) == continuation).all())

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        result = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._llm.n_ctx() - 1,
                context_len=1,
            )
            result.append(sum(self._loglikelihood(*make_disjoint_window(window))[0] for window in windows))
        return result

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict, media: dict | None = None) -> str:
        room = self._llm.n_ctx() - 1
        max_tokens = min(int(options.get("max_gen_toks", 256)), room // 2)
        until = options.get("until") or []
        common: dict[str, Any] = dict(
            max_tokens=max_tokens,
            stop=[until] if isinstance(until, str) else until,
            temperature=float(options.get("temperature", 0)) if options.get("do_sample") else 0,
            boundary=self._boundary,
        )
        self._llm.reset()  # Otherwise the cache of another boundary would be reused.
        if media:
            messages: list[Any] = [{"role": "user", "content": _make_content(context, media["visual"])}]
            return self._llm.create_chat_completion(messages, **common)["choices"][0]["message"]["content"] or ""
        tokens = self.tok_encode(context, add_special_tokens=True)[-(room - max_tokens) :]
        return self._llm.create_completion(tokens, **common)["choices"][0]["text"]


def _make_content(context: str, images: list) -> list[dict]:
    """Returns the parts of a chat message. Each mark in the text becomes an image; images without a mark come first."""
    texts = context.split(_IMAGE)
    n_marks = len(texts) - 1
    if n_marks > len(images):
        raise PopError(f"a question has {n_marks} {_IMAGE} marks and {len(images)} images")
    first = len(images) - n_marks
    parts = [_make_image_part(image) for image in images[:first]]
    for i, text in enumerate(texts):
        if i:
            parts.append(_make_image_part(images[first + i - 1]))
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _make_image_part(image: Any) -> dict:
    """Returns the part for a ``PIL.Image``, without loss."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()},
    }


def check_tasks(names: list[str], task_dir: Path | None) -> TaskManager:
    """Returns what knows the tasks of the harness and those of a directory.

    Raises:
        PopError: One of the names is no task.
    """
    manager = TaskManager(include_path=str(task_dir) if task_dir else None)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise PopError(f"--lm-eval: no task {unknown[0]}; `lm-eval ls tasks` lists them, --task-dir adds your own")
    return manager


def evaluate(llm: PopLlama, boundary: int, names: list[str], task_dir: Path | None, limit: int) -> dict[str, dict]:
    """Runs tasks of the harness at one boundary.

    Args:
        llm: The model.
        boundary: First layer that prefill skips, L for the whole model.
        names: Tasks, groups or tags.
        task_dir: A directory with further tasks.
        limit: Largest number of documents of each task.

    Returns:
        The value of each metric of each task.

    Raises:
        PopError: There is no such task, or the harness cannot run it.
    """
    manager = check_tasks(names, task_dir)
    try:
        done = simple_evaluate(
            model=PopLM(llm, boundary), tasks=names, task_manager=manager, limit=limit, verbosity="ERROR"
        )
    except Exception as error:  # A task may fail in any way: its data set is missing, or its own code fails.
        first_line = (str(error).splitlines() or [""])[0]
        raise PopError(f"--lm-eval: the harness failed: {type(error).__name__}: {first_line}") from error
    return {
        name: {metric: value for metric, value in results.items() if isinstance(value, float)}
        for name, results in done["results"].items()
    }
