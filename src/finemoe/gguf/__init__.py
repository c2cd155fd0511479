"""GGUF backend: llama.cpp runs the compute graph, finemoe decides which experts are in memory."""
