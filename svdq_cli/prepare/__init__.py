"""Where recipe and model meet: options, sources, prompts, sampling settings, and the plan of every layer."""
