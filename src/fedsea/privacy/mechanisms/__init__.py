"""One file a mechanism. Every file here is imported, and so registers the names by which its mechanism is written."""

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
