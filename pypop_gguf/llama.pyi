# PopLlama as type checkers and editors see it. They cannot follow the carried llama_cpp, which is found at run time,
# nor the arguments that calls pass on to the parent. tests/python/test_typing.py checks this file against the parent
# and llama.py.

import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal, TypedDict, overload, type_check_only

import numpy as np
import numpy.typing as npt
from llama_cpp import Llama, LlamaState, LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_chat_format import LlamaChatCompletionHandler
from llama_cpp.llama_grammar import LlamaGrammar
from llama_cpp.llama_speculative import LlamaDraftModel
from llama_cpp.llama_tokenizer import BaseLlamaTokenizer
from llama_cpp.llama_types import (
    ChatCompletionFunction,
    ChatCompletionRequestFunctionCall,
    ChatCompletionRequestMessage,
    ChatCompletionRequestResponseFormat,
    ChatCompletionTool,
    ChatCompletionToolChoiceOption,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    CreateCompletionResponse,
)
from typing_extensions import NotRequired, Self, Unpack

from pypop_gguf.status import PopStatus, Timings

# What Timings.as_dict() gives.
@type_check_only
class _CallTimings(TypedDict):
    cache_n: int
    prompt_n: int
    prompt_ms: float | None
    prompt_per_token_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float | None
    predicted_per_token_ms: float | None
    predicted_per_second: float | None
    time_to_first_token_ms: float | None
    pruned_n: int
    boundary: int | None
    completed_n: int
    complete_ms: float
    incomplete_n: int | None

@type_check_only
class _Completion(CreateCompletionResponse):
    timings: _CallTimings

@type_check_only
class _CompletionChunk(CreateCompletionResponse):
    timings: NotRequired[_CallTimings]  # only in the last chunk

@type_check_only
class _ChatCompletion(CreateChatCompletionResponse):
    timings: _CallTimings

@type_check_only
class _ChatCompletionChunk(CreateChatCompletionStreamResponse):
    timings: NotRequired[_CallTimings]

# The arguments of every call: how its prompt is read, and how tokens are sampled.
@type_check_only
class _Call(TypedDict, total=False):
    pop: bool | None
    boundary: int | Literal["lossless"] | None
    progress: Callable[[int, int], bool | None] | None
    cancel: threading.Event | None
    top_p: float
    min_p: float
    typical_p: float
    stop: str | list[str] | None
    frequency_penalty: float
    presence_penalty: float
    repeat_penalty: float
    top_k: int
    seed: int | None
    tfs_z: float
    mirostat_mode: int
    mirostat_tau: float
    mirostat_eta: float
    model: str | None
    logits_processor: LogitsProcessorList | None
    grammar: LlamaGrammar | None
    logit_bias: dict[int, float] | None

@type_check_only
class _CompletionCall(_Call, total=False):
    logprobs: int | None
    echo: bool
    stopping_criteria: StoppingCriteriaList | None

@type_check_only
class _ChatCompletionCall(_Call, total=False):
    function_call: ChatCompletionRequestFunctionCall | None
    tools: list[ChatCompletionTool] | None
    tool_choice: ChatCompletionToolChoiceOption | None
    temperature: float
    response_format: ChatCompletionRequestResponseFormat | None
    max_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None

class PopLlama(Llama):
    timings: Timings

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        pop: bool = True,
        pop_boundary: int | Literal["lossless"] | None = None,
        pop_head: int | None = None,
        pop_tail: int | None = None,
        pop_min_tokens: int | None = None,
        pop_adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | bool | None = None,
        pop_kernels: bool = True,
        pop_complete: Literal["off", "call", "idle", "answer"] = "off",
        pop_complete_chunk: int | None = None,
        pop_complete_states: Literal["f32", "f16", "bf16"] = "f32",
        n_gpu_layers: int = 0,
        split_mode: int = ...,
        main_gpu: int = 0,
        tensor_split: list[float] | None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        seed: int = ...,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        rope_scaling_type: int | None = ...,
        pooling_type: int = ...,
        attention_type: int = ...,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool | None = None,
        op_offload: bool | None = None,
        swa_full: bool | None = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: str | None = None,
        lora_scale: float = 1.0,
        lora_path: str | os.PathLike[str] | None = None,
        numa: bool | int = False,
        chat_format: str | None = None,
        chat_handler: LlamaChatCompletionHandler | None = None,
        draft_model: LlamaDraftModel | None = None,
        tokenizer: BaseLlamaTokenizer | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
    ) -> None: ...
    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: list[Any] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | Literal["auto"] = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Self: ...
    @property
    def pop(self) -> PopStatus: ...

    # Each of the two has three overloads: one gives a whole result, one a stream, and the last takes all arguments of
    # the parent by position and gives whichever of both `stream` says.
    @overload
    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        *,
        stream: Literal[False] = False,
        **call: Unpack[_CompletionCall],
    ) -> _Completion: ...
    @overload
    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        *,
        stream: Literal[True],
        **call: Unpack[_CompletionCall],
    ) -> Iterator[_CompletionChunk]: ...
    @overload
    def create_completion(
        self,
        prompt: str | list[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | list[str] | None = ...,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
        *,
        pop: bool | None = None,
        boundary: int | Literal["lossless"] | None = None,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
    ) -> _Completion | Iterator[_CompletionChunk]: ...
    __call__ = create_completion

    @overload
    def create_chat_completion(
        self,
        messages: list[ChatCompletionRequestMessage],
        functions: list[ChatCompletionFunction] | None = None,
        *,
        stream: Literal[False] = False,
        **call: Unpack[_ChatCompletionCall],
    ) -> _ChatCompletion: ...
    @overload
    def create_chat_completion(
        self,
        messages: list[ChatCompletionRequestMessage],
        functions: list[ChatCompletionFunction] | None = None,
        *,
        stream: Literal[True],
        **call: Unpack[_ChatCompletionCall],
    ) -> Iterator[_ChatCompletionChunk]: ...
    @overload
    def create_chat_completion(
        self,
        messages: list[ChatCompletionRequestMessage],
        functions: list[ChatCompletionFunction] | None = None,
        function_call: ChatCompletionRequestFunctionCall | None = None,
        tools: list[ChatCompletionTool] | None = None,
        tool_choice: ChatCompletionToolChoiceOption | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | list[str] | None = ...,
        seed: int | None = None,
        response_format: ChatCompletionRequestResponseFormat | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: LogitsProcessorList | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: dict[int, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        *,
        pop: bool | None = None,
        boundary: int | Literal["lossless"] | None = None,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
    ) -> _ChatCompletion | Iterator[_ChatCompletionChunk]: ...
    def score(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        *,
        pop: bool | None = None,
        boundary: int | Literal["lossless"] | None = None,
    ) -> npt.NDArray[np.float32]: ...
    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None]: ...
    def eval(self, tokens: Sequence[int]) -> None: ...
    def complete_cache(
        self,
        max_tokens: int | None = None,
        *,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
    ) -> int: ...
    def save_state(self) -> LlamaState: ...
    def load_state(self, state: LlamaState) -> None: ...
