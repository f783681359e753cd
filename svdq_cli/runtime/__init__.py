"""Modules that compute what the 4-bit runtimes compute, in plain torch."""
