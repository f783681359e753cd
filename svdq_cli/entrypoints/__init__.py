"""One module for each command that has no room of its own: what `svdq NAME` does, as a function with a report."""
