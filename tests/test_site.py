"Notebooks as pages of the site"
import functools, http.server, importlib.util, json, os, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from urllib.parse import unquote, urlparse
import pytest
from conftest import ROOT, git_files

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

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The site, built from a copy of the project"
    pytest.importorskip('sphinx', reason="the site's packages are not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp('site')
    for name in git_files():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, folder/name)
    done = subprocess.run([sys.executable, 'tools/site.py'], cwd=folder, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(folder)))
    assert done.returncode == 0, done.stderr
    return folder/'_docs'

class Page(HTMLParser):
    "Addresses and ids of a page"
    def __init__(self, text):
        super().__init__()
        self.addresses, self.ids = [], set()
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        self.addresses += [at[name] for name in ('href', 'src') if at.get(name)]
        if 'id' in at: self.ids.add(at['id'])

@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_the_report_and_a_search(built):
    assert json.loads((built/'searchindex.js').read_text().removeprefix('Search.setIndex(').rstrip(')'))['docnames']
    assert 'href="report/index.html"' in (built/'index.html').read_text() and (built/'report/index.html').is_file()

@pytest.mark.slow
def test_no_link_of_the_site_is_dead(built):
    pages = {path: Page(path.read_text(encoding='utf-8')) for path in built.rglob('*.html') if '_static' not in path.parts}
    dead = []
    for path, page in pages.items():
        for address in page.addresses:
            url = urlparse(address)
            if url.scheme or url.netloc: continue
            target = (path.parent/unquote(url.path)).resolve() if url.path else path
            if not target.exists(): dead.append((path.name, address))
            elif url.fragment and target in pages and not {url.fragment, unquote(url.fragment)} & pages[target].ids: dead.append((path.name, address))
    assert len(pages) > 50 and dead == []

TYPESET = """() => {  // every equation is drawn, and has its text for those who cannot see it
    const [drawn, told] = ['.MathJax_SVG svg', '.MJX_Assistive_MathML'].map(found => document.querySelectorAll(found).length);
    return drawn > 0 && drawn == told && drawn == document.querySelectorAll('script[type^="math/tex"]').length }"""

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass

@pytest.mark.slow
@pytest.mark.parametrize('width', [1280, 380])
@pytest.mark.parametrize('page', ['index.html', 'methods/layers.html', 'results/claims.html', 'report/index.html'])
def test_in_a_browser_nothing_is_wrong(built, browser, page, width):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright', reason='axe-playwright-python is not installed: pip install -e .[dev]')
    said = []
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=built)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab = browser.new_context(viewport=dict(width=width, height=900)).new_page()
        tab.on('console', lambda message: said.append(f"{message.text} {message.location['url']}") if message.type == 'error' else None)
        tab.on('pageerror', lambda error: said.append(str(error)))
        tab.goto(f'http://127.0.0.1:{server.server_port}/{page}')
        if page == 'methods/layers.html': tab.wait_for_function(TYPESET)
        assert tab.evaluate('document.documentElement.scrollWidth') <= width and said == []
        found = axe.Axe().run(tab).response['violations']
        assert [(v['id'], v['nodes'][0]['html']) for v in found if v['impact'] in ('serious', 'critical')] == []
        server.shutdown()
