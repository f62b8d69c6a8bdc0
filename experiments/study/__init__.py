"""Arms of an experiment, tuned alike, run over seeds and set side by side."""
