"""Training of the demo model and its LoRA, from nothing."""
