"""From a model's name to its tensors."""

from typing import TYPE_CHECKING

from fedsea.lazy import lazy_face

if TYPE_CHECKING:
    from fedsea.checkpoints.base import Checkpoint as Checkpoint
    from fedsea.checkpoints.base import longest_text as longest_text
    from fedsea.checkpoints.fingerprint import Fingerprint as Fingerprint
    from fedsea.checkpoints.resolve import load_tokenizer as load_tokenizer
    from fedsea.checkpoints.resolve import load_whole_model as load_whole_model
    from fedsea.checkpoints.resolve import open_checkpoint as open_checkpoint

__all__, __getattr__ = lazy_face(
    __name__,
    {
        "base": ("Checkpoint", "longest_text"),
        "fingerprint": ("Fingerprint",),
        "resolve": ("load_tokenizer", "load_whole_model", "open_checkpoint"),
    },
)
