"""Runs llama-cpp-python's own server with PopLlama in the place of Llama, for bench_server.py."""

from pypop_gguf import PopLlama

if __name__ == "__main__":
    import llama_cpp

    llama_cpp.Llama = PopLlama
    from llama_cpp.server.__main__ import main

    main()
