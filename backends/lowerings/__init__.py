"""Rewrites of a canonical graph into what one engine runs best; the weights stay in their file."""
