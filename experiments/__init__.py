"""Experiments that use ngalore_jax: pretraining, comparison, later fine-tuning."""
