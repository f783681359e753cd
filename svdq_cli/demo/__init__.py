"""The embedded model: its folder, its stress variant with outliers, the scenes and captions that it was trained on."""
