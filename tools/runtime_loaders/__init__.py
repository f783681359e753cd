"""Loaders of other programs, each run in an environment of its own (tools/runtimes.py), on a CPU, without svdq."""
