"""`import absorb` lets transformers load converted models by itself, without trust_remote_code.

transformers takes seconds to import, so it learns the classes when somebody imports it, and not
before.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import Any

_OURS = "absorb.models.modeling_absorb"


def register_with_transformers() -> None:
    """Now if transformers is there already, and otherwise as soon as it is imported."""
    # Our module imports transformers, which by then must not ask for our module: it is half made.
    sys.meta_path.insert(0, _After(_OURS, _register))
    if "transformers" in sys.modules:
        _import_ours()
    else:
        sys.meta_path.insert(0, _After("transformers", _import_ours))


class _After(MetaPathFinder):
    """Acts once, when a module has been imported."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec: Any = next(filter(None, found), None)
        if spec is not None:
            spec.loader.exec_module = self._then_act(spec.loader.exec_module)
        return spec

    def _then_act(self, execute: Callable[[Any], None]) -> Callable[[Any], None]:
        def execute_and_act(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        return execute_and_act


def _import_ours() -> None:
    if _OURS not in sys.modules:
        import_module(_OURS)


def _register() -> None:
    """Tell transformers the absorbed twin of every family."""
    import transformers

    from absorb.models.families import FAMILIES
    from absorb.models.modeling_absorb import absorbed, stock_classes

    for model_type in FAMILIES:
        stock = transformers.CONFIG_MAPPING[model_type]
        classes = stock_classes(stock)
        config: Any = absorbed(classes["AutoModel"]).config_class
        transformers.AutoConfig.register(config.model_type, config)
        for auto, cls in classes.items():
            getattr(transformers, auto).register(config, absorbed(cls), exist_ok=True)
