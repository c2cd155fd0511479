"""The second backend: GGUF models. llama.cpp computes, finemoe decides which experts are in memory."""
