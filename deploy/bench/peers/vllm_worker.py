"""vLLM, driven by `worker.py`. Runs as a script in vLLM's own environment: argument {"folder",
"dtype", "ranks", "max_sequences"}; imports nothing of headwise."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from typing import Any

_CONTEXT = 2048
_MARGIN = 64  # tokens by which other streams may be ahead of the last one to start


class Streams:
    """Requests that are sent together, stepped by hand."""

    def __init__(self, engine: Any, vocabulary: int) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._numbers = itertools.count()

    def tokens_per_s(self, question: dict[str, Any]) -> float:
        rng = random.Random(question["seed"])
        if question["kind"] == "prefill":
            began = time.perf_counter()
            names = self._send(rng, 1, question["tokens"], 1)
            self._until(names, dict.fromkeys(names, 1))
            return float(question["tokens"] / (time.perf_counter() - began))
        streams, tokens = question["streams"], question["tokens"]
        names = self._send(rng, streams, question["prompt_tokens"], 1 + tokens + _MARGIN)
        have = self._until(names, dict.fromkeys(names, 1))
        began = time.perf_counter()
        last = min(names, key=lambda name: have[name])
        self._until(names, {last: have[last] + tokens})
        seconds = time.perf_counter() - began
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return float(streams * tokens / seconds)

    def _send(self, rng: random.Random, streams: int, length: int, tokens: int) -> list[str]:
        from vllm import SamplingParams, TokensPrompt  # type: ignore[import-not-found]

        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        names = []
        for _ in range(streams):
            ids = [rng.randrange(self._vocabulary) for _ in range(length)]
            names.append(str(next(self._numbers)))
            self._engine.add_request(names[-1], TokensPrompt(prompt_token_ids=ids), parameters)
        return names

    def _until(self, names: list[str], wanted: dict[str, int]) -> dict[str, int]:
        """Step until each has as many tokens as wanted; how many each has then."""
        have = dict.fromkeys(names, 0)
        while any(have[name] < count for name, count in wanted.items()):
            for output in self._engine.step():
                if output.request_id in have:
                    have[output.request_id] = len(output.outputs[0].token_ids)
        return have


def main() -> None:
    options = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print is no answer
    import torch
    import vllm

    llm = vllm.LLM(
        model=options["folder"],
        dtype=options["dtype"],
        tensor_parallel_size=options["ranks"],
        max_num_seqs=options["max_sequences"],
        max_model_len=_CONTEXT,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    print(json.dumps({"vLLM": vllm.__version__, "torch": torch.__version__}), file=answers)
    streams = Streams(llm.llm_engine, llm.llm_engine.model_config.get_vocab_size())
    for line in sys.stdin:
        print(json.dumps({"tokens_per_s": streams.tokens_per_s(json.loads(line))}), file=answers)
    llm.llm_engine.engine_core.shutdown()  # or its shared memory outlives it


if __name__ == "__main__":
    main()
