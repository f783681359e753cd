"""Loading and running a converted model, and what diffusers' own methods do on it."""
