"""The cost model: what a step is made of, how its time adds up, and what others have measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shards.cost.device import ACCELERATORS, Accelerator, accelerator
from shards.cost.errors import CannotPredict
from shards.cost.link import LINKS, Link, link
from shards.cost.objective import Objective, best, candidates
from shards.cost.precision import Precision, Quantization
from shards.cost.prediction import CostModel, Prediction, predict
from shards.cost.work import Chunk, Phase, Work, Workload
from shards.footprint import model_size, rank_footprints
from shards.layout import make_layout
from shards.models.spec import Attention, ModelSpec
from tests.unit.cost_specs import llama

A100 = accelerator("a100-80")
NCCL = replace(LINKS["nvlink3"], one_shot=False)


LLAMA2_7B = llama(4096, 32, 32, 32, 11008, 32000)
LLAMA3_8B = llama(4096, 32, 32, 8, 14336, 128256)
LLAMA2_70B = llama(8192, 80, 64, 8, 28672, 32000)
LLAMA3_70B = llama(8192, 80, 64, 8, 28672, 128256)


def on(spec: ModelSpec, ranks: int, device: str, **options: object) -> Prediction:
    return predict(
        spec,
        make_layout(spec, ranks),
        accelerator(device),
        **{"dtype": "bfloat16", **options},  # type: ignore[arg-type]
    )


def calls(phases: list[Phase], rank: int = 0) -> list[tuple[Work, int]]:
    return [
        (work, phase.times)
        for phase in phases
        for work in phase.ranks[min(rank, len(phase.ranks) - 1)]
    ]


def decode_work(spec: ModelSpec, ranks: int, precision: Precision, rank: int = 0) -> list[Work]:
    workload = Workload(spec, make_layout(spec, ranks), precision, "cuda")
    phases = list(workload.step([Chunk(0, 1)], 1))
    return [work for work, times in calls(phases, rank) for _ in range(times)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_decode_reads_every_weight_of_a_rank_once(ranks: int, tied: bool) -> None:
    """All of its footprint but an embedding that is only looked up; what is left are the hidden
    states that go in and out of calls, far fewer than the weights."""
    spec = llama(tied=tied)
    layout = make_layout(spec, ranks)
    footprints = rank_footprints(spec, layout, "float32")
    for rank, footprint in enumerate(footprints):
        lookup = 0 if tied else 4 * spec.width * len(layout.vocabulary[rank])
        reads = [
            work
            for work in decode_work(spec, ranks, Precision("float32"), rank)
            if work.call not in ("embedding", "attention", "sample")
        ]
        weights = footprint.weights - lookup
        assert weights < sum(work.streamed for work in reads) < 1.02 * weights + 4 * spec.vocabulary


def test_a_token_costs_two_operations_per_active_weight() -> None:
    spec = llama()
    operations = sum(
        work.operations
        for work in decode_work(spec, 1, Precision("bfloat16"))
        if work.call != "attention"
    )
    norms = (2 * len(spec.layers) + 1) * spec.width
    assert operations == 2 * (model_size(spec).active - norms)


def test_ranks_share_the_operations_and_copy_kv_heads() -> None:
    """9 heads over 3 KV heads on 2 ranks: 5 and 4 heads, and the KV head in the middle twice."""
    spec = llama()
    whole = decode_work(spec, 1, Precision("bfloat16"))
    shares = [decode_work(spec, 2, Precision("bfloat16"), rank) for rank in range(2)]
    for at, work in enumerate(whole[:-1]):
        parts = sum(share[at].operations for share in shares)
        copied = 2 * 2 * 64 * spec.width if work.call == "qkv" else 0
        assert parts == work.operations + copied, work.call


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_pairs_and_keys_of_a_chunk(window: int | None) -> None:
    for start in (0, 1, 5, 20):
        for tokens in (1, 2, 8):
            seen = [
                range(max(0, at + 1 - (window or at + 1)), at + 1)
                for at in range(start, start + tokens)
            ]
            chunk = Chunk(start, tokens)
            assert chunk.pairs(window) == sum(map(len, seen))
            assert chunk.keys(window) == len(set().union(*seen))


def test_quantised_weights_weigh_what_their_scheme_says() -> None:
    spec = llama()
    layout = make_layout(spec, 1)

    def weights(quantization: Quantization) -> int:
        return Precision("bfloat16", quantization).rank_bytes(spec, layout)[0]

    (footprint,) = rank_footprints(spec, layout, "bfloat16")
    assert weights("none") == footprint.weights
    tables, norms = 2 * spec.vocabulary * spec.width, (2 * 4 + 1) * spec.width
    linear = model_size(spec).parameters - tables - norms
    assert weights("int8") == (linear + tables) * 34 // 32 + 2 * norms
    assert weights("int4") == linear * 18 // 32 + tables * 34 // 32 + 2 * norms
    assert weights("fp8") == linear + 2 * tables + 2 * norms


def test_time_is_the_slower_of_moving_and_computing() -> None:
    """A device without overheads that moves for ever, and one that computes in no time."""
    spec, layout = llama(), make_layout(llama(), 1)
    plain = Accelerator("plain", 10**12, 1e12, {"float32": 1e12}, "nvlink4", 1, 1, 0, 0, 0)
    work = decode_work(spec, 1, Precision("float32"))
    moving = predict(spec, layout, replace(plain, operations={"float32": 1e30}), dtype="float32")
    expected = sum(each.streamed for each in work) / 1e12
    assert moving.decode.bound == "memory"
    # The context of 512 tokens is read besides.
    assert moving.itl_s == pytest.approx(expected + 512 * 4 * 4 * 2 * 3 * 64 / 1e12, rel=1e-3)
    computing = predict(spec, layout, replace(plain, bandwidth=1e30), dtype="float32", context=1)
    assert computing.decode.compute_s == pytest.approx(sum(w.operations for w in work) / 1e12)
    assert computing.prefill.bound == "compute"


def test_the_all_reduce_waits_for_the_slowest_rank() -> None:
    """On capacities 1,1 and 2,1 of one device: the slower half of the latter takes a third of the
    work at half the speed, so that both ranks of it work for two thirds of the time of one."""
    spec = llama(1024, 8, 48, 48, 6144)
    no_link = Link("none", 1e30, 0, 0, one_shot=True)
    device = replace(A100, call_s=0, step_s=0)

    def itl(capacity: list[float]) -> float:
        layout = make_layout(spec, len(capacity), capacity)
        return predict(spec, layout, device, no_link, dtype="bfloat16").itl_s

    assert itl([2, 1]) == pytest.approx(itl([1]) * 2 / 3, rel=0.02)
    assert itl([1, 1]) == pytest.approx(itl([1]) / 2, rel=0.02)


def test_uneven_heads_cost_what_their_slowest_rank_costs() -> None:
    """5 and 4 of 9 heads: as long as two ranks of 5 of 10 heads would take in attention."""
    fast = Link("none", 1e30, 0, 0, one_shot=True)
    nine = llama(576, 8, 9, 9)
    ten = replace(
        nine, layers=(replace(nine.layers[0], attention=Attention(10, 10, 64, 0.125)),) * 8
    )
    times = [
        predict(spec, make_layout(spec, 2), A100, fast, dtype="bfloat16").itl_s
        for spec in (nine, ten)
    ]
    assert times[0] == pytest.approx(times[1])


def test_all_reduce_takes_the_faster_form() -> None:
    nvlink = link("nvlink4")
    ring_only = replace(nvlink, one_shot=False)
    assert nvlink.all_reduce_s(1, 1 << 20) == 0
    assert nvlink.all_reduce_s(8, 8192) == pytest.approx(
        nvlink.start_s + nvlink.alpha_s + 7 * 8192 / (nvlink.bandwidth * nvlink.share)
    )
    assert nvlink.all_reduce_s(8, 8192) < ring_only.all_reduce_s(8, 8192)
    assert nvlink.all_reduce_s(8, 1 << 28) == ring_only.all_reduce_s(8, 1 << 28)
    large = 2 * 7 / 8 * (1 << 28) / (nvlink.bandwidth * nvlink.share)
    assert ring_only.all_reduce_s(8, 1 << 28) == pytest.approx(large, rel=0.1)


def test_a_slow_link_binds() -> None:
    fast = on(LLAMA3_70B, 8, "h100-sxm")
    slow = on(LLAMA3_70B, 8, "h100-sxm", link=link("ethernet-25"))
    assert fast.decode.bound == "memory"
    assert slow.decode.bound == "all-reduce"
    assert slow.itl_s > 3 * fast.itl_s


def test_more_sequences_share_the_weights() -> None:
    one, many = (on(LLAMA3_8B, 1, "h100-sxm", batch=batch) for batch in (1, 32))
    assert one.itl_s < many.itl_s < 2 * one.itl_s
    assert many.tokens_per_second > 16 * one.tokens_per_second
    assert many.ttft_s > one.ttft_s


def test_long_prompts_take_several_steps() -> None:
    model = CostModel(
        LLAMA3_8B, make_layout(LLAMA3_8B, 1), A100, None, Precision("bfloat16"), step_tokens=256
    )
    one, four = (model.prefill(1, prompt, prompt) for prompt in (256, 1024))
    assert four.overhead_s == pytest.approx(4 * one.overhead_s, rel=0.02)
    assert 4 * one.compute_s < four.compute_s < 4.5 * one.compute_s


def test_shares_add_up() -> None:
    decode = on(LLAMA3_70B, 4, "h200", batch=16).decode
    assert sum(decode.shares.values()) == pytest.approx(1)
    assert decode.total_s == pytest.approx(on(LLAMA3_70B, 4, "h200", batch=16).itl_s)


def test_memory_decides_what_fits() -> None:
    small, large = (on(LLAMA3_70B, ranks, "a100-80") for ranks in (1, 4))
    assert small.kv_tokens == 0
    assert not small.fits
    assert large.fits
    # 80 GB less a quarter of 141 GB, 320 KiB of keys and values per token over 4 ranks.
    assert large.kv_tokens == pytest.approx(0.9 * (80e9 - 141.1e9 / 4) / (320 * 1024 / 4), rel=0.01)


# Published: gpt-fast's README, tokens/s of one sequence and a 5-token prompt, on A100-80GB with
# NCCL. The memory share, the time of a call and the start of an all-reduce are fitted to the
# bfloat16 rows, the shares of packed weights to the others; 15% is what that leaves, and what a
# change may not exceed.
GPT_FAST: list[tuple[ModelSpec, int, Quantization, float]] = [
    (LLAMA2_7B, 1, "none", 104.9),
    (LLAMA2_7B, 2, "none", 168.84),
    (LLAMA2_7B, 4, "none", 254.02),
    (LLAMA2_7B, 8, "none", 328.43),
    (LLAMA2_70B, 2, "none", 21.32),
    (LLAMA2_70B, 4, "none", 38.01),
    (LLAMA2_70B, 8, "none", 62.50),
    (LLAMA3_8B, 1, "none", 93.89),
    (LLAMA3_8B, 2, "none", 149.10),
    (LLAMA3_8B, 4, "none", 217.21),
    (LLAMA3_8B, 8, "none", 276.01),
    (LLAMA3_70B, 4, "none", 37.45),
    (LLAMA3_70B, 8, "none", 58.78),
    (LLAMA2_7B, 1, "int8", 155.58),
    (LLAMA3_8B, 1, "int8", 137.64),
    (LLAMA2_70B, 1, "int8", 19.13),
    (LLAMA2_70B, 8, "int8", 80.44),
    (LLAMA2_7B, 1, "int4", 196.80),
    (LLAMA2_70B, 1, "int4", 25.25),
    (LLAMA2_70B, 8, "int4", 90.77),
]


@pytest.mark.parametrize(("spec", "ranks", "quantization", "published"), GPT_FAST)
def test_published_decode_rates_of_a100(
    spec: ModelSpec, ranks: int, quantization: Quantization, published: float
) -> None:
    predicted = on(
        spec, ranks, "a100-80", link=NCCL, quantization=quantization, prompt=5, context=100
    )
    assert predicted.tokens_per_second == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(
    ("spec", "ranks", "device", "slowest", "fastest"),
    [
        # What servers in wide use reach with bfloat16 weights and one sequence, in tokens/s.
        (LLAMA3_8B, 1, "h100-sxm", 90, 160),
        (LLAMA3_8B, 1, "a100-80", 70, 100),
        (LLAMA3_8B, 1, "l4", 12, 18),
        (LLAMA3_70B, 8, "h100-sxm", 50, 110),
        (LLAMA3_70B, 4, "mi300x", 45, 100),
    ],
)
def test_decode_rates_are_of_the_right_order(
    spec: ModelSpec, ranks: int, device: str, slowest: float, fastest: float
) -> None:
    assert slowest < on(spec, ranks, device).tokens_per_second < fastest


@pytest.mark.parametrize(
    ("device", "least", "most"), [("a100-80", 8e3, 16e3), ("h100-sxm", 20e3, 45e3)]
)
def test_prefill_rates_are_of_the_right_order(device: str, least: float, most: float) -> None:
    """Llama-3-8B, tokens/s of a long prompt."""
    predicted = on(LLAMA3_8B, 1, device, prompt=4096, step_tokens=4096)
    assert least < 4096 / predicted.ttft_s < most


def compared(spec: ModelSpec, objective: Objective, sizes: tuple[int, ...] = (1, 2, 4, 8)):  # type: ignore[no-untyped-def]
    return candidates(
        spec,
        [make_layout(spec, size) for size in sizes],
        accelerator("h100-sxm"),
        None,
        Precision("bfloat16"),
        objective,
        prompt=512,
        context=640,
    )


def test_the_largest_batch_that_meets_an_objective() -> None:
    objective = Objective(ttft_s=0.5, itl_s=0.02)
    found = compared(LLAMA3_70B, objective)
    assert [each.tensor_parallel for each in found] == [1, 2, 4, 8]
    assert found[0].misses == ("memory", "itl")
    assert not found[1].meets
    for each in found[2:]:
        assert each.meets
        assert each.prediction.itl_s <= 0.02
        assert each.prediction.ttft_s <= 0.5
        model = CostModel(
            LLAMA3_70B,
            make_layout(LLAMA3_70B, each.tensor_parallel),
            accelerator("h100-sxm"),
            None,
            Precision("bfloat16"),
        )
        more = model.predict(each.prediction.batch + 1, 512, 640)
        assert more.itl_s > 0.02 or more.ttft_s > 0.5 or not more.fits
    chosen = best(found)
    assert chosen is not None
    rates = {c.tensor_parallel: c.prediction.tokens_per_second_per_device for c in found if c.meets}
    assert chosen.tensor_parallel == max(rates, key=lambda size: rates[size])


def test_no_size_meets_what_nothing_can() -> None:
    found = compared(LLAMA3_8B, Objective(itl_s=1e-6))
    assert best(found) is None
    assert all(each.misses == ("itl",) and each.prediction.batch == 1 for each in found)


def test_a_small_model_wants_few_devices() -> None:
    chosen = best(compared(LLAMA3_8B, Objective(itl_s=0.05)))
    assert chosen is not None
    assert chosen.tensor_parallel == 1


@pytest.mark.parametrize("device", ACCELERATORS.values(), ids=lambda device: device.name)
def test_every_accelerator_predicts(device: Accelerator) -> None:
    assert device.link in LINKS
    for dtype in ("float32", "bfloat16", "float16"):
        found = predict(LLAMA3_8B, make_layout(LLAMA3_8B, 2), device, dtype=dtype)
        assert 0 < found.itl_s < found.ttft_s


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "fp8"}, "the device has no fp8 arithmetic"),
        ({"quantization": "int3"}, "quantization int3: use one of auto, none, int8, int4, fp8"),
        ({"dtype": "int8"}, "dtype int8: use one of float32, bfloat16, float16"),
        ({"batch": 0}, "batch 0: give at least 1"),
        ({"batch": 513}, "batch 513: a step of 512 tokens has no room"),
        ({"prompt": 0}, "prompt 0"),
        ({"context": 0}, "context 0"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(CannotPredict, match=message):
        on(LLAMA3_8B, 1, "a100-80", **options)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(CannotPredict, match=r"device v100: use cpu, or one of a100-40, "):
        accelerator("v100")
    with pytest.raises(CannotPredict, match=r"link string: known are nvlink3, "):
        link("string")
