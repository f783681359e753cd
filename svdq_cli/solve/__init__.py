"""The mathematics of one shared input: smoothing factor, low-rank branch, 4-bit codes (SVDQuant, arXiv 2411.05007)."""
