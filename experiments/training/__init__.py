"""The training loop and its parts, shared by every experiment."""
