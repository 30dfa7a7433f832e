"""The site: notebooks as pages, with contents, search, and the report within

pip install -e '.[docs]' && python tools/site.py     writes _docs/index.html, without the network; a warning is an error
"""
import ast, json, os, posixpath, re, shutil, subprocess, sys, tempfile
from pathlib import Path
from nwrepro.results.command import make_report

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/'_docs'
REPOSITORY = 'https://github.com/nwrepro/nwrepro/blob/main/'
GROUPS = {'To run': ('train', 'sweep', 'cost', 'report', 'cli'), 'Methods': ('methods/', 'common'), 'Training': ('training/', 'known'), 'Experiments': ('experiments/',), 'Results and cost': ('results/', 'cost/')}

def slug(heading): return re.sub(r'[^\w\- ]', '', heading.lower().replace('-', ' ')).replace(' ', '-')

def symbols():
    "Public name -> page that defines it"
    index = ast.literal_eval((ROOT/'nwrepro/_modidx.py').read_text().split('d = ', 1)[1])['syms']
    names = {}
    for module, found in index.items():
        for full in found:
            name = full.removeprefix(module+'.')
            if '.' not in name: names.setdefault(name, []).append(module.removeprefix('nwrepro.').replace('.', '/')+'.ipynb')
    return {name: pages[0] for name, pages in names.items() if len(pages) == 1 and (len(name) > 6 or '_' in name)}

def linked(text, page, names):
    "Links out of nbs/ lead to the repository, links to headings to their anchors, names in code to the page that defines them"
    def link(match):
        target = match[2]
        if re.match(r'[a-z]+:', target): return match[0]
        if target.startswith('#'): return f'{match[1]}#{slug(target[1:])})'
        path, _, anchor = target.partition('#')
        whole = posixpath.normpath(posixpath.join('nbs', posixpath.dirname(page), path))
        if not whole.startswith('nbs/') or not whole.endswith('.ipynb') and not (ROOT/whole).suffix in ('.png', '.svg'): return f'{match[1]}{REPOSITORY}{whole})'
        return f"{match[1]}{path}{'#'+slug(anchor) if anchor else ''})"
    def name(match):
        home = names.get(match[1])
        return f'[`{match[1]}`]({posixpath.relpath(home, posixpath.dirname(page) or ".")})' if home and home != page else match[0]
    parts = re.split(r'(```.*?```)', text, flags=re.S)
    return ''.join(part if k % 2 else re.sub(r'(?<![\[`\w])`(\w+)`(?![\]`])', name, re.sub(r'(\]\()([^)\s]+)\)', link, part)) for k, part in enumerate(parts))

def prepared(notebook, page, names):
    "A notebook as a reader of the site sees it: no directives, no machinery of nbdev"
    cells = []
    for cell in notebook['cells']:
        text = ''.join(cell['source'])
        directives = [line[2:].strip() for line in text.splitlines() if line.startswith('#|')]
        if any(d.split()[:1] in (['hide'], ['default_exp']) for d in directives): continue
        text = '\n'.join(line for line in text.splitlines() if not line.startswith('#|')).strip('\n')
        if cell['cell_type'] == 'markdown': text = linked(text, page, names)
        if 'echo: false' in directives: cell['metadata']['tags'] = ['remove-input']
        for output in cell.get('outputs', []):
            if 'text/markdown' in output.get('data', {}):  # Sphinx leaves links in outputs as they are
                text_out = linked(''.join(output['data']['text/markdown']), page, names)
                output['data']['text/markdown'] = re.sub(r'(\]\([^):]*)\.ipynb', r'\1.html', text_out)
        cells.append(cell | {'source': text})
    return notebook | {'cells': cells}

def contents(pages):
    "The contents as Sphinx reads them, in the order of the README"
    order = re.findall(r'\]\((?:nbs/)?([\w/]+\.ipynb)\)', (ROOT/'README.md').read_text().partition('## Contents')[2])
    rank = {name.removesuffix('.ipynb'): k for k, name in reversed(list(enumerate(order)))}
    def of(group): return [p for p in pages if p in group or '/' in p and p.partition('/')[0]+'/' in group]
    return '\n\n'.join(f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(sorted(of(group), key=lambda p: (rank.get(p, 99), p))) + '\n```' for caption, group in GROUPS.items())

def prepare(folder):
    "Sources for Sphinx"
    names, pages = symbols(), sorted(p.relative_to(ROOT/'nbs').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    for page in pages:
        notebook = prepared(json.loads((ROOT/'nbs'/page).read_text(encoding='utf-8')), page, names)
        if page == 'index.ipynb': notebook['cells'].append(dict(cell_type='markdown', id='contents', metadata={}, source=REPORT+'\n\n'+contents([p.removesuffix('.ipynb') for p in pages if p != 'index.ipynb'])))
        (folder/page).parent.mkdir(parents=True, exist_ok=True)
        (folder/page).write_text(json.dumps(notebook), encoding='utf-8')
    import nbclassic
    shutil.copytree(Path(nbclassic.__file__).parent/'static/components/MathJax', folder/'_static'/'MathJax')

REPORT = '<p><a href="report/index.html">The report of the first study</a>: the answer, every claim, every run.</p>'

def write_report(out):
    "The page of a report; files of runs are in the repository"
    page = make_report(ROOT/'reports/study', out, ROOT/'reports/cost')
    page.write_text(re.sub(r'href="[./]*/reports/', f'href="{REPOSITORY}reports/', page.read_text(encoding='utf-8')), encoding='utf-8')

def main():
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        built = Path(folder)/'_build'/'html'
        done = subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-j', '2', '-c', str(ROOT/'site'), folder, str(built)],
                              cwd=folder, env=os.environ | dict(SITE_STATIC=str(Path(folder)/'_static')))
        if not done.returncode:
            shutil.rmtree(OUT, ignore_errors=True)
            shutil.move(built, OUT)
    if not done.returncode: write_report(OUT/'report')
    return done.returncode

if __name__ == '__main__': raise SystemExit(main())
