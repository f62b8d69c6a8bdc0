"""Models trained by the experiments, in Flax NNX."""
