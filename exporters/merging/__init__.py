"""Merges checkpoints: weighted sums and differences, streamed, with weights for each block. numpy only."""
