"""Textual inversion: tokens with vectors of their own, as rows of the text encoder's embedding table."""
