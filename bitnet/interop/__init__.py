"""Models of other tools, in and out: Hugging Face folders and GGUF files."""
