"""Function calling: a Llama that plans calls of tools, as TinyAgent does."""
