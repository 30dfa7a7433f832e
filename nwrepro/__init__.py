__version__ = "0.2.0"

_HOMES = dict(SCHEMES='methods.later', Scheme='methods.schemes', convert='methods.schemes', fold='methods.deploy', to_timm='methods.deploy',
              load_runs='training.records', load_model='results.weights')  # the public interface
__all__ = list(_HOMES)

def __getattr__(name):  # imported when asked for: most of what uses this package needs one of them
    if name not in _HOMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'.{_HOMES[name]}', __name__), name)
