"""Loading and saving models: checkpoints, safetensors files, Hugging Face's format, the hub."""
