"Notebooks as pages of the site"
import importlib.util, json, subprocess, sys
import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location('site_tool', ROOT/'tools/site.py')
spec.loader.exec_module(site := importlib.util.module_from_spec(spec))

@pytest.mark.parametrize('text, expected', [
    ('see [data](../../data/README.md)', f'see [data]({site.REPOSITORY}data/README.md)'),
    ('see [pads](initialization.ipynb#Zero-padding-starves-small-maps)', 'see [pads](initialization.ipynb#zero-padding-starves-small-maps)'),
    ('see [below](#Measured-here)', 'see [below](#measured-here)'), ('see [paper](https://arxiv.org/abs/1709.08145)', 'see [paper](https://arxiv.org/abs/1709.08145)'),
    ('by `wn_weight` and `x`', 'by [`wn_weight`](layers.ipynb) and `x`'), ('```\n`wn_weight`\n```', '```\n`wn_weight`\n```'), ('[`wn_weight`](fast.ipynb)', '[`wn_weight`](fast.ipynb)')])
def test_links(text, expected): assert site.linked(text, 'methods/schemes.ipynb', dict(wn_weight='methods/layers.ipynb')) == expected

def test_a_page_shows_no_machinery():
    def code(*lines): return dict(cell_type='code', metadata={}, outputs=[], source=[f'{line}\n' for line in lines])
    page = dict(cells=[code('#| default_exp methods.layers'), code('#| export', 'import torch'), code('#| echo: false', 'shown()'), code('#| hide', 'nbdev_export()')])
    cells = site.prepared(page, 'methods/layers.ipynb', {})['cells']
    assert [c['source'] for c in cells] == ['import torch', 'shown()'] and cells[1]['metadata']['tags'] == ['remove-input'] and not cells[0]['metadata']

def test_every_page_is_in_the_contents_once():
    pages = [p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb') if p.name != 'index.ipynb' and '.ipynb_checkpoints' not in p.parts]
    listed = [line for line in site.contents(pages).splitlines() if line in pages]
    assert sorted(listed) == sorted(pages)

def test_names_lead_to_pages_that_are_there():
    names = site.symbols()
    assert len(names) > 100 and names['wn_weight'] == 'methods/layers.ipynb' and all((ROOT/'nbs'/page).is_file() for page in names.values())

@pytest.mark.slow
def test_the_site_builds_without_a_warning(project):
    pytest.importorskip('sphinx', reason="the site's packages are not installed: pip install -e '.[docs]'")
    done = subprocess.run([sys.executable, 'tools/site.py'], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((project/'_docs/searchindex.js').read_text().removeprefix('Search.setIndex(').rstrip(')'))['docnames']
