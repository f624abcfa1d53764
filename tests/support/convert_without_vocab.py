"""Writes F32 GGUFs of tiny Hugging Face models that have no tokenizer, with llama.cpp's own converter.

``convert_without_vocab.py CONVERTER_DIR MODEL_DIR...`` writes MODEL_DIR/model.gguf for each model. This is a process of
its own, because the converter brings its own copy of the gguf package.
"""

import sys
from pathlib import Path


def main() -> None:
    converter, *models = map(Path, sys.argv[1:])
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]

    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    for directory in models:
        with torch.inference_mode():
            hparams = ModelBase.load_hparams(directory, False)
            model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT), mmproj=False)
            model_class.set_vocab = model_class._set_vocab_none
            # Without this, the converter for Qwen 3.5 would expect a layer that predicts further tokens.
            model_class.no_mtp = not hparams.get("num_nextn_predict_layers")
            model = model_class(directory, gguf.LlamaFileType.ALL_F32, directory / "model.gguf", eager=True)
            model.gguf_writer.add_vocab_size(hparams.get("text_config", hparams)["vocab_size"])
            model.write()


if __name__ == "__main__":
    main()
