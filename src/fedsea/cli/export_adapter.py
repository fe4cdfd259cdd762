"""`fedsea export-adapter`: from a training's output to a PEFT adapter, or to a model with it merged in."""

from pathlib import Path
from typing import Annotated

import typer

from fedsea.cli.spread import spread
from fedsea.errors import UsageError
from fedsea.flags import ComputeDtype, Flag


@spread
def export_adapter(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of fedsea finetune, or an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    merge: Annotated[
        str | None,
        Flag(
            "Write this whole model with the adapter merged into its weights, all of which must be on this machine.",
            metavar="MODEL",
            default="the adapter alone",
        ),
    ] = None,
    ends: Annotated[
        Path | None,
        Flag(
            "Put in the adapter of your own input and output blocks, which a federation with private-ends has left on "
            "this machine.",
            metavar="FILE",
            default="those of RUN",
        ),
    ] = None,
    dtype: ComputeDtype = "float32",
) -> None:
    """Write the adapter of RUN as a standard PEFT adapter of the whole model."""
    if ends is not None and merge is not None:
        raise UsageError("give --ends or --merge, not both: first put in the blocks' adapter, then merge the result")
    from fedsea.checkpoints.names import check_model

    if not run.exists():
        raise UsageError(f"there is no folder {run}; give the output folder of fedsea finetune, or an adapter's")
    if merge is not None:
        check_model(merge)
    import torch

    from fedsea.training.export import export_adapter as export
    from fedsea.training.export import merge_adapter

    own = None
    if ends is not None:
        from fedsea.federation import read_private_adapter

        own = read_private_adapter(ends)[0]
    if merge is None:
        if export(run, out, own):
            print(f"The adapter is in {out}, with its narrow cut: fedsea's commands take both, PEFT does not.")
        else:
            print(f"The adapter is in {out}; peft.PeftModel.from_pretrained(model, {str(out)!r}) loads it.")
    else:
        merge_adapter(run, merge, out, dtype=getattr(torch, dtype))
        print(
            f"The merged model is in {out}; transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it."
        )
