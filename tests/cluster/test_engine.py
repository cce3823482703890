"""`Engine` on a Ray of its own: what the README shows, with real actors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster import ClusterConfig, Engine, Generation, InvalidRequest
from cluster.request import FinishReason
from tests.cluster.faults import kill_rank_1_in_mid_stream
from tests.models import save, tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """More ranks than this machine has cores, over shared memory. No tokenizer: ids only."""
    path: Path = tmp_path_factory.mktemp("qwen2")
    save(tiny_model("qwen2", num_attention_heads=9, num_key_value_heads=3), path)
    config = ClusterConfig.model_validate(
        {
            "model": str(path),
            "tensor_parallel": 3,
            "kv_memory": "1MiB",
            "max_queued_requests": 0,
            "recoveries": 0,
        }
    )
    with Engine(config) as engine:
        yield engine


def test_one_prompt_gives_one_generation(engine: Engine) -> None:
    assert engine.driver.collective == "shared_memory"
    generation = engine.generate([1, 2, 3], max_tokens=5, temperature=0, logprobs=2)
    assert isinstance(generation, Generation)
    assert len(generation.token_ids) == 5
    assert generation.finish_reason is FinishReason.LENGTH
    assert generation.usage.prompt_tokens == 3
    assert generation.text == ""
    assert generation.logprobs is not None
    assert [entry.token for entry in generation.logprobs] == list(generation.token_ids)
    assert all(entry.rank == 1 for entry in generation.logprobs)


def test_a_list_comes_back_in_order_and_may_be_longer_than_the_queue(engine: Engine) -> None:
    prompts = [[i + 1] * (1 + i % 7) for i in range(50)]
    together = engine.generate(prompts, max_tokens=4, temperature=0, progress=False)
    assert [g.usage.prompt_tokens for g in together] == [len(prompt) for prompt in prompts]
    alone = engine.generate(prompts[33], max_tokens=4, temperature=0)
    assert together[33].token_ids == alone.token_ids


def test_every_fault_is_named_before_anything_runs(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.generate([[1], [10**6]], temperature=-1, top_p=2, max_tokens=0)
    fields = {violation.field for violation in refused.value.violations}
    assert {"sampling.temperature", "sampling.top_p", "stopping.max_tokens"} <= fields


def test_text_without_a_tokenizer_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        engine.generate("hello")


@pytest.mark.parametrize(
    "prompt", [np.array([1, 2, 3]), torch.tensor([1, 2, 3]), [np.int64(1), 2, 3], (1, 2, 3)]
)
def test_ids_may_come_as_people_have_them(engine: Engine, prompt: Any) -> None:
    options = {"temperature": np.float32(0.5), "seed": np.uint64(3), "max_tokens": np.int64(4)}
    expected = engine.generate([1, 2, 3], temperature=0.5, seed=3, max_tokens=4)
    assert engine.generate(prompt, **options).token_ids == expected.token_ids
    assert engine.generate([prompt, prompt], **options)[1].token_ids == expected.token_ids
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        (None, {}, "prompt"),
        (b"bytes", {}, "prompt"),
        ([[1], []], {}, "prompt"),
        ([[1], 2], {}, "prompt"),
        ([1], {"stop": [1]}, "stop"),
        ([1], {"stop_token_ids": 5}, "stop_token_ids"),
        ([1], {"logit_bias": [1]}, "logit_bias"),
        ([1], {"min_tokens": 2, "stop_token_ids": range(131)}, "stopping.min_tokens"),
    ],
)
def test_what_cannot_be_meant_names_its_field(
    engine: Engine, prompt: Any, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.generate(prompt, **options)
    assert field in {violation.field for violation in refused.value.violations}


def test_a_killed_rank_is_named(engine: Engine) -> None:
    """Last in this module: the group is gone afterwards."""
    kill_rank_1_in_mid_stream(engine)
