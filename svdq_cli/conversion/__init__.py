"""From a prepared model to its outputs: calibrate, allocate, solve, reconstruct, pack, check; kept in a work folder."""
