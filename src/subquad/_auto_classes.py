"""Tells transformers' Auto classes of ours, in either import order, without importing transformers.

``import subquad`` before transformers: the registration runs right after transformers has loaded its Auto modules.
After: it runs at once for those already loaded.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
AUTO_MODEL = "transformers.models.auto.modeling_auto"


def _register_config(auto: ModuleType) -> None:
    from subquad.convert import models as converted
    from subquad.convert.sites import FAMILIES
    from subquad.models.config import SubquadConfig

    auto.AutoConfig.register(SubquadConfig.model_type, SubquadConfig, exist_ok=True)
    # By name, as transformers' own: a configuration's class, and with it its family's, is loaded when it is asked for.
    names = {f"subquad_{family.name}": f"Subquad{family.stem}Config" for family in FAMILIES.values()}
    auto.CONFIG_MAPPING._mapping = auto.CONFIG_MAPPING._mapping | names
    auto.CONFIG_MAPPING._modules.update(dict.fromkeys(names, converted))


def _register_models(auto: ModuleType) -> None:
    from subquad.models import language
    from subquad.models.config import SubquadConfig

    for auto_class, own in (
        (auto.AutoModel, language.SubquadModel),
        (auto.AutoModelForCausalLM, language.SubquadForCausalLM),
        (auto.AutoModelForMaskedLM, language.SubquadForMaskedLM),
        (auto.AutoModelForSequenceClassification, language.SubquadForSequenceClassification),
    ):
        auto_class.register(SubquadConfig, own, exist_ok=True)


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {AUTO_CONFIG: _register_config, AUTO_MODEL: _register_models}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets every module be found as usual; for the Auto modules, acts after they have run."""

    def __init__(self) -> None:
        self.waiting = dict(_ACTIONS)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        action = self.waiting.pop(fullname, None)
        if action is None:
            return None
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Then(spec.loader, action)
        return spec


class _Then(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, action: Callable[[ModuleType], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action(module)


def register_with_transformers() -> None:
    """Registers now what transformers has loaded, and the rest when it is loaded."""
    finder = _AfterImport()
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            del finder.waiting[name]
            action(sys.modules[name])
    if finder.waiting:
        sys.meta_path.insert(0, finder)
