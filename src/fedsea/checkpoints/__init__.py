"""From a model's name to its tensors."""

from fedsea.checkpoints.base import Checkpoint
from fedsea.checkpoints.fingerprint import Fingerprint
from fedsea.checkpoints.resolve import load_tokenizer, load_whole_model, open_checkpoint

__all__ = ["Checkpoint", "Fingerprint", "load_tokenizer", "load_whole_model", "open_checkpoint"]
