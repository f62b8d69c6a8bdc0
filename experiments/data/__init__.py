"""Text to batches: corpora, tokenizers and the input pipeline."""
