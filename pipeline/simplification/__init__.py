"""The rewrites that bring a float graph into the form of the quantizer and the targets, and who applies them."""
