"""llama.cpp through the C API inside the ``xllamacpp`` wheel: GGUF models, KV moved whole, a sequence at a time."""
