"""What becomes of every layer: the model's inventory, its structure, the rules of its family and of the recipe."""
