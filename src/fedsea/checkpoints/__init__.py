"""From a model's name to its tensors."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsea.checkpoints.base import Checkpoint
    from fedsea.checkpoints.fingerprint import Fingerprint
    from fedsea.checkpoints.resolve import load_tokenizer, load_whole_model, open_checkpoint

_HOMES = {
    "Checkpoint": "base",
    "Fingerprint": "fingerprint",
    "load_tokenizer": "resolve",
    "load_whole_model": "resolve",
    "open_checkpoint": "resolve",
}
__all__ = ["Checkpoint", "Fingerprint", "load_tokenizer", "load_whole_model", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: whether a model is there (`names`) is known without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
