"The plan of the second study, on made-up results"
import importlib.util
import pytest
from conftest import ROOT

@pytest.fixture
def study(monkeypatch):
    spec = importlib.util.spec_from_file_location('study', ROOT/'tools/study.py')
    spec.loader.exec_module(made := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(made, 'REGIME', dict(epochs=20, weight_decay=1e-3))
    return made

class Ended:
    "A record of a run, as far as the plan reads it"
    def __init__(self, top1=None, learns=False): self.status, self.summary = 'finished', dict(top1=top1, verdict='learning' if learns else 'stuck')

def play(study, best, largest):
    "Run the plan to its end: top1 falls with the distance of lr from `best` of an arm, and probes learn up to `largest`"
    ended, order = {study.key(given): Ended(top1=50.) for given in study.PILOT}, []
    def arm(given): return next(name for name, own in study.ARMS.items() if {k: given.get(k) for k in ('norm', 'init', 'zero_init')} == {k: own.get(k) for k in ('norm', 'init', 'zero_init')})
    while new := [g for g in study.wanted(ended) if study.key(g) not in ended]:
        given = new[0]
        order.append(given)
        if 'max_steps' in given: ended[study.key(given)] = Ended(learns=given['lr'] <= largest[arm(given)])
        else: ended[study.key(given)] = Ended(top1=90-abs(given['lr']-best[arm(given)])*10 if given['lr'] < 3 else None)
    return order, arm

def test_every_arm_is_tuned_then_trained_then_probed(study):
    best = dict.fromkeys(study.ARMS, 0.1) | dict(wn=1.6, trelu=0.012)
    order, arm = play(study, best, dict.fromkeys(study.ARMS, 16.))
    tuning, final, probes = [[g for g in order if test(g)] for test in (lambda g: g.get('holdout'), lambda g: not g.get('holdout') and 'max_steps' not in g, lambda g: 'max_steps' in g)]
    assert order == tuning+final+probes
    for name, rates in dict(bn=5, wn=8, trelu=7).items():
        own = [g for g in tuning if arm(g) == name]
        assert len([g for g in own if g['seed'] == 0]) == rates and len([g for g in own if g['seed'] == 1]) == 2
    assert len(final) == 8*5 and {(arm(g), g['lr']) for g in final} == {(name, dict(wn=1.6, trelu=0.0125).get(name, 0.1)) for name in study.ARMS}
    assert {g['seed'] for g in final}.isdisjoint({g['seed'] for g in tuning})
    assert len(probes) == 10*5*2 and {g["lr"] for g in probes} == {16, 8} and {(arm(g), g['warmup_epochs']) for g in probes} >= {('bn', 0.), ('bn', 1.), ('wn', 0.)}

def test_all_of_it_is_accepted(study):
    order, _ = play(study, dict.fromkeys(study.ARMS, 0.1), dict.fromkeys(study.ARMS, 16.))
    assert len({study.key(g) for g in order}) == len(order)

def test_nothing_but_the_pilot_without_a_regime(study, monkeypatch):
    monkeypatch.setattr(study, 'REGIME', None)
    assert list(study.wanted({})) == study.PILOT
