"""LoRA files: read under whatever names their trainers gave, fitted to a model, merged into its weights."""
