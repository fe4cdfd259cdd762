"""What is said before text leaves: that a configuration is known to leak, and which command measures how much."""

import os
import shlex

WARNING = "FEDSEA_LEAK_WARNING"  # the environment variable that hides the line if it is `off`
SEE = "see how much"  # stands before the command
LEARNT = "--task TASK --data PATH"  # stands in the command for what a training learns, which the model does not know
IN_TRAINING = "in training the gradients tell the provider what is learnt, and noise on the states does not hide that"


def leak_notice(
    why: str, model: str, layers: tuple[int, int], noise: str = "", *, training: bool = False
) -> str | None:
    """The line for a reason (`leak_warning`, `IN_TRAINING`), with the command that audits this configuration.

    None if the user has hidden it. `layers` are input and output layers, `noise` the protection as users write it.
    """
    if os.environ.get(WARNING) == "off":
        return None
    words = ["fedsea", "audit", model, "--input-layers", str(layers[0]), "--output-layers", str(layers[1])]
    words += ["--noise", noise] if noise else []
    what = f"--train-steps 4 {LEARNT}" if training else "--answer-tokens 32"
    return f"{why}; {SEE}: {shlex.join(words)} {what} ({WARNING}=off hides this)"
