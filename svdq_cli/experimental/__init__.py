"""What works in emulation and is not proven yet: used only where the user asks for it."""
