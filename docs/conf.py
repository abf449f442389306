"""Sphinx's configuration of these pages: `make docs` builds them, with every warning an error.

Nothing is fetched, neither at build time nor by a reader's browser: the theme's fonts are the system's, and search runs
in the page.
"""

from moe_train import __version__

project = "moe_train"
release = version = __version__
copyright = "the moe_train authors"

extensions = ["myst_parser"]
exclude_patterns = ["README.md"]
nitpicky = True
source_suffix = {".md": "markdown"}
root_doc = "index"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"moe_train {__version__}"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"
