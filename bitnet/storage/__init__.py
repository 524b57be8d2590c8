"""Models on disk, in and out: our own folders, Hugging Face folders, GGUF files. Knows no engine and no optimizer."""
