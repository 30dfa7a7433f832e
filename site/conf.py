"The site: the executed notebooks as pages. `python tools/site.py` prepares and builds it"
import os

project = 'nwrepro'
author = 'The nwrepro authors'
copyright = '2026 onwards, ' + author
extensions = ['myst_nb']
root_doc = 'index'
nb_execution_mode = 'off'  # outputs are those that are committed
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 4
myst_update_mathjax = False
mathjax_path = 'MathJax/MathJax.js'  # served along, so that the site needs no other host
mathjax2_config = {'jax': ['input/TeX', 'output/SVG'], 'SVG': {'font': 'STIX-Web'}, 'extensions': ['tex2jax.js', 'AssistiveMML.js'],  # paths, no web font
                   'TeX': {'extensions': ['AMSmath.js', 'AMSsymbols.js']}, 'showMathMenu': False,
                   'tex2jax': {'inlineMath': [['\\(', '\\)']], 'displayMath': [['\\[', '\\]']]}}
html_favicon = 'favicon.svg'
html_theme = 'sphinx_book_theme'
html_title = 'nwrepro'
html_theme_options = {'repository_url': 'https://github.com/nwrepro/nwrepro', 'use_repository_button': True, 'show_navbar_depth': 1, 'home_page_in_toc': True}
html_context = {'default_mode': 'auto'}
html_static_path = [os.environ['SITE_STATIC']]
exclude_patterns = ['_static', '_build']
html_copy_source = False
html_show_sourcelink = False
