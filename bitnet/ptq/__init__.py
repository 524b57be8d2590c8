"""Post-training quantization of whole models."""
