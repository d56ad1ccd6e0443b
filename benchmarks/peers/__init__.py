"""Other projects on the same weights, prompt and size, each in a virtual environment of its own."""
