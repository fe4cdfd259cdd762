"""Rewrites a GGUF file in Hugging Face layout: `python -m fedsea.checkpoints.convert SOURCE FOLDER`.

A process of its own, because a conversion needs several times the memory of the model and draws progress bars; neither
should be left behind in the process that goes on to use a part of the model.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from fedsea.checkpoints.pretokenizers import complete_tokenizer
from fedsea.errors import ModelNotFoundError


def convert(source: Path, folder: Path) -> None:
    """Write configuration, weights, generation configuration and tokenizer of the GGUF file `source` into `folder`.

    The weights are in float32: float16 would not hold dequantised values exactly.

    Raises
    ------
    ModelNotFoundError
        If the file lacks weights, or its tokenizer is of a kind that is not supported. Whatever else transformers
        raises when it cannot read the file passes through.
    """
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    complete_tokenizer(tokenizer, _tokenizer_keys(source))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        **where,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, report = loaded
    # transformers gives such weights random numbers and goes on.
    if report["missing_keys"]:
        raise ModelNotFoundError(f"it lacks {', '.join(sorted(report['missing_keys'])[:3])}")
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, token) is not None:
            setattr(model.generation_config, token, getattr(tokenizer, token))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer_keys(source: Path) -> Callable[[str], Any]:
    fields = gguf.GGUFReader(str(source)).fields

    def read(key: str) -> Any:
        field = fields.get(f"tokenizer.ggml.{key}")
        return None if field is None else field.contents()

    return read


if __name__ == "__main__":
    # transformers parses the file three times, and draws up the table of tensor names for each tensor anew.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)  # type: ignore[misc,assignment]
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except ModelNotFoundError as error:
        sys.exit(str(error))
