"""FedSEA: use and fine-tune a large language model whose middle layers another organisation runs.

A model that is split, for code that uses transformers:

    model = fedsea.SplitModelForCausalLM.from_pretrained("smollm2-135m", server="HOST:PORT", credentials="client-a")
    tokenizer = fedsea.load_tokenizer("smollm2-135m")

`Partition` says which layers stay here, `parse_mechanism` and the noise classes how hidden states are protected,
`Conversation` holds a chat, and `FedSEAError` is what goes wrong, in one line.
"""

TYPE_CHECKING = False  # as in `typing`, which `python -m fedsea` would look for in the current folder

__version__ = "0.3.0"

if TYPE_CHECKING:
    from fedsea.checkpoints import load_tokenizer as load_tokenizer
    from fedsea.client.conversation import Conversation as Conversation
    from fedsea.client.model import SplitModelForCausalLM as SplitModelForCausalLM
    from fedsea.client.sampling import Sampling as Sampling
    from fedsea.errors import FedSEAError as FedSEAError
    from fedsea.partition import Partition as Partition
    from fedsea.privacy import GaussianNoise as GaussianNoise
    from fedsea.privacy import RelativeGaussianNoise as RelativeGaussianNoise
    from fedsea.privacy import parse_mechanism as parse_mechanism

_HOMES = {
    "Conversation": "fedsea.client.conversation",
    "FedSEAError": "fedsea.errors",
    "GaussianNoise": "fedsea.privacy",
    "Partition": "fedsea.partition",
    "RelativeGaussianNoise": "fedsea.privacy",
    "Sampling": "fedsea.client.sampling",
    "SplitModelForCausalLM": "fedsea.client.model",
    "load_tokenizer": "fedsea.checkpoints",
    "parse_mechanism": "fedsea.privacy",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `import fedsea` alone is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsea' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return [*__all__, "__version__", "__doc__", "__name__", "__file__", "__path__", "__spec__", "__all__"]
