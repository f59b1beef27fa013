"""Rules for the scales of GGUF's block types, and ggml's searches for them, bitwise equal."""
