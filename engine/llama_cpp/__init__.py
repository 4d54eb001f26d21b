"""llama.cpp through the C API inside the ``xllamacpp`` wheel: GGUF models, KV moved in sealed pieces, a chunk each."""
