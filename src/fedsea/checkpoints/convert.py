"""Rewrites a GGUF file in Hugging Face layout: `python -m fedsea.checkpoints.convert SOURCE FOLDER`.

A process of its own, because a conversion needs several times the memory of the model and draws progress bars; neither
should be left behind in the process that goes on to use a part of the model.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(source: Path, folder: Path) -> None:
    """Write configuration, weights, generation configuration and tokenizer of the GGUF file `source` into `folder`.

    The weights are in float32: float16 would not hold dequantised values exactly.
    """
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, token) is not None:
            setattr(model.generation_config, token, getattr(tokenizer, token))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
