"""How Sphinx makes the site from the Markdown files: `make docs`. Nothing is loaded from a network, then or later."""

import importlib.metadata

project = "edgeship"
author = "the edgeship authors"
release = importlib.metadata.version("edgeship")
extensions = ["myst_parser"]
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
html_theme = "furo"
html_title = f"edgeship {release}"
html_show_copyright = False
html_copy_source = False
suppress_warnings = ["myst.header"]
