"""Settings of the commands that train: frozen dataclasses that tyro reads."""
