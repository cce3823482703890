"""`headwise plan`: the arithmetic by hand, the command, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from deploy.cli import main
from deploy.plan_report import PlanReport, make_plan
from shards.cost.host import CoreRates, HostProfile, host_name, store_host
from shards.cost.precision import Precision
from shards.footprint import model_size, rank_footprints, tokens_that_fit
from shards.layout import make_layout
from shards.models.parameters import parameters
from shards.models.source import load_spec
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm, Rotary

DATA = Path(__file__).parent / "data"
QWEN = str(DATA / "qwen2-72b")
GPT3 = str(DATA / "gpt3")

Run = Callable[..., "Result"]


def llama(heads: int, kv_heads: int, *, layers: int = 2, tied: bool = True) -> ModelSpec:
    layer = Layer(
        Attention(heads, kv_heads, head_dim=64, scale=0.125, rotary=Rotary(1e5, 64)),
        FeedForward(1536, "silu", gated=True),
    )
    return ModelSpec(
        architecture="LlamaForCausalLM",
        width=576,
        vocabulary=49152,
        context=2048,
        layers=(layer,) * layers,
        norm=Norm("rms", 1e-5),
        tied_embeddings=tied,
        dtype="bfloat16",
    )


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def headwise_plan(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["headwise", "plan", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Result(int(ended.value.code or 0), printed.out, printed.err)

    return headwise_plan


def report(
    spec: ModelSpec, world: int, kv_memory: int | None = None, memory_per_rank: int | None = None
) -> PlanReport:
    return make_plan(
        spec,
        make_layout(spec, world),
        model="m",
        precision=Precision("bfloat16"),
        context=2048,
        kv_memory=kv_memory,
        memory_per_rank=memory_per_rank,
    )


def test_weights_and_kv_of_nine_heads_on_two_ranks() -> None:
    """5 and 4 query heads of 64, 2 KV heads each, 768 channels and 24576 rows each."""
    ranks = report(llama(9, 3), 2).ranks

    def rank_bytes(heads: int) -> int:
        qo, kv, ffn, norms = 2 * heads * 64 * 576, 2 * 2 * 64 * 576, 3 * 768 * 576, 2 * 576
        return 2 * (2 * (qo + kv + ffn + norms) + 24576 * 576 + 576)

    assert [rank.weight_bytes for rank in ranks] == [rank_bytes(5), rank_bytes(4)]
    assert [rank.kv_bytes_per_token for rank in ranks] == [2 * 2 * 2 * 64 * 2] * 2


def test_one_rank_holds_every_parameter_once() -> None:
    for spec in (llama(9, 3), llama(9, 3, tied=False)):
        elements = sum(math.prod(p.shape) for p in parameters(spec))
        assert model_size(spec).parameters == elements
        (footprint,) = rank_footprints(spec, make_layout(spec, 1), "float32")
        assert footprint.weights == 4 * elements
    table = 49152 * 576
    assert model_size(llama(9, 3)).active == model_size(llama(9, 3)).parameters
    untied = model_size(llama(9, 3, tied=False))
    assert untied.parameters - untied.active == table


def test_communication() -> None:
    """One all-reduce after the embedding, two per layer; rank 0 has its own logits already."""
    assert report(llama(9, 3), 1).communication.all_reduces == 0
    between = report(llama(9, 3), 2).communication
    assert between.all_reduces == 5
    assert between.all_reduce_bytes == 5 * 576 * 2
    assert between.gather_bytes == 24576 * 4


def test_tokens_that_fit_come_in_whole_blocks() -> None:
    assert tokens_that_fit(1000, kv_per_token=10, block_size=16) == 96
    assert tokens_that_fit(159, kv_per_token=10, block_size=16) == 0
    assert tokens_that_fit(-1, kv_per_token=10, block_size=16) == 0


def test_the_tightest_rank_decides() -> None:
    """Three ranks hold 2, 2 and 1 KV heads: 1024, 1024 and 512 bytes per token."""
    planned = report(llama(8, 4), 3, kv_memory=1 << 20)
    assert [rank.tokens for rank in planned.ranks] == [1024, 1024, 2048]
    assert (planned.tokens, planned.sequences) == (1024, 0)


def test_memory_per_rank_is_shared_with_the_weights() -> None:
    alone = report(llama(9, 3), 2)
    heaviest = max(rank.weight_bytes for rank in alone.ranks)
    planned = report(llama(9, 3), 2, memory_per_rank=heaviest + 16 * 1024)
    assert planned.ranks[0].tokens == 16
    assert (planned.ranks[1].tokens or 0) > 16
    short = report(llama(9, 3), 2, memory_per_rank=heaviest - 1)
    assert [rank.fits for rank in short.ranks] == [False, True]
    assert short.tokens == 0


def test_slowdown_against_a_perfect_cut() -> None:
    """Two ranks: 5 heads and 2 KV heads where 4.5 and 1.5 were perfect, FFN and rows in halves."""
    assert report(llama(9, 3), 1).slowdown == 1
    norms, attention = 5 * 576, (2 * 5 + 2 * 2) * 64 * 576
    halves = 2 * 3 * 768 * 576 + 24576 * 576
    whole = model_size(llama(9, 3)).active
    expected = 2 * (2 * attention + halves + norms) / whole
    assert report(llama(9, 3), 2).slowdown == pytest.approx(expected)


def test_layers_that_differ_are_told_apart() -> None:
    wide, narrow = llama(9, 3).layers[0], llama(6, 1).layers[0]
    spec = replace(llama(9, 3), layers=(wide, narrow, narrow, wide))
    splits = report(spec, 2).splits
    assert [[(run.start, run.stop) for run in split.layers] for split in splits] == [
        [(0, 1), (3, 4)],
        [(1, 3)],
    ]


@pytest.mark.parametrize("ranks", [8, 6, 5])
def test_qwen2_72b(run: Run, ranks: int) -> None:
    ran = run(
        *("--model", QWEN, "--tensor-parallel", str(ranks), "--device", "cuda"),
        *("--memory-per-rank", "80GiB", "--json"),
    )
    assert ran.exit_code == 0, ran.stderr
    planned = PlanReport.model_validate_json(ran.stdout)
    assert planned.tensor_parallel == ranks == len(planned.ranks)
    assert planned.splits[0].heads[-1].stop == 64
    assert planned.splits[0].kv_heads[-1].stop == 8
    assert 72.6e9 < planned.parameters < 72.8e9
    assert all(rank.fits and rank.tokens for rank in planned.ranks)
    assert planned.slowdown < 1.05


def test_gpt3_shape(run: Run) -> None:
    ran = run("-m", GPT3, "-n", "7", "--json")
    assert ran.exit_code == 0, ran.stderr
    planned = PlanReport.model_validate_json(ran.stdout)
    assert 174e9 < planned.parameters < 176e9
    assert [len(run) for run in planned.splits[0].heads] == [14, 14, 14, 14, 14, 13, 13]
    assert planned.communication.all_reduces == 193


def test_table_and_picture(run: Run) -> None:
    ran = run("--model", QWEN, "--tensor-parallel", "6", "--kv-memory", "4GiB")
    assert ran.exit_code == 0, ran.stderr
    for text in ("11-21 (11)", "1* 2* (2)", "161 all-reduces", "tokens that fit", "rank 5  Q"):
        assert text in ran.stdout
    rows = [line for line in ran.stdout.splitlines() if "(25344)" in line]
    assert len(rows) == 6, "a row of the table was folded or cut"


def test_capacity_alone_says_how_many_ranks(run: Run) -> None:
    ran = run("--model", QWEN, "--capacity", "2,1,1", "--json")
    assert ran.exit_code == 0, ran.stderr
    planned = json.loads(ran.stdout)
    assert [rank["capacity"] for rank in planned["ranks"]] == [2, 1, 1]
    heads = [run["stop"] - run["start"] for run in planned["splits"][0]["heads"]]
    assert heads == [32, 16, 16]


def test_dtype_and_context(run: Run) -> None:
    def planned(*options: str) -> PlanReport:
        ran = run("--model", GPT3, "--tp", "8", "--kv-memory", "8GiB", "--json", *options)
        assert ran.exit_code == 0, ran.stderr
        return PlanReport.model_validate_json(ran.stdout)

    half, full = planned("--device", "cuda"), planned("--dtype", "float32", "--context", "1024")
    assert (half.dtype, half.context, full.context) == ("float16", 2048, 1024)
    assert planned().dtype == "float16"
    assert full.ranks[0].weight_bytes == 2 * half.ranks[0].weight_bytes
    assert full.sequences == (full.tokens or 0) // 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tensor-parallel", "65"],
            "64 attention heads over tensor_parallel=65: at most 64 ranks can own a head; "
            "use tensor_parallel <= 64",
        ),
        (["--tensor-parallel", "0"], "tensor_parallel=0: at least one rank must own them"),
        (["--tensor-parallel", "2", "--capacity", "2,1,1"], "capacity lists 3 ranks"),
        (["--capacity", "2,x"], "--capacity 2,x: give one number per rank"),
        (["--capacity", "2,0"], "capacity of rank 1 is 0"),
        (["--kv-memory", "lots"], "--kv-memory lots: give a number of bytes with a unit"),
        (["--kv-memory", "1GiB", "--memory-per-rank", "2GiB"], "exclude each other"),
        (["--capacity", "1,1e300"], "capacity of rank 1 is 1e+300 times that of rank 0"),
        (["--device", "v100"], "device v100: use cpu, or one of a100-40, a100-80"),
        (["--device", "h200", "--link", "string"], "link string: known are nvlink3"),
        (["--device", "cpu", "--itl-slo", "1"], "this host has not been measured"),
        (["--device", "cuda", "--itl-slo", "1"], "device cuda: name the GPU, one of a100-40"),
        (["--device", "h200", "--itl-slo", "0"], "--itl-slo 0: give seconds above 0"),
        (["--device", "h200", "--batch", "1,x"], "--batch 1,x: give whole numbers above 0"),
        (["--device", "h200", "--measure"], "--measure with --device h200: only this host's"),
        (["--device", "a100-80", "--quantization", "fp8"], "has no fp8 arithmetic"),
        (["--capacity", "2,1", "--itl-slo", "1"], "sizes are compared on equal ranks"),
        (
            ["--device", "h200", "--prompt", "32768", "--output", "1"],
            "--prompt 32768 and --output 1: the model's positions end at 32768",
        ),
        (["--context", "40000"], "--context 40000: the model's positions end at 32768"),
    ],
)
def test_refusals_are_one_sentence_and_exit_code_1(
    run: Run, options: list[str], message: str
) -> None:
    ran = run("--model", QWEN, *options)
    assert ran.exit_code == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith("headwise: ")
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_a_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    ran = run("--model", str(tmp_path / "nowhere"))
    assert ran.exit_code == 1
    assert "nowhere" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_planning_loads_no_torch() -> None:
    script = (
        "import sys\n"
        "from deploy.plan import plan\n"
        f"plan({QWEN!r}, tensor_parallel=6)\n"
        "sys.exit(str({'torch', 'ray'} & set(sys.modules) or ''))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.stderr.strip() == ""


def test_the_configs_are_what_they_say() -> None:
    qwen, gpt3 = load_spec(QWEN, None), load_spec(GPT3, None)
    assert (qwen.width, qwen.vocabulary, len(qwen.layers)) == (8192, 152064, 80)
    assert (qwen.layers[0].attention.heads, qwen.layers[0].attention.kv_heads) == (64, 8)
    assert qwen.layers[0].ffn.width == 29568
    assert (gpt3.width, len(gpt3.layers), gpt3.layers[0].attention.heads) == (12288, 96, 96)
    assert gpt3.layers[0].attention.head_dim == 128


def test_a_named_device_is_predicted_for(run: Run) -> None:
    ran = run("-m", QWEN, "-n", "8", "--device", "h100-sxm", "--batch", "1,64", "--json")
    assert ran.exit_code == 0, ran.stderr
    found = PlanReport.model_validate_json(ran.stdout).prediction
    assert found is not None
    assert (found.device, found.devices, found.link) == ("h100-sxm", 8, "nvlink4")
    assert (found.prompt, found.output, found.context) == (512, 256, 640)
    one, many = found.batches
    assert (one.batch, many.batch) == (1, 64)
    assert one.itl_s < many.itl_s
    assert one.decode_bound == "memory"
    assert one.fits
    assert many.fits
    assert (found.sizes, found.best) == ((), None)


def test_quantised_weights_are_counted(run: Run) -> None:
    def planned(quantization: str) -> PlanReport:
        ran = run(
            *("-m", QWEN, "-n", "2", "--device", "h100-sxm", "--json"),
            *("--quantization", quantization),
        )
        assert ran.exit_code == 0, ran.stderr
        return PlanReport.model_validate_json(ran.stdout)

    whole, packed = planned("none"), planned("int4")
    assert packed.ranks[0].weight_bytes < 0.35 * whole.ranks[0].weight_bytes
    assert whole.prediction is not None
    assert packed.prediction is not None
    assert packed.prediction.kv_tokens > whole.prediction.kv_tokens
    assert packed.prediction.batches[0].itl_s < 0.6 * whole.prediction.batches[0].itl_s


def test_sizes_are_compared_for_an_objective(run: Run) -> None:
    options = ("-m", QWEN, "-n", "6", "--device", "h100-sxm")
    slo = ("--ttft-slo", "0.5", "--itl-slo", "0.02")
    ran = run(*options, *slo, "--json")
    assert ran.exit_code == 0, ran.stderr
    found = PlanReport.model_validate_json(ran.stdout).prediction
    assert found is not None
    assert [size.tensor_parallel for size in found.sizes] == [1, 2, 4, 6, 8]
    assert found.sizes[0].misses == ("memory", "itl")
    assert found.best in {size.tensor_parallel for size in found.sizes if not size.misses}
    printed = run(*options, *slo).stdout
    assert "TTFT <= 500 ms and ITL <= 20 ms" in printed
    assert "no: memory, itl" in printed
    assert f"best: tensor_parallel={found.best} with up to" in printed
    assert (
        "none of these sizes meets ITL <= 0.001 ms: the least with one sequence"
        in run(*options, "--itl-slo", "1e-6").stdout
    )
    too_large = run(*options, "--itl-slo", "1", "--sizes", "1", "-n", "1").stdout
    assert "the model does not fit" in too_large


def test_the_prediction_is_readable(run: Run) -> None:
    ran = run("-m", QWEN, "-n", "8", "--device", "h200", "--link", "infiniband-ndr")
    assert "predicted for 8 ranks on 8 x h200 over infiniband-ndr" in ran.stdout
    rows = [line for line in ran.stdout.splitlines() if line.rstrip().endswith("fits │")]
    assert len(rows) == 3, "a row of the table was folded or cut"


def test_this_host_is_predicted_for_once_it_is_measured(run: Run) -> None:
    without = run("-m", GPT3, "-n", "2")
    assert without.exit_code == 0
    assert "no prediction: device cpu: this host has not been measured" in without.stdout
    rates = CoreRates(2, 30e9, {"float32": 1e11, "bfloat16": 1e11, "float16": 1e11, "int8": 4e11})
    store_host(HostProfile(host_name(), 1 << 40, (rates,)))
    ran = run("-m", GPT3, "-n", "2", "--json")
    assert ran.exit_code == 0, ran.stderr
    here = PlanReport.model_validate_json(ran.stdout).prediction
    ran = run("-m", GPT3, "-n", "2", "--link", "ethernet-100", "--json")
    apart = PlanReport.model_validate_json(ran.stdout).prediction
    assert here is not None
    assert apart is not None
    assert (here.devices, here.link) == (1, "shared-memory")
    assert apart.devices == 2
    assert here.batches[0].itl_s > 1.9 * apart.batches[0].itl_s


def test_lengths_shrink_to_a_short_context(run: Run, tmp_path: Path) -> None:
    config = json.loads((Path(GPT3) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_positions": 100}))
    ran = run("-m", str(tmp_path), "--device", "h200", "-n", "8", "--json")
    assert ran.exit_code == 0, ran.stderr
    found = PlanReport.model_validate_json(ran.stdout).prediction
    assert found is not None
    assert (found.prompt, found.output) == (50, 50)
