"""Adapters (LoRA-like files): reading them, matching them to a model, and what they change."""
