"""Examine a machine for running Kiln: what is there, what is missing, and the line to type."""
