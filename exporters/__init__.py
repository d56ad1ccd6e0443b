"""Checkpoints and adapters in, bundles out; torch only to trace an architecture that does not ship."""
