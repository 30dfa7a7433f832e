"""README.md is the rendering of nbs/index.ipynb.

python tools/readme.py           writes README.md, and the figures it shows into nbs/images/
python tools/readme.py --check   changes nothing, exits 1 with a sentence where they are out of date
"""
import argparse, posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, README, IMAGES = 'nbs/index.ipynb', 'README.md', 'nbs/images'
PREFIX = 'index_'  # of the figures this script owns
CODE = re.compile(r'(```.*?```|`[^`\n]*`)', re.S)
BLANK = re.compile(r'\n(?:[ \t]*\n){2,}')
LINK = re.compile(r'(\]\(|^\[[^\]\n]+\]:[ ]+|(?:src|href)=")([^)\s"]+)', re.M)
DIRECTIVE = re.compile(r'^#\|[ \t]*(.*)\n?', re.M)

def from_root(match):
    "A link written relative to nbs/, relative to the repository's root"
    before, target = match.groups()
    if re.match(r'[a-z][a-z0-9+.-]*:|[#/]', target, re.I): return before + target
    path, mark, anchor = target.partition('#')
    return before + posixpath.normpath(posixpath.join('nbs', path)) + mark + anchor

def outside_code(pattern, new, text):
    "`text` with what matches `pattern` replaced, code left alone"
    return ''.join(part if i % 2 else pattern.sub(new, part) for i, part in enumerate(CODE.split(text)))

def relink(text): return outside_code(LINK, from_root, text)

def prepared(nb):
    "The cells a reader of the README sees: `#| hide` drops a cell, `#| echo: false` its source"
    cells = []
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = relink(cell.source)
        if cell.cell_type == 'code':
            directives = [d.strip() for d in DIRECTIVE.findall(cell.source)]
            if 'hide' in directives: continue
            cell.source = DIRECTIVE.sub('', cell.source).strip('\n')
            if 'echo: false' in directives or not cell.source: cell.metadata['transient'] = {'remove_source': True}
            for output in cell.outputs:
                if 'text/markdown' in output.get('data', {}): output.data['text/markdown'] = relink(output.data['text/markdown'])
        cells.append(cell)
    nb.cells = cells
    nb.metadata['language_info'] = {'name': 'python'}  # nbdev_clean takes it away, and with it the language of the code fences
    return nb

def render():
    "What the files of the README should hold: `{path from the root: bytes}`"
    shown = ['text/markdown', 'image/svg+xml', 'image/png', 'image/jpeg', 'text/plain']  # GitHub strips the styles of HTML tables
    exporter = MarkdownExporter(config=Config({'NbConvertBase': {'display_data_priority': shown}}))
    names = {'unique_key': PREFIX.rstrip('_'), 'output_files_dir': IMAGES}
    text, resources = exporter.from_notebook_node(prepared(nbformat.read(ROOT/NOTEBOOK, 4)), names)
    text = outside_code(BLANK, '\n\n', text)
    text = f'<!-- generated from {NOTEBOOK} -->\n\n{text.strip()}\n'
    return {README: text.encode()} | {Path(k).as_posix(): v for k, v in resources['outputs'].items()}

def main():
    "Write the README, or only say whether it is up to date"
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing; exit 1 where the README is out of date')
    check = parser.parse_args().check
    wanted = render()
    there = {p.relative_to(ROOT).as_posix() for p in [ROOT/README, *(ROOT/IMAGES).glob(PREFIX + '*')] if p.exists()}
    stale = sorted(p for p in there | set(wanted) if p not in there or p not in wanted or (ROOT/p).read_bytes() != wanted[p])
    if check and stale: sys.exit(f"{', '.join(stale)} differs from the rendering of {NOTEBOOK}: run `python tools/readme.py`.")
    for path in stale:
        if path not in wanted: (ROOT/path).unlink(); continue
        (ROOT/path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/path).write_bytes(wanted[path])

if __name__ == '__main__': main()
