"""What the compiler makes of a training step, without running it."""
