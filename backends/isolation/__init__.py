"""Backends in a child process: an engine that aborts or hangs takes only the child with it."""
