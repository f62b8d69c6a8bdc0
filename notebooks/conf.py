"""The documentation: Sphinx reads the notebooks, the guide and the docstrings.

uv run --group docs sphinx-build -n -W notebooks build/docs
"""

import importlib.metadata

project = "ngalore-jax"
version = release = importlib.metadata.version("ngalore-jax")
author = copyright = "The ngalore-jax authors"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = "ngalore-jax"
exclude_patterns = ["**/.ipynb_checkpoints"]

# The outputs that the notebooks hold; CI executes them in a test of its own.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Types that fields of named tuples show; no page here describes them.
nitpick_ignore_regex = [
    ("py:class", r"(jax|numpy|collections\.abc)\..*|ArrayTree"),
]
autodoc_typehints = "none"  # in the signature they would hide it
napoleon_custom_sections = ["Shapes", "Memory"]
napoleon_use_rtype = False
