"""The machine: memory, threads, devices, processes."""
