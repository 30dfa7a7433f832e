"Records in folders and in packs: read alike, found damaged, never half-written"
import zipfile
import pytest
from nwrepro.results.predictions import correct_predictions
from nwrepro.training.records import check_pack, load_runs, pack, records
from nwrepro.training.runs import Record, Run

def write(folder, name, norm, status='finished', **summary):
    run = Run(name, folder, folder.parent/'checkpoints')
    run.begin(dict(norm=norm, data='digits', arch='resnet18', seed=0, source=dict(fingerprint='f00d')), dict(code='c0de', git=dict(dirty=False)))
    for step in range(1, 4): run.log('train', step, step/3, loss=2.3/step)
    run.predictions([('0', 3, 3), ('1', 1, 7)])
    if status: run.finish(status, **summary)
    return run

@pytest.fixture
def folder(tmp_path):
    write(tmp_path/'runs', 'a', 'bn', top1=50.)
    write(tmp_path/'runs', 'b', 'wn', 'diverged', diverged_lr=4.)
    write(tmp_path/'runs', 'c', 'np', status=None)
    return tmp_path/'runs'

def packed(folder, name='pack.zip', names=('a', 'b')):
    "Pack runs and take their folders away"
    path = pack([Record(name, folder) for name in names], folder/name)
    for name in names: (folder/name).rename(folder.parent/name)
    return path

def test_a_packed_run_reads_as_its_folder_did(folder):
    table = load_runs(folder)
    (folder/'a'/'train.ipynb').write_text('{}')
    before = {name: (Record(name, folder).config, Record(name, folder).summary, Record(name, folder).provenance, Record(name, folder).metrics().to_dict(), correct_predictions(name, folder).to_dict()) for name in 'ab'}
    path = packed(folder)
    assert load_runs(folder).equals(table) and [r.name for r in records(folder)] == ['a', 'b', 'c']
    assert {name: (Record(name, folder).config, Record(name, folder).summary, Record(name, folder).provenance, Record(name, folder).metrics().to_dict(), correct_predictions(name, folder).to_dict()) for name in 'ab'} == before
    assert check_pack(path) == 8 and 'a/train.ipynb' not in zipfile.ZipFile(path).namelist()

def test_a_pack_unpacks_to_the_folders_as_they_were(folder, tmp_path):
    path = packed(folder)
    zipfile.ZipFile(path).extractall(tmp_path/'out')
    for name in 'ab':
        for file in (tmp_path/name).iterdir(): assert (tmp_path/'out'/name/file.name).read_bytes() == file.read_bytes()

def test_the_same_records_give_the_same_bytes(folder):
    runs = [Record(name, folder) for name in 'ab']
    assert pack(runs, folder/'x.zip').read_bytes() == pack(runs[::-1], folder/'y.zip').read_bytes()

def test_a_folder_counts_before_a_pack_and_several_packs_are_read(folder):
    packed(folder, 'p1.zip', 'a'), packed(folder, 'p2.zip', 'b')
    write(folder.parent/'other', 'a', 'trelu', top1=60.)
    (folder.parent/'other'/'a').rename(folder/'a')
    assert load_runs(folder).norm.tolist() == ['trelu', 'wn', 'np'] and Record('a', folder).config['norm'] == 'trelu'

def test_a_packed_run_is_over_and_starts_again_only_when_told(folder):
    packed(folder)
    run = Run('a', folder, folder.parent/'checkpoints')
    assert run.status == 'finished'
    with pytest.raises(ValueError, match='has ended'): run.begin({}, {})
    run.begin(dict(norm='wn'), {}, fresh=True)
    assert run.status == 'started' and Record('a', folder).config == dict(norm='wn')

def test_what_is_refused(folder):
    with pytest.raises(ValueError, match='c have not ended: pack finished and diverged runs only'): pack(records(folder), folder/'pack.zip')
    assert not list(folder.glob('*.zip')) and not list(folder.glob('.*'))
    path = pack([Record('a', folder)], folder/'pack.zip')
    before = path.read_bytes()
    with pytest.raises(ValueError, match='exists: give another name'): pack([Record('b', folder)], path)
    assert path.read_bytes() == before

def test_a_write_that_fails_leaves_no_pack(folder, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, 'writestr', lambda *args: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError): pack([Record('a', folder)], folder/'pack.zip')
    assert not list(folder.glob('*.zip')) and not list(folder.glob('.*'))

@pytest.mark.parametrize('change', ['content', 'missing', 'extra'])
def test_a_damaged_pack_is_named(folder, change):
    path = packed(folder)
    files = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    if change == 'content': files['a/summary.json'] = files['a/summary.json'].replace(b'50', b'99')
    if change == 'missing': del files['a/summary.json']
    if change == 'extra': files['d/summary.json'] = b'{}'
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in files.items(): archive.writestr(name, data)
    with pytest.raises(ValueError, match=f"damaged: {'d' if change == 'extra' else 'a'}/summary.json differ"): check_pack(path)
