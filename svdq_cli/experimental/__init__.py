"""What works in emulation and is not proven yet: nothing outside depends on it but by a user's word."""
