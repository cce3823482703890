"""`transformers`' generate, driven by `worker.py`. Runs as a script: argument {"folder", "dtype",
"threads"}; imports nothing of headwise, so that any environment with transformers can run it."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import transformers


class Clock:
    """Notes when each token arrives; the first call hands over the prompt."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.arrivals.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


def tokens_per_s(model: Any, question: dict[str, Any]) -> float:
    generator = torch.Generator().manual_seed(question["seed"])
    prefill = question["kind"] == "prefill"
    streams = 1 if prefill else question["streams"]
    length = question["tokens"] if prefill else question["prompt_tokens"]
    steps = 1 if prefill else 1 + question["tokens"]
    ids = torch.randint(model.config.vocab_size, (streams, length), generator=generator)
    clock = Clock()
    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    first, last = clock.arrivals[1], clock.arrivals[-1]
    if prefill:
        return float(length / (first - began))
    return float(streams * (steps - 1) / (last - first))


def main() -> None:
    options = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print is no answer
    torch.set_num_threads(options["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options["folder"], dtype=getattr(torch, options["dtype"])
    )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(versions), file=answers)
    for line in sys.stdin:
        print(json.dumps({"tokens_per_s": tokens_per_s(model, json.loads(line))}), file=answers)


if __name__ == "__main__":
    main()
