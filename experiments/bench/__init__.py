"""Speed, memory and compile time of our optimizers and of their peers, side by side."""
