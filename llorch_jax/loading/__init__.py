"""Models from and to disk: checkpoints, safetensors files, Hugging Face's format, the hub."""
