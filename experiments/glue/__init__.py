"""Fine-tuning of encoders on GLUE."""
