"""How close a converted model is to its source: images, layers, and a report to look at."""
