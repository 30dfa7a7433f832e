"The page of a report: on real runs, on nothing, on broken folders, on thousands of folders, and in a real browser"
import contextlib, dataclasses, html, json, math, os, re, shlex, shutil, subprocess, sys, time
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import pandas, pytest

from conftest import ROOT, run_in
from nwrepro.results.accuracy import against_bn
from nwrepro.results.variants import comparable
from nwrepro.results.claims import CLAIMS, judge
from nwrepro.results.claim_figures import FIGURES, claim_picture
from nwrepro.results.figures import SCHEME_STYLES, RunCache, tidy_runs
from nwrepro.results.lr_figures import limit_numbers
from nwrepro.results.page import cost_commands, draw_figures, figure_commands, format_cell, training_command, write_page
from nwrepro.results.run_figures import run_caption
from nwrepro.results.wording import answer, evidence
from nwrepro.training.records import load_runs
from nwrepro.training.runs import Run, run_name

FIRST_LOOK = ROOT/'reports/first_look'
ORIGIN = dict(versions=dict(torch='2.14.1'), machine=dict(cpu='made-up processor', gpus=[]), date='2026-01-01T00:00:00+00:00')
BLOCKS = ['conv1', *(f'layer{s}.{b}{part}' for s in (1, 2) for b in (0, 1) for part in ('.conv1', '.conv2', ''))]

def config(norm='wn', **changes):
    "Parameters of a made-up run"
    given = dict(norm=norm, init='torch', data='digits', train_images=None, arch='resnet18', strides='v1', recipe='modern', epochs=4,
                 max_steps=None,
                 batch_size=32, lr=0.1, weight_decay=1e-4, dropout=0., image_size=24, seed=0) | changes
    return given | dict(given=dict(norm=norm, data_dir='somewhere/else'), source=dict(name='digits', fingerprint='0', classes=10,
        train=1000, val=797))

def lines(top1):
    "A record: evaluations, training batches and probes"
    for epoch in range(5):
        yield dict(event='eval', step=10*epoch, epoch=float(epoch), val_loss=1., top1=top1*epoch/4, train_loss=1.,
                   train_top1=(top1+5)*epoch/4)
        yield dict(event='probe', step=10*epoch, epoch=float(epoch), outputs=dict(layer=BLOCKS, rms=[1.+0.1*k for k in range(len(BLOCKS))],
            l2=[2.]*len(BLOCKS)),
                   coherence=dict(layer=BLOCKS[1::3], mean=[0.1*k+0.1 for k in range(len(BLOCKS[1::3]))], max=[0.9]*len(BLOCKS[1::3])))
        yield dict(event='train', step=10*epoch+5, epoch=epoch+0.5, loss=1., top1=top1*epoch/4, lr=0.1, images=320.)

def make(folder, status='finished', top1=60., **changes):
    "A made-up run on disk, written as a real one is"
    values = config(**changes)
    run = Run(run_name(values), folder, folder.parent/'checkpoints')
    run.begin(values, ORIGIN)
    if status == 'started': return run
    for line in lines(top1): run.log(**line)
    ends = dict(top1=top1, train_top1=top1+5, img_per_s=100., verdict='learning') if status == 'finished' else dict(diverged_step=7,
        diverged_reason='loss is nan')
    run.finish(status, **ends)
    return run

def many(folder):
    "Three schemes, three seeds, two learning rates, a grid of dropout, and short probes"
    for norm in ('bn', 'wn', 'np'):
        for seed in range(3):
            make(folder, norm=norm, seed=seed, top1=60.+seed+5*(norm == 'bn'))
            make(folder, norm=norm, seed=seed, lr=1., status='finished' if norm == 'bn' else 'diverged')
            make(folder, norm=norm, seed=seed, dropout=0.5)
            for lr in (0.05, 0.1): make(folder, norm=norm, seed=seed, lr=lr, max_steps=5)

def page_of(folder, out):
    "The page of a folder of runs, as report.ipynb makes it"
    costs = folder.parent/'cost' if (folder.parent/'cost').is_dir() else None
    runs, cache = load_runs(folder), RunCache(folder, costs)
    verdicts = judge(runs, folder, costs)
    return write_page(verdicts, draw_figures(verdicts, comparable(runs), cache), runs, cache, out)

class Seen(HTMLParser):
    "Links, images, ids and text of a page"
    def __init__(self, text):
        super().__init__()
        self.links, self.sources, self.ids, self.words = [], [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        if 'href' in at: self.links.append(at['href'])
        if 'src' in at: self.sources.append(at['src'])
        if 'id' in at: self.ids.append(at['id'])
    def handle_data(self, data): self.words.append(data)

def check(page):
    "What holds for every page: self-contained, no dead link, three sentences, a section per claim, twenty words of evidence at most"
    text = page.read_text()
    seen = Seen(text)
    assert [s for s in seen.sources if not s.startswith('data:')] == []
    assert [u for u in re.findall(r'url\(["\']?([^)"\']*)', text) if not u.startswith(('data:', '#'))] == [] and '@import' not in text
    remote = [link for link in seen.links if urlparse(link).scheme not in ('', 'data')]
    dead = [link for link in seen.links if not link.startswith(('#', 'data:')) and not (page.parent/unquote(link)).is_file()]
    anchors = [link for link in seen.links if link.startswith('#') and link[1:] not in seen.ids]
    assert (remote, dead, anchors) == ([], [], []) and len(seen.ids) == len(set(seen.ids))
    assert re.search(r'<ol>(.*?)</ol>', text, re.S)[1].count('<li>') == 3
    assert set(CLAIMS) <= set(seen.ids)
    assert all(len(words.split()) <= 20 for words in re.findall(r'<br><small>(.*?)</small>', text))
    return ' '.join(''.join(seen.words).split()), seen

# figures

COST = dict(arch='resnet18', image_size=24, batch_size=32, precision='bf16', channels_last=True, device='cpu', hardware='made-up processor',
            seconds=dict(bn=[1.2, 1.21, 1.19, 1.2, 1.2, 1.22, 1.18, 1.2], none=[1.]*8, wn=[1.1]*8))
OF_RUNS = [key for key in FIGURES if key not in ('C9', 'C10', 'C11')]  # of the made-up runs; C9 asks for another network

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Made-up runs, their page and their pictures"
    folder = tmp_path_factory.mktemp('report')/'runs'
    many(folder)
    (folder.parent/'cost').mkdir()
    (folder.parent/'cost'/'made.json').write_text(json.dumps(COST))
    runs = load_runs(folder)
    return folder, page_of(folder, folder.parent/'page'), draw_figures(judge(runs, folder), comparable(runs), RunCache(folder, folder.parent/'cost'))

@pytest.mark.parametrize('key', ['C1', 'C2', 'C4', 'C7'])
def test_a_scheme_looks_the_same_in_every_figure(made, key):
    lines = [line for ax in made[2][key].figure.axes for line in ax.lines if line.get_marker() not in ('.', 'None')]
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert looks == {SCHEME_STYLES[norm] for norm in ('bn', 'wn', 'np')}

def test_looks_differ_in_colour_and_in_marker():
    assert len({colour for colour, _ in SCHEME_STYLES.values()}) == len({marker
        for _, marker in SCHEME_STYLES.values()}) == len(SCHEME_STYLES)

@pytest.mark.parametrize('key', OF_RUNS)
def test_a_caption_says_what_a_reader_must_know(made, key):
    words = made[2][key].caption
    for part in ('n = ', 'seed', 'digits', 'resnet18', '1000 training and 797 test images', '24 px', '4 epochs', 'batch 32',
                 'modern recipe', 'made-up processor'):
        assert part in words, part

@pytest.mark.parametrize('key', OF_RUNS)
def test_numbers_beneath_a_figure_are_those_drawn(made, key):
    numbers = made[2][key].numbers
    assert len(numbers) and set(numbers['scheme']) == dict(C3={'bn', 'wn'}, C8={'wn'}).get(key, {'bn', 'wn', 'np'})

def test_the_figures_of_cost_need_records_and_no_runs(made, tmp_path):
    share, ratio = made[2]['C10'], made[2]['C11']
    assert share.numbers['value'].tolist() == [pytest.approx(100/6)] and ratio.numbers.set_index('scheme').value.to_dict() == dict(
        wn=pytest.approx(1.1/1.2))
    for part in ('8 rounds', 'resnet18', '24 px', 'batch 32', 'bf16', 'channels_last', 'period recipe', 'n = 1',
                 'made-up processor'): assert part in share.caption and part in ratio.caption, part
    (tmp_path/'cost').mkdir()
    (tmp_path/'cost'/'torn.json').write_text('{"arch": "resn')
    (tmp_path/'cost'/'made.json').write_text(json.dumps(COST))
    words, seen = check(page_of(tmp_path/'runs', tmp_path/'page'))
    assert {'again-C10', 'again-C11'} <= set(seen.ids) and 'papermill nbs/cost.ipynb reports/cost.ipynb' in words
    assert 'Percent of a step that bn takes: in bf16 16.7 (' in words and 'in 1 process' in words

def test_a_report_takes_no_records_of_cost_unless_they_are_given(tmp_path):
    words, seen = check(page_of(FIRST_LOOK, tmp_path/'page'))
    assert 'again-C10' in seen.ids and 'AMD' in words
    runs = load_runs(FIRST_LOOK)
    verdicts = {v.key: v for v in judge(runs, FIRST_LOOK)}
    assert [verdicts[key].verdict for key in ('C10', 'C11')] == ['not tested']*2 and evidence(verdicts['C10']) == 'no records of cost given'
    assert not {'C10', 'C11'} & set(draw_figures(list(verdicts.values()), comparable(runs), RunCache(FIRST_LOOK)))

def test_means_have_intervals_from_three_runs_on(made, tmp_path):
    three = made[2]['C1'].numbers.query('what == "mean" and scheme == "wn"').iloc[0]
    assert (three['n'], three['value']) == (3, 61.) and three['high']-three['low'] == pytest.approx(2*4.30265/3**0.5, rel=1e-4)
    make(tmp_path/'runs')
    one = claim_picture('C1', load_runs(tmp_path/'runs'), RunCache(tmp_path/'runs'))
    assert one.numbers['low'].isna().all()
    assert 'n = 1 finished of 1 started' in one.about

def test_the_strip_has_the_paper_s_values_and_says_how_they_are_known(made):
    picture = made[2]['C1']
    marks = [line.get_xdata()[0] for line in picture.figure.axes[1].lines if line.get_markerfacecolor() == 'none']
    assert marks == [73., 67.] and 'known second hand' in picture.caption

def test_figures_of_real_runs():
    runs, cache = load_runs(FIRST_LOOK), RunCache(FIRST_LOOK)
    pictures = draw_figures(judge(runs, FIRST_LOOK), comparable(runs), cache)
    assert set(pictures) == {'C1', 'C2', 'C3', 'C4', 'C7', 'C8'} and cache.damaged == {}
    assert all('n = 1 finished of 1 started' in p.caption and '64 px' in p.caption and 'period recipe' in p.caption
               for k, p in pictures.items() if k in OF_RUNS)

def test_a_caption_of_one_run_still_stands(): assert 'n = 1' in run_caption(config())

# the page

def test_page_of_real_runs(tmp_path):
    page = page_of(FIRST_LOOK, tmp_path/'page')
    words, seen = check(page)
    assert sorted(p.name for p in (page.parent/'figures').iterdir() if p.stem not in ('C10', 'C11')) == [f'{k}.{end}'
        for k in ('C1', 'C2', 'C3', 'C4', 'C7', 'C8') for end in ('png', 'svg')]
    assert len([link for link in seen.links if link.endswith('config.json')]) == len(list(FIRST_LOOK.iterdir()))
    assert '? undecided exploratory' in words and ' supported' not in words.split('C1: ')[0].replace('is not supported', '')

def test_page_of_many_runs_links_each_file_and_tells_the_commands(made):
    words, seen = check(made[1])
    runs = load_runs(made[0])
    assert sum(link.endswith('config.json') for link in seen.links) == sum(link.endswith('metrics.jsonl')
        for link in seen.links) == len(runs)
    assert f'papermill nbs/train.ipynb reports/{runs.run[0]}.ipynb -p norm {runs.norm[0]}' in words and 'data_dir' not in words
    assert {f'again-{key}' for key in FIGURES if key != 'C9'} <= set(seen.ids)

def linked(figure):
    "Names of runs that dots of a figure lead to"
    return [unquote(line.get_url().removeprefix('#run-')) for ax in figure.axes for line in ax.lines if line.get_url()]

@pytest.mark.parametrize('key', ['C1', 'C6'])
def test_every_dot_leads_to_its_run_and_says_what_it_is(made, key):
    folder, page, pictures = made
    runs, dots = load_runs(folder), linked(pictures[key].figure)
    assert dots and set(dots) <= set(pictures[key].runs) <= set(runs['run'])
    if key == 'C1': assert sorted(dots) == sorted(pictures[key].runs)
    svg = re.search(f'<svg [^>]*aria-label="{CLAIMS[key].title}:.*?</svg>', page.read_text(), re.S)[0]
    links = re.findall(r'<a href="(#run-[^"]*)" aria-label="([^"]*)">', svg)
    ids = Seen(page.read_text()).ids
    assert len(links) == len(dots) and all(link[1:] in ids for link, _ in links)
    by = runs.set_index('run')
    for link, words in links:
        run = by.loc[unquote(link.removeprefix('#run-'))]
        assert words.startswith(f'{run.norm}, ') and f'seed {run.seed}' in words and f'lr {run.lr:g}' in words

def test_a_saved_figure_leads_to_the_page(made):
    text = (made[1].parent/'figures'/'C1.svg').read_text()
    links = re.findall(r'<a href="([^"]*)"', text)
    assert links and all(link.startswith('../index.html#run-') for link in links)

def test_an_analogue_never_has_the_wording_of_a_claim(made):
    runs = load_runs(made[0])
    decided = [v for v in judge(runs, made[0]) if v.verdict in ('supported', 'contradicted')]
    assert decided and all(v.kind == 'analogue' for v in decided)
    text = made[1].read_text()
    chips = re.findall(r'<span class="chip ([^"]*)"><span aria-hidden="true">.</span> ([^<]*)</span>', text)
    assert ('supported', 'agrees in direction') in chips and not {'supported', 'contradicted'} & {word for _, word in chips}
    tested = [v for v in judge(runs, made[0], made[0].parent/'cost') if v.verdict != 'not tested']
    assert text.count(', not the claim itself') == len(tested)+len(against_bn(runs))  # in the claim's section, and in the rows beside bn

def test_a_page_shows_how_the_rates_were_chosen(tmp_path):
    runs = [make(tmp_path/'runs', lr=lr, holdout=0.2, epochs=epochs, top1=50-100*lr)
            for lr, epochs in ((0.1, 2), (0.2, 2), (0.4, 2), (0.1, 4), (0.2, 4))]
    words, seen = check(page_of(tmp_path/'runs', tmp_path/'page'))
    assert 'rates' in seen.ids and (tmp_path/'page/figures/rates.png').is_file() and all(f'reports/{run.name}.ipynb' in words
        for run in runs)
    shared = re.search(r'In all rows: (.*?)\.(?!\d)', words)[1].split(', ')
    assert {'data digits', 'arch resnet18', 'holdout 0.2'} <= set(shared) and not any(part.startswith('epochs') for part in shared)
    _, seen = check(page_of(tmp_path/'nothing', tmp_path/'page'))
    assert 'rates' not in seen.ids and not (tmp_path/'page/figures/rates.png').exists()

def test_a_page_shows_what_other_starts_came_to(tmp_path):
    begun = [make(tmp_path/'runs', norm='bn', seed=seed, zero_init=zero, lr=lr, top1=60+10*zero+seed)
             for zero, lr in ((False, 0.1), (True, 0.2)) for seed in (0, 1, 2)]
    make(tmp_path/'runs', norm='bn', lr=0.4, max_steps=5)
    make(tmp_path/'runs', norm='bn', arch='resnet34')
    make(tmp_path/'runs', norm='wn', init='norm_preserving', lr=0.3, holdout=0.2)
    words, seen = check(page_of(tmp_path/'runs', tmp_path/'page'))
    again = re.search('<details id="again-inits">(.*?)</details>', (tmp_path/'page/index.html').read_text(), re.S)[1]
    assert 'Not drawn, as they differ in more: 1 of resnet34 on digits.' in words
    assert all(f'reports/{run.name}.ipynb' in again for run in begun) and 'max_steps' not in again and 'norm wn' not in again
    page_of(tmp_path/'nothing', tmp_path/'page')
    assert not (tmp_path/'page/figures/inits.png').exists()

def test_the_command_of_a_run_gives_its_numbers_in_full():
    words = training_command(dict(run='x', norm='wn', data='digits', seed=3., given=dict(lr=0.12345678, epochs=60, warmup_epochs=1.,
        dropout=None)))
    assert words == 'papermill nbs/train.ipynb reports/x.ipynb -p norm wn -p lr 0.12345678 -p epochs 60 -p warmup_epochs 1 -p dropout none -p data digits -p seed 3'

def test_commands_to_copy_survive_a_shell():
    odd = "it's in; my folder/$HOME `ls`.py"
    words = shlex.split(training_command(dict(run='x', norm=odd, data='digits', seed=0, given=dict(schemes=odd))))
    assert words[3:] == ['-p', 'norm', odd, '-p', 'schemes', odd, '-p', 'data', 'digits', '-p', 'seed', '0']
    picture = SimpleNamespace(numbers=pandas.DataFrame([dict(arch=odd, image_size=24, batch_size=32, precision='bf16')]), runs=())
    assert shlex.split(cost_commands(picture))[3:6] == ['-p', 'arch', odd]
    runs = pandas.DataFrame([dict(run=odd, norm='wn', data='digits', seed=0), dict(run='another', norm='wn', data='digits', seed=1)])
    first, last = map(shlex.split, figure_commands(SimpleNamespace(runs=(odd,)), runs, RunCache(ROOT/odd)).splitlines())
    assert first[2] == f'reports/{odd}.ipynb' and last[3:] == ['-p', 'runs', odd]

def test_the_commands_of_cost_make_the_records_that_are_shown(made):
    words, _ = check(made[1])
    assert 'papermill nbs/cost.ipynb reports/cost.ipynb -p arch resnet18 -p image_size 24 -p batch_size 32 -p precision bf16' in words

def test_a_figure_of_stability_tells_learning_from_not_diverging():
    rows = [(0, 0.5, 'learning'), (0, 1., 'learning'), (0, 2., 'stuck'), (0, 4., 'stuck'), (0, 8., None), (1, 1., 'stuck'), (2, 1., 'learning'),
            (2, 2., 'learning')]
    runs = tidy_runs(pandas.DataFrame([dict(run=f'{seed}-{lr}', norm='bn', init='torch', seed=seed, lr=lr,
                                            status='finished' if verdict else 'diverged', verdict=verdict or 'diverged')
                                       for seed, lr, verdict in rows]))
    numbers = limit_numbers(runs)
    limits = {what: own.set_index('seed')[['lr', 'end']].values.tolist() for what, own in numbers.groupby('what')}
    assert limits == {'learns': [[1., ''], [1., 'none learns'], [2., 'none fails']],
                      'does not diverge': [[4., ''], [1., ''], [2., '']]}
    assert numbers.query("what == 'learns'")['run'].tolist() == ['0-1.0', '1-1.0', '2-2.0']

def test_a_page_shows_how_rates_were_chosen_and_what_made_it_exploratory(made):
    words, _ = check(made[1])
    assert 'bn (torch, lr 0.1): no hold-out record of this lr' in words and 'Exploratory: lr chosen without hold-out records; 3 final seeds of 5' in words
    assert 'Function: nwrepro.results.accuracy.decide_c1; figure: nwrepro.results.accuracy_figures.final_accuracy.' in words and 'set after the first study and before the second; those on cost (C10, C11) were set after' in words

def test_a_figure_of_probes_shows_a_run_that_has_them(tmp_path):
    for seed in (0, 1): make(tmp_path/'runs', seed=seed)
    first, second = sorted((tmp_path/'runs').iterdir(), key=lambda path: json.loads((path/'config.json').read_text())['seed'])
    kept = [line for line in (first/'metrics.jsonl').read_text().splitlines() if json.loads(line)['event'] != 'probe']
    (first/'metrics.jsonl').write_text('\n'.join(kept)+'\n')
    for key in ('C7', 'C8'):
        picture = claim_picture(key, load_runs(tmp_path/'runs'), RunCache(tmp_path/'runs'))
        assert len(picture.numbers) and 'n = 1 finished of 1 started, seed 1' in picture.caption

def test_numbers_are_written_as_a_reader_would():
    assert [format_cell(value) for value in (20240101, 50000., 48.0, 0.0125, 2/3, math.nan, None, True, 'wn')] == ['20240101', '50000',
        '48', '0.0125', '0.667', '', '', 'True', 'wn']

def test_an_answer_that_decides_nothing_says_how_much_was_measured():
    verdicts = [dataclasses.replace(v, verdict='undecided') for v in judge(pandas.DataFrame(), 'nowhere')]
    assert answer(verdicts, pandas.DataFrame([dict(arch='resnet18', data='digits')]))[2].startswith('None of 11 claims could be decided')

def test_page_of_no_runs_says_how_to_make_one(tmp_path):
    words, seen = check(page_of(tmp_path/'nowhere', tmp_path/'page'))
    assert 'Here is what no runs say' in words and 'papermill nbs/train.ipynb reports/wn.ipynb -p norm wn' in words
    assert words.count('not tested') > len(CLAIMS) and '<figure' not in (tmp_path/'page/index.html').read_text()

def test_no_figure_of_the_page_before_is_left(tmp_path):
    make(tmp_path/'runs')
    page_of(tmp_path/'runs', tmp_path/'page')
    figures = tmp_path/'page'/'figures'
    (figures/'mine.png').touch()
    assert (figures/'C1.svg').is_file()
    page_of(tmp_path/'nowhere', tmp_path/'page')
    assert [p.name for p in figures.iterdir()] == ['mine.png']

def test_page_of_one_run_decides_nothing(tmp_path):
    make(tmp_path/'runs')
    words, _ = check(page_of(tmp_path/'runs', tmp_path/'page'))
    assert '1 run of ResNet-18 on handwritten digits' in words and 'n = 1 finished of 1 started' in words and 'None of 11 claims' in words

def test_page_of_diverged_runs_only(tmp_path):
    for norm in ('bn', 'wn'):
        for lr in (1., 3.): make(tmp_path/'runs', norm=norm, lr=lr, status='diverged')
    words, _ = check(page_of(tmp_path/'runs', tmp_path/'page'))
    assert '4 runs of ResNet-18 on handwritten digits' in words and 'None of 11 claims' in words

def torn_config(run): (run.path/'config.json').write_text('{"norm": "wn", "da')
def empty_config(run): (run.path/'config.json').write_text('{}')
def torn_summary(run): (run.path/'summary.json').write_text('{"status": "fin')
def no_metrics(run): (run.path/'metrics.jsonl').unlink()
def damaged_metrics(run): (run.path/'metrics.jsonl').write_text('{"event": "eval"\n' + (run.path/'metrics.jsonl').read_text())
def odd_values(run): (run.path/'summary.json').write_text(json.dumps(dict(status='finished', top1='nan', train_top1=None, seed=None)))
def odd_lines(run): (run.path/'metrics.jsonl').write_text('{"event": "probe", "step": 0, "epoch": 0}\n{"event": "eval", "step": 0, '
                                                          '"epoch": 0.0}\n')
def bare(run): shutil.rmtree(run.path); run.path.mkdir(); (run.path/'config.json').write_text('{"norm": "wn"}')

@pytest.mark.parametrize('tear', [torn_config, empty_config, torn_summary, no_metrics, damaged_metrics, odd_values, odd_lines, bare])
@pytest.mark.parametrize('others', [True, False])
def test_page_of_a_torn_folder(tmp_path, tear, others):
    if others: make(tmp_path/'runs', norm='bn')
    run = make(tmp_path/'runs')
    tear(run)
    words, _ = check(page_of(tmp_path/'runs', tmp_path/'page'))
    assert run.name in words
    if tear in (torn_config, empty_config, bare): assert f'{run.name}: its config.json cannot be read' in words
    if tear is torn_summary: assert 'have not ended, such as ' + run.name in words
    if tear is damaged_metrics: assert f'{run.name} is not drawn: {run.name}/metrics.jsonl: record 1 of 16 is damaged' in words

def test_names_that_need_quoting_stay_links_and_text(tmp_path):
    values = config(norm='<b>mine</b>', data='a b')
    run = Run('odd name #1 <i>', tmp_path/'runs', tmp_path/'checkpoints')
    run.begin(values, ORIGIN)
    run.finish('finished', top1=50., train_top1=60.)
    words, _ = check(page_of(tmp_path/'runs', tmp_path/'page'))
    assert 'odd name #1 <i>' in words and '<b>mine</b>' in words

def test_a_page_made_twice_is_the_same(tmp_path):
    make(tmp_path/'runs')
    assert page_of(tmp_path/'runs', tmp_path/'page').read_bytes() == page_of(tmp_path/'runs', tmp_path/'page').read_bytes()

# the notebook

@pytest.mark.slow
def test_papermill_makes_the_page(project):
    done = run_in(project, 'papermill', 'nbs/report.ipynb', 'reports/report.ipynb', '-p', 'runs', 'reports/first_look')
    assert done.returncode == 0, done.stderr
    words, _ = check(project/'reports/index.html')
    assert '-p runs reports/first_look' in words and (project/'reports/figures/C1.svg').is_file()

@pytest.mark.slow
def test_papermill_without_runs(project):
    done = run_in(project, 'papermill', 'nbs/report.ipynb', 'reports/report.ipynb')
    assert done.returncode == 0, done.stderr
    assert 'Here is what no runs say' in check(project/'reports/index.html')[0]

@pytest.mark.slow
def test_the_commands_of_a_figure_make_its_runs_again(project):
    small = dict(data='digits', arch='resnet18', train_images=64, epochs=1, batch_size=32, lr=0.01)
    given = [word for name, value in small.items() for word in ('-p', name, str(value))]
    def papermill(*words):
        done = run_in(project, 'papermill', *words)
        assert done.returncode == 0, done.stderr
    for norm in ('bn', 'wn'): papermill('nbs/train.ipynb', f'reports/{norm}.ipynb', '-p', 'norm', norm, *given)
    papermill('nbs/report.ipynb', 'reports/report.ipynb')
    text = (project/'reports/index.html').read_text()
    first = load_runs(project/'reports/runs').set_index('run')
    commands = html.unescape(re.search('<details id="again-C1">.*?<pre[^>]*>(.*?)</pre>', text, re.S)[1]).splitlines()
    assert len(commands) == 3
    shutil.rmtree(project/'reports/runs')
    shutil.rmtree(project/'checkpoints', ignore_errors=True)
    for command in commands: papermill(*shlex.split(command)[1:])
    again = load_runs(project/'reports/runs').set_index('run')
    assert set(again.index) == set(first.index) and len(first) == 2
    for column in ('top1', 'train_top1', 'val_loss'): assert again[column].to_dict() == first[column].to_dict()
    pixels = re.search(r'(<svg.*?</svg>)', text, re.S)[1]
    assert pixels == re.search(r'(<svg.*?</svg>)', (project/'reports/index.html').read_text(), re.S)[1]

# 5,000 runs

def fill(folder, count):
    "Folders of runs, written without the care of a real run"
    for k in range(count):
        norm, seed, lr, drop = ('bn', 'wn', 'np', 'trelu', 'none')[k%5], k//5%10, (0.01, 0.03, 0.1, 0.3, 1.)[k//50%5], k//250%4*0.2
        values = config(norm=norm, seed=seed, lr=lr, dropout=drop, weight_decay=1e-4*(1+k//1000)) | dict(provenance=ORIGIN)
        ends = dict(status='diverged', diverged_step=7) if lr == 1. and norm != 'bn' else dict(status='finished', top1=60.+k%7,
            train_top1=70.+k%5)
        (folder/f'{norm}-{k:05d}').mkdir(parents=True)
        for name, text in (('config.json', json.dumps(values)), ('summary.json', json.dumps(ends)),
                           ('metrics.jsonl', ''.join(json.dumps(line)+'\n' for line in lines(60.)))):
            (folder/f'{norm}-{k:05d}'/name).write_text(text)

MEASURE = '''
import re, sys, time
start = time.process_time()
sys.path[:0] = ['tests', 'tests/results']
from pathlib import Path
from test_page import page_of
page_of(Path(sys.argv[1]), Path(sys.argv[2]))
peak = Path('/proc/self/status')  # getrusage would count what the parent held when it started this process
print(time.process_time()-start, int(re.search(r'VmHWM:\\s+(\\d+) kB', peak.read_text())[1])/1024 if peak.exists() else 'nan')
'''

@pytest.fixture(scope='module')
def crowd(tmp_path_factory):
    "5,000 folders, their page, processor seconds (since tests run side by side) and MiB it took"
    folder = tmp_path_factory.mktemp('crowd')
    fill(folder/'runs', 5000)
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, '-c', MEASURE, str(folder/'runs'), str(folder/'page')], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return folder/'page'/'index.html', *map(float, done.stdout.split()[-2:])

@pytest.mark.slow
def test_5000_runs_in_a_minute_and_a_gigabyte(crowd):
    page, seconds, mebibytes = crowd
    check(page)
    assert seconds < 60, f'{seconds:.1f} s'
    if math.isnan(mebibytes): pytest.skip('this system does not tell the peak of a process in /proc')
    assert mebibytes < 1024, f'{mebibytes:.0f} MiB'

# in a browser

@contextlib.contextmanager
def opened(browser, page, width=1280, scheme='light'):
    "A page whose tables are ready, and what its console said"
    said = []
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, offline=True)
    tab = context.new_page()
    tab.on('console', lambda message: said.append(message.text) if message.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda error: said.append(str(error)))
    tab.on('request', lambda request: said.append(request.url) if not request.url.startswith(('file:', 'data:')) else None)
    tab.goto(page.as_uri())
    tab.wait_for_selector('html[data-ready]', state='attached', timeout=60_000)
    yield tab, said
    context.close()

def rows(tab):
    "The rows of the table of runs, its fold opened"
    tab.locator('#runs').evaluate('fold => fold.open = true')
    tab.locator('#runs .dt-container').wait_for()
    return tab.locator('#runs .dt-container tbody tr')

@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 380])
def test_in_a_browser_nothing_is_wrong(browser, made, scheme, width):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright',
                              reason='axe-playwright-python is not installed: pip install -e .[dev]')
    with opened(browser, made[1], width, scheme) as (tab, said):
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
        tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        tab.wait_for_timeout(500)
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
        found = axe.Axe().run(tab).response['violations']
        assert [(v['id'], v['nodes'][0]['html']) for v in found if v['impact'] in ('serious', 'critical')] == []
        assert said == []

@pytest.mark.slow
def test_tables_sort_and_filter_by_keyboard(browser, made):
    with opened(browser, made[1]) as (tab, said):
        assert rows(tab).count()
        table = tab.locator('#runs .dt-container')
        column = table.locator('thead th').all_inner_texts().index('top1')
        table.locator('thead th').nth(column).get_by_role('button').press('Enter')
        table.locator('thead th[aria-sort=ascending]').wait_for()  # the rows are put in order a moment after the key
        values = [float(text or 0) for text in rows(tab).locator(f'td:nth-child({column+1})').all_inner_texts()]
        assert values == sorted(values) and len(set(values)) > 1
        table.get_by_role('searchbox').press_sequentially('diverged')
        tab.wait_for_function("document.querySelectorAll('#runs .dt-container tbody tr').length == 6")
        assert said == []

@pytest.mark.slow
def test_a_dot_leads_to_its_run_by_keyboard(browser, made):
    with opened(browser, made[1]) as (tab, said):
        dot = tab.locator('#figure svg a').last
        dot.focus()
        tab.keyboard.press('Enter')
        tab.wait_for_selector('tr.found')
        assert '#'+tab.locator('tr.found').get_attribute('id') == dot.get_attribute('href') and tab.locator('tr.found').is_visible()
        assert said == []

SMALLEST = """() => Math.min(...[...document.querySelectorAll('figure svg text')].map(text =>
    parseFloat(getComputedStyle(text).fontSize)*text.ownerSVGElement.getScreenCTM().a))"""

@pytest.mark.slow
def test_the_page_is_read_in_ten_minutes_and_its_smallest_text_can_be(browser, made):
    for width in (1280, 380):
        with opened(browser, made[1], width) as (tab, said): assert tab.evaluate(SMALLEST) >= 10, width
    with opened(browser, made[1]) as (tab, said):
        assert len(tab.locator('body').inner_text().split()) <= 2500
        assert tab.evaluate('document.documentElement.scrollHeight') <= 9000

@pytest.mark.slow
def test_5000_runs_are_usable_in_a_browser(browser, crowd):
    start = time.monotonic()
    with opened(browser, crowd[0]) as (tab, said):
        assert time.monotonic()-start < 30 and rows(tab).count() == 25
        tab.locator('#runs .dt-container').get_by_role('searchbox').fill('trelu-04998')
        tab.wait_for_function("document.querySelectorAll('#runs .dt-container tbody tr').length == 1")
        assert said == []
