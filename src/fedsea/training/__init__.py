"""Fine-tuning as a whole.

    recipe          how to train, and the LoRA adapter; needs no torch
    examples        one text as training takes it; needs no torch
    batches         which examples a step takes
    loop            `FineTuning`: steps, checkpoints, and going on after a server was lost
    callback        what takes part in a training
    recalibration   adaptive noise, the one callback of our own
    checkpoints     all that it takes to go on, on disk
    folder          the output folder of a training
    export          to a PEFT adapter, or merged into the whole model

Other rooms import these modules, each for itself: what the help of a command needs (recipe) does not import torch.
"""

__all__ = [
    "batches",
    "callback",
    "checkpoints",
    "examples",
    "export",
    "folder",
    "loop",
    "recalibration",
    "recipe",
]
