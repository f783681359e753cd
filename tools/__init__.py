"""Scripts for developers: benchmarks, accuracy of predictions, training of the demo. Not in the wheel."""
