"""One client of a benched federation, in a process of its own: rounds are asked for on standard input, a line each."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from fedsea.client.model import SplitModelForCausalLM
from fedsea.wire.rounds import Ticket
from fedsea_bench.training_case import adamw, adapter_config, even_batch, train_step
from fedsea_bench.workbench import PARTITION


def main() -> None:
    """Read `{"ticket", "steps"}`, train, and write `{"seconds", "loss"}`; the first line written says ready."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    model = SplitModelForCausalLM.from_pretrained(
        options["model"], server=options["server"], credentials=Path(options["credentials"]), partition=PARTITION
    )
    model.micro_batches = options["micro_batches"]
    batch = even_batch(model.config.vocab_size, options["rows"], options["tokens"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        model.join_round(Ticket.from_body(asked["ticket"]), adapter_config())
        model.train()
        optimizer = adamw(model)
        loss = 0.0
        for _ in range(asked["steps"]):
            loss = train_step(model, optimizer, [batch])
        model.finish_round()
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), flush=True)
    model.close()


if __name__ == "__main__":
    main()
