"""Sphinx settings of the documentation's site: `make docs`.

The source folder is the repository, so that the links of its pages hold on the site as they do
in the repository. What only the site has is written by `docs/site_pages.py`.
"""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "fedllm"
author = "the authors of fedllm"
version = release = version_of("fedllm")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docs.site_pages"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/methods/*.md",
    "slurm/ADMIN.md",
    "examples/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = [".venv", "runs", "models", "build", ".git"]

myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
suppress_warnings = ["myst.header"]
default_role = "code"
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
toc_object_entries = False

html_theme = "furo"
html_title = f"fedllm {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1a5fb4", "color-brand-content": "#1a5fb4"},
    "dark_css_variables": {"color-brand-primary": "#8ab4f8", "color-brand-content": "#8ab4f8"},
}
