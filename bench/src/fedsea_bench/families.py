"""Which of transformers' causal language models can be split: a tiny random model of each type, split and whole."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedsea.errors import ModelNotFoundError, UsageError
from fedsea.parts import check_family
from fedsea.text import one_line

INTRODUCTION = """# Models

Printed by `fedsea bench families --output docs/models.md`, with transformers {version}. Of each type of causal language
model that transformers knows, a tiny random model is made from the type's own default configuration, and its logits are
compared split and whole: three texts of different lengths at once, with a cache and without, with one input layer and
with none. **Equal** means that no logit differs by more than 1e-4 of the largest. FedSEA makes the same comparison with
the configuration of the model that it is given, whenever it loads one: a model that is not equal is refused with the
reason, never computed wrongly.

**{equal} of {all} types are equal.** Many of the others are no decoder-only models, or need an image or sound encoder
beside them, whose text model has a type of its own.

| model type | result |
| --- | --- |
"""


@dataclass(frozen=True)
class Family:
    """A type of model, and why it cannot be split; empty if it can."""

    model_type: str
    why_not: str

    @property
    def row(self) -> str:
        """Of the page's table."""
        return f"| `{self.model_type}` | {'equal' if not self.why_not else 'no: ' + self.why_not.replace('|', '/')} |"


def families(names: Sequence[str] = ()) -> Iterator[Family]:
    """The result of each type, or of all that transformers has a causal language model of, one after the other."""
    torch.manual_seed(0)
    for name in names:
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            near = get_close_matches(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 3)
            known = f"; near to it are: {', '.join(near)}" if near else ""
            raise UsageError(f"transformers has no causal language model of the type {name!r}{known}")
    for model_type in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            check_family(CONFIG_MAPPING[model_type]())
        except ModelNotFoundError as error:
            yield Family(model_type, str(error).partition(" cannot be split: ")[2] or str(error))
        except Exception as error:  # of any kind: what a type's configuration does by itself
            yield Family(model_type, one_line(f"its default configuration cannot be used ({error})")[:200])
        else:
            yield Family(model_type, "")


def page(found: Sequence[Family]) -> str:
    """docs/models.md."""
    equal = sum(not one.why_not for one in found)
    head = INTRODUCTION.format(version=transformers.__version__, equal=equal, all=len(found))
    return head + "".join(f"{one.row}\n" for one in found)
