"""FedSEA: use and fine-tune a large language model whose middle is run by somebody else."""

TYPE_CHECKING = False  # as in `typing`, which `python -m fedsea` would look for in the current folder

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedsea.checkpoints import load_tokenizer as load_tokenizer
    from fedsea.client.model import SplitModelForCausalLM as SplitModelForCausalLM
    from fedsea.partition import Partition as Partition
    from fedsea.privacy import GaussianNoise as GaussianNoise
    from fedsea.privacy import RelativeGaussianNoise as RelativeGaussianNoise

_HOMES = {
    "GaussianNoise": "fedsea.privacy",
    "Partition": "fedsea.partition",
    "RelativeGaussianNoise": "fedsea.privacy",
    "SplitModelForCausalLM": "fedsea.client.model",
    "load_tokenizer": "fedsea.checkpoints",
}
__all__ = ["GaussianNoise", "Partition", "RelativeGaussianNoise", "SplitModelForCausalLM", "load_tokenizer"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `import fedsea` alone is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsea' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
