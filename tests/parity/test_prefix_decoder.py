"""A prefix decoder: whatever its family, a model whose config names the mask reads its prompt in
both directions. The judge is the same model of `transformers`, given that mask explicitly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from tests.models import save, tiny_model
from tests.parity.case import Case
from tests.ranks import generate, thread_ranks

STEPS = 48
TOLERANCE = 2e-5
LENGTHS = (1, 8, 17, 41)  # around block borders; none is computed in chunks

CASES = [
    Case("llama-9-3", "llama", {}),
    Case("gpt2-7", "gpt2", {}),
    Case("falcon-mqa-7", "falcon", {}),
    Case("neox-7", "gpt_neox", {}),
    Case("bloom-alibi-7", "bloom", {}),
]


def judged(model: PreTrainedModel, tokens: list[int], prompt: int) -> np.ndarray:
    """Logits [tokens, vocabulary] of `tokens`, of which the first `prompt` see each other."""
    at = torch.arange(len(tokens))
    seen = (at <= at[:, None]) | ((at < prompt) & (at[:, None] < prompt))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    if model.config.model_type == "bloom":
        # Its own biases know the past alone: there a bias grows with the key's position, which is
        # the distance but for what all keys of a query have in common.
        slopes = _get_alibi_slopes(model.config.n_head, mask.device)[:, None, None]
        away = (at - at[:, None]).abs()
        model.transformer.build_alibi_tensor = lambda *_, dtype: -slopes * away
    with torch.inference_mode():
        return model(torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0].numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_transformers_with_the_mask(case: Case, tmp_path: Path) -> None:
    model = tiny_model(case.family, **case.config, headwise_mask="prefix")
    save(model, tmp_path)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in LENGTHS]
    for world in (1, 2, 3, 4):
        with thread_ranks(tmp_path, world) as ranks:
            outputs = generate(ranks, prompts, STEPS, max_step_tokens=max(LENGTHS))
        for prompt, (tokens, logits) in zip(prompts, outputs, strict=True):
            expected = judged(model, prompt + tokens, len(prompt))[len(prompt) - 1 : -1]
            error = np.abs(logits - expected).max() / np.abs(expected).max()
            assert error < TOLERANCE, f"{world} ranks: logits differ by {error:.1e}"
            assert tokens == expected.argmax(-1).tolist()
