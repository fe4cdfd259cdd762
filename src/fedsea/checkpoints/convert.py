"""Rewrites a GGUF file in Hugging Face layout: `python -m fedsea.checkpoints.convert SOURCE FOLDER`.

A process of its own, because reading a tokenizer takes several times the memory of the file and draws progress bars;
neither should be left behind in the process that goes on to use a part of the model.
"""

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from fedsea.checkpoints.folder import INDEX, SINGLE
from fedsea.checkpoints.gguf_config import read_config
from fedsea.checkpoints.gguf_file import GgufFile
from fedsea.checkpoints.pretokenizers import complete_tokenizer
from fedsea.errors import ModelNotFoundError

SHARD_BYTES = 4 * 2**30


def convert(source: Path, folder: Path) -> None:
    """Write configuration, weights, generation configuration and tokenizer of the GGUF file `source` into `folder`.

    The weights are in float32: float16 would not hold dequantised values exactly. Every key and every tensor of the
    file is used, or known to change nothing, or the file is refused (ModelNotFoundError). Whatever the libraries raise
    when they cannot read the file passes through.
    """
    file = GgufFile(source)
    config = read_config(file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    names = _names(file, model)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    complete_tokenizer(tokenizer, file)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _save(_weights(file, config, names, shapes), folder)
    file.settle()
    config.save_pretrained(folder)
    tokens: dict[str, Any] = {
        f"{token}_token_id": getattr(config, f"{token}_token_id") for token in ("bos", "eos", "pad")
    }
    GenerationConfig(**tokens).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _names(file: GgufFile, model: Any) -> dict[str, str]:
    """What the file calls each weight of the model."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[file.architecture], model.config.num_hidden_layers)
    names = {}
    for name, _ in model.named_parameters():
        module, kind = name.rsplit(".", 1)
        names[name] = f"{table.get_name(module)}.{kind}"
    missing = [name for name, own in names.items() if not file.has(own) and not _is_free_bias(file, name)]
    if missing:
        raise ModelNotFoundError(f"it lacks {', '.join(sorted(missing)[:3])}")
    return names


def _is_free_bias(file: GgufFile, name: str) -> bool:
    """Whether a weight is a bias that such a file may leave out, although the model has it: it is zero."""
    return name.endswith(".bias") and file.architecture != "qwen2"


def _weights(
    file: GgufFile, config: PreTrainedConfig, names: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights, one after another."""
    # llama.cpp rotates neighbours where transformers rotates halves, so its converter has reordered the rows.
    interleaved = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, own in names.items():
        if not file.has(own):
            yield name, torch.zeros(shapes[name])
            continue
        if file.shape(own) != shapes[name]:
            raise ModelNotFoundError(f"{own} has shape {list(file.shape(own))}; the model needs {list(shapes[name])}")
        heads = interleaved.get(name.split(".")[-2]) if file.architecture == "llama" else None
        yield name, file.tensor(own) if heads is None else file.tensor(own, functools.partial(_halves, heads=heads))


def _halves(rows: Any, heads: int) -> Any:
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _save(weights: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write the weights, in several files if they are large, so that no more than one of them is in memory."""
    file_of: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    size = 0

    def write() -> None:
        filename = f"model-{len(set(file_of.values())) + 1:05d}.safetensors"
        save_file(held, folder / filename, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(held, filename))
        held.clear()

    for name, tensor in weights:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        held[name] = tensor
        size += tensor.nbytes
    write()
    if len(filenames := set(file_of.values())) == 1:
        (folder / filenames.pop()).rename(folder / SINGLE)
    else:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": file_of}))


if __name__ == "__main__":
    # transformers and this parse the file several times.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)  # type: ignore[misc,assignment]
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except ModelNotFoundError as error:
        sys.exit(str(error))
