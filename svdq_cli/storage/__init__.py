"""Files: written whole or not at all, safetensors, JSON, and where data is kept."""
