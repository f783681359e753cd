"""A converted model in a user's hands: what diffusers' own methods do on it."""
