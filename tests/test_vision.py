"""Vision models: the text model gets the pop.* keys, the projector becomes a second file, and the two load together.

Tiny random models with the bundled model's tokenizer; llama.cpp's converter takes it for every family here.
"""

import json
import re
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pypop_gguf import PopLlama, cli
from pypop_gguf.llama import llama_cpp
from pypop_gguf.metadata import read_metadata

BUNDLED = Path(__file__).parents[1] / "models" / "lab-llama-12l"
TEXT = dict(
    vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.1,
)  # fmt: skip
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %} She said:{% endif %}"""
VISION = dict(hidden_size=32, intermediate_size=64, patch_size=14)


def gemma3(directory: Path) -> None:
    config = transformers.Gemma3Config(
        text_config=dict(sliding_window=16, query_pre_attn_scalar=16, **TEXT),
        vision_config=dict(num_hidden_layers=2, num_attention_heads=2, image_size=56, **VISION),
        mm_tokens_per_image=4,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    # published models have their tensors under the names that Transformers used before version 5
    weights = load_file(directory / "model.safetensors")
    old = {re.sub(r"vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name): weights[name] for name in weights}
    save_file(old, directory / "model.safetensors", metadata={"format": "pt"})


def qwen3vl(directory: Path) -> None:
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], mrope_interleaved=True)
    config = transformers.Qwen3VLConfig(
        text_config=dict(rope_scaling=rope, **TEXT),
        vision_config=dict(
            depth=2, num_heads=2, out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0],
            spatial_merge_size=2, temporal_patch_size=2, **VISION,
        ),
    )  # fmt: skip
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(directory)


@pytest.fixture(scope="module", params=[gemma3, qwen3vl], ids=["gemma3", "qwen3vl"])
def converted(request, tmp_path_factory) -> Path:
    """The text GGUF; the projector stands beside it."""
    directory = tmp_path_factory.mktemp(request.param.__name__)
    source = directory / "model"
    torch.manual_seed(0)
    request.param(source)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, source / name)
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    preprocessor = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, image_seq_length=4)
    (source / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    target = directory / "out" / "text.gguf"
    target.parent.mkdir()
    arguments = ["--mmproj", "--calibration-samples", "2", "--calibration-tokens", "32", "--outfile", str(target)]
    assert cli.main(["convert", str(source), *arguments]) == 0
    return target


def test_text_model_and_projector_are_all_that_is_written(converted):
    assert sorted(path.name for path in converted.parent.iterdir()) == ["mmproj-text.gguf", "text.gguf"]
    projector = gguf.GGUFReader(converted.with_name("mmproj-text.gguf"))
    assert projector.get_field("general.type").contents() == "mmproj"
    assert not any(key.startswith("pop.") for key in projector.fields)


def test_text_model_has_boundary_and_importance_of_its_text_layers(converted):
    metadata = read_metadata(converted)
    assert metadata.boundary == 4
    for scores in (metadata.importance_prefill, metadata.importance_decode):
        assert scores.shape == (6,)


def test_text_model_answers_pruned(converted):
    llm = PopLlama(str(converted), n_ctx=128, verbose=False)
    assert (llm.pop.boundary, llm.pop.source) == (4, "file")
    llm.create_completion("The fox lived near the river", max_tokens=4, temperature=0)
    assert llm.timings.pruned_tokens == llm.timings.prompt_tokens - 1


def test_projector_loads_with_its_text_model(converted):
    import llama_cpp.mtmd_cpp as mtmd

    llm = PopLlama(str(converted), n_ctx=128, verbose=False)
    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu = parameters.warmup = False
    context = mtmd.mtmd_init_from_file(bytes(converted.with_name("mmproj-text.gguf")), llm.model, parameters)
    assert context
    assert mtmd.mtmd_support_vision(context)
    mtmd.mtmd_free(context)


def image_url(colour) -> str:
    import base64
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_second_question_about_an_image_reads_neither_it_nor_what_stands_before_it(converted):
    red, blue = image_url((255, 0, 0)), image_url((0, 80, 255))

    def open_model():
        handler = llama_cpp.llama_chat_format.MTMDChatHandler(str(converted.with_name("mmproj-text.gguf")), verbose=False)
        # the last boundary is lossless, so what was read for one question is exact for the next
        return PopLlama(str(converted), pop_boundary=5, n_ctx=256, chat_handler=handler, n_threads=1, n_threads_batch=1, verbose=False)

    def ask(llm, url, question, **options):
        parts = [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        done = llm.create_chat_completion([{"role": "user", "content": parts}], max_tokens=6, temperature=0, **options)
        return done["choices"][0]["message"]["content"], done["timings"]

    def fresh(*arguments, **options):
        llm = open_model()
        answer, _ = ask(llm, *arguments, **options)
        llm.close()
        return answer

    llm = open_model()
    first, timings = ask(llm, red, " Which colour has the ball?")
    assert timings["cache_n"] == 0 and timings["pruned_n"] > 10 and first == fresh(red, " Which colour has the ball?")
    second, timings = ask(llm, red, " Where is the dog?")
    image_and_begin = timings["cache_n"]
    assert image_and_begin >= 6 and second == fresh(red, " Where is the dog?")
    other, timings = ask(llm, blue, " Where is the dog?")
    assert 0 < timings["cache_n"] < image_and_begin and other == fresh(blue, " Where is the dog?")
    deeper, timings = ask(llm, blue, " Where is the dog?", pop=False)
    assert deeper == fresh(blue, " Where is the dog?", pop=False)
    text = llm.create_completion("Once upon a time", max_tokens=4, temperature=0)["choices"][0]["text"]
    alone = open_model()
    assert text == alone.create_completion("Once upon a time", max_tokens=4, temperature=0)["choices"][0]["text"]
    alone.close()
    shallow, timings = ask(llm, blue, " Where is the dog?", boundary=2)
    assert timings["pruned_n"] > 10 and shallow == fresh(blue, " Where is the dog?", boundary=2)
    deeper, timings = ask(llm, blue, " Where is the dog?")
    assert timings["cache_n"] <= 1 and deeper == fresh(blue, " Where is the dog?")  # fewer layers had read all but the first token
    llm.close()


IMAGE_TASK = """\
task: look
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_image: !function look.images
doc_to_target: answer
process_results: !function look.results
generation_kwargs: {{until: ["<|endoftext|>"], max_gen_toks: 6}}
metric_list: [{{metric: same, aggregation: mean, higher_is_better: true}}]
"""
IMAGE_CODE = """\
from PIL import Image
def images(doc):
    return [Image.new("RGB", (56, 56), tuple(colour)) for colour in doc["colours"]]
def results(doc, answers):
    return {"same": float(answers[0] == doc["answer"])}
"""


@pytest.mark.slow
@pytest.mark.parametrize("converted", [qwen3vl], indirect=True, ids=["qwen3vl"])
def test_harness_tasks_with_images_reach_the_projector(converted, tmp_path, capsys):
    """MMMU's format: <image> marks in the text, images beside it. Answers are the model's own, so the whole model scores 1."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'pypop-gguf[eval]'")
    from PIL import Image

    from pypop_gguf.tools import lm_eval_model

    projector = converted.with_name("mmproj-text.gguf")
    handler = llama_cpp.llama_chat_format.MTMDChatHandler(str(projector), verbose=False)
    llm = PopLlama(str(converted), n_ctx=256, n_batch=256, chat_handler=handler, n_threads=1, n_threads_batch=1, verbose=False)
    model, options = lm_eval_model.PopLM(llm, 6), {"until": ["<|endoftext|>"], "max_gen_toks": 6}
    documents = []
    for colour in ((255, 0, 0), (0, 80, 255)):
        question = "Which colour has the <image> ball of Lily?"
        answer = model._generate(question, options, {"visual": [Image.new("RGB", (56, 56), colour)]})
        documents.append({"question": question, "colours": [colour], "answer": answer})
    llm.close()
    assert documents[0]["answer"] != documents[1]["answer"]  # what is in the image changes the answer
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "look.yaml").write_text(IMAGE_TASK.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "look.py").write_text(IMAGE_CODE)
    command = ["eval", str(converted), "--lm-eval", "look", "--task-dir", str(tmp_path), "--context", "256", "--threads", "1", "--json"]
    assert cli.main([*command, "--mmproj", str(projector), "--boundary", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["lm_eval"]
    assert found["6"]["look"]["same,none"] == 1.0 and found["1"]["look"]["same,none"] < 1.0
    assert cli.main([*command, "--boundary", "1"]) == 1
    assert "multimodal" in capsys.readouterr().err
