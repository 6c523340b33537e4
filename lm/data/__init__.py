"""Text to batches: sources, cleaning, tokenizers, token stores, packing, loading."""
