"""Stand-in for torchvision, whose wheel needs another torch: Composer imports names that no test uses."""

import sys
from types import ModuleType
from typing import Any

__path__: list[str] = []  # makes this module a package


class _Names(ModuleType):
    """Has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for _name in ("datasets", "models", "models.resnet", "transforms", "transforms.functional", "utils", "ops"):
    _module: Any = _Names(f"torchvision.{_name}")
    _module.__path__ = []
    sys.modules[_module.__name__] = _module
    if "." not in _name:
        globals()[_name] = _module
