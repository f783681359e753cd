"""How close a converted model is to its source: pictures, layers, and a sheet to look at."""
