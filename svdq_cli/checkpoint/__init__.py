"""Converted checkpoints: read, written, checked."""
