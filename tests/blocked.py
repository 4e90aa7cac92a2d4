"""For programs that have to do without some packages."""

import importlib
import importlib.machinery
import sys


def block(*packages):
    """Makes packages impossible to import, as if they were not installed."""

    class PathFinder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.split(".")[0] in packages else super().find_spec(name, path, target)

    sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = PathFinder
    for name in packages:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        sys.exit(f"{name} can still be imported")
