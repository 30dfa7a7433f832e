"cost.ipynb as papermill runs it: the record it leaves is one that the claims on cost are judged by"
import pytest

from conftest import run_in
from nwrepro.stats import CLAIMS, cost_records

SMALL = '-p arch resnet18 -p image_size 16 -p batch_size 4 -p rounds 6'.split()

@pytest.mark.slow
def test_cost_leaves_a_record_that_is_judged(project):
    done = run_in(project, 'papermill', 'nbs/cost.ipynb', 'reports/cost.ipynb', *SMALL, '-y', '{norms: [bn, wn]}')
    assert done.returncode == 0, done.stderr
    record, = [r for r in cost_records(project/'reports/runs') if r['image_size'] == 16]
    assert (record['arch'], record['batch_size'], record['precision']) == ('resnet18', 4, 'fp32') and list(record['seconds']) == ['bn', 'wn', 'none']
    assert {len(s) for s in record['seconds'].values()} == {6} and all(0 < s < 60 for part in record['seconds'].values() for s in part)
    verdict = CLAIMS['C10'].decide(None, project/'reports/runs')
    assert verdict.kind == 'analogue' and verdict.numbers.n[0] >= 6

@pytest.mark.slow
@pytest.mark.parametrize('wrong, sentence', [(('round', '6'), "unknown parameter 'round': did you mean 'rounds'?"), (('image_size', '8'), 'image_size = 8 is not accepted'), (('arch', 'vgg16'), "unknown arch 'vgg16'")])
def test_a_wrong_value_stops_in_one_sentence(wrong, sentence, project):
    done = run_in(project, 'papermill', 'nbs/cost.ipynb', 'reports/cost.ipynb', *SMALL, '-p', *wrong)
    assert done.returncode != 0 and sentence in done.stderr.strip().splitlines()[-1], done.stderr
