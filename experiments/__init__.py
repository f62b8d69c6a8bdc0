"""Experiments that use ngalore_jax: pretraining, comparison, fine-tuning."""
