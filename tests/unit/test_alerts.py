"""Alert rules and dashboard: they name metrics that exist, and fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.telemetry.catalog import CATALOG
from tests.conftest import ROOT

MONITORING = ROOT / "k8s/components/monitoring"
NAME = re.compile(r"\b(?:vllm|headwise)[:_][a-z_:0-9]+")
QUOTED = re.compile(r'"[^"]*"')
LABELS_ADDED = {"namespace", "pod", "le", "api"}


def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"][
        "groups"
    ]
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MONITORING / "headwise.json").read_text())
    return found


def queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in dashboard()["templating"]["list"]:
        yield variable.get("definition", "")


def test_every_metric_that_is_asked_for_exists() -> None:
    exposed = {name for metric in CATALOG for name in metric.samples}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = {name for query in queries() for name in NAME.findall(QUOTED.sub("", query))}
    assert len(asked) > 25
    assert asked <= exposed | recorded


def test_every_label_that_is_asked_for_exists() -> None:
    known = {label for metric in CATALOG for label in metric.labels} | LABELS_ADDED
    asked = set()
    for query in queries():
        asked |= set(re.findall(r"(\w+)\s*=~?\s*\"", query))
        for labels in re.findall(r"(?:by|on|ignoring) \(([^)]*)\)", query):
            asked |= {label.strip() for label in labels.split(",")}
    assert asked <= known


def test_a_bucket_that_a_rule_reads_is_there() -> None:
    buckets = {m.name: {str(bound) for bound in m.buckets} for m in CATALOG if m.buckets}
    found = [
        (name, bound)
        for rule in rules()
        for name, bound in re.findall(r'([\w:]+)_bucket\{le="([^"]*)"', rule["expr"])
    ]
    assert found
    assert all(bound in buckets[name] for name, bound in found)


def test_every_alert_has_its_section_in_the_runbook_and_its_row_in_the_guide() -> None:
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    runbook = (ROOT / "docs/runbook.md").read_text()
    sections = {
        name
        for heading in re.findall(r"^## (Headwise.*)$", runbook, re.MULTILINE)
        for name in heading.split(", ")
    }
    guide = (ROOT / "docs/observability.md").read_text()
    rows = {
        name
        for cell in re.findall(r"^\| (`Headwise[^|]*) \|", guide, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
    }
    assert sections == alerts
    assert rows == alerts


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


# What follows asks Prometheus itself.

POD = 'namespace="n", pod="p", model_name="m"'
MODEL = {"namespace": "n", "model_name": "m"}
# Alert -> series with a sample a minute, when to look, and the labels that it then has.
FIRES: dict[str, tuple[dict[str, str], str, dict[str, str]]] = {
    "HeadwiseAbsent": ({}, "6m", {}),
    "HeadwiseNotReady": ({f"headwise_ready{{{POD}}}": "1x3 0x9"}, "8m", {**MODEL, "pod": "p"}),
    "HeadwiseRankDown": (
        {
            f'headwise_rank_up{{{POD}, rank="0"}}': "1x9",
            f'headwise_rank_up{{{POD}, rank="1"}}': "1x3 0x9",
        },
        "6m",
        {**MODEL, "pod": "p", "rank": "1"},
    ),
    "HeadwiseErrors": (
        {
            f'headwise_request_errors_total{{{POD}, code="UNAVAILABLE"}}': "0+10x20",
            f'vllm:request_success_total{{{POD}, finished_reason="stop"}}': "0+100x20",
        },
        "15m",
        MODEL,
    ),
    "HeadwiseRefusals": (
        {
            f'headwise_request_errors_total{{{POD}, code="RESOURCE_EXHAUSTED"}}': "0+50x30",
            f'vllm:request_success_total{{{POD}, finished_reason="stop"}}': "0+100x30",
        },
        "20m",
        MODEL,
    ),
    "HeadwiseQueueLong": (
        {f"vllm:num_requests_waiting{{{POD}}}": "40x20"},
        "11m",
        {**MODEL, "pod": "p"},
    ),
    "HeadwiseKVCacheFull": (
        {
            f"vllm:kv_cache_usage_perc{{{POD}}}": "0.99x20",
            f"vllm:num_requests_waiting{{{POD}}}": "1x20",
        },
        "11m",
        {**MODEL, "pod": "p"},
    ),
    "HeadwisePreemptionStorm": (
        {
            f"vllm:num_preemptions_total{{{POD}}}": "0+90x40",
            f'vllm:request_success_total{{{POD}, finished_reason="stop"}}': "0+100x40",
        },
        "30m",
        MODEL,
    ),
    "HeadwiseTTFTBurnsFast": (
        {
            f'vllm:time_to_first_token_seconds_bucket{{{POD}, le="2.5"}}': "0+80x90",
            f"vllm:time_to_first_token_seconds_count{{{POD}}}": "0+100x90",
        },
        "80m",
        MODEL,
    ),
    "HeadwiseTTFTBurns": (
        {
            f'vllm:time_to_first_token_seconds_bucket{{{POD}, le="2.5"}}': "0+92x400",
            f"vllm:time_to_first_token_seconds_count{{{POD}}}": "0+100x400",
        },
        "400m",
        MODEL,
    ),
    # Of each minute's 30 s of steps, rank 1 waits 1 s and the others 12.
    "HeadwiseSlowRank": (
        {
            **{
                f'headwise_rank_phase_seconds_total{{{POD}, rank="{rank}", phase="all_reduce"}}': (
                    f"0+{wait}x40"
                )
                for rank, wait in enumerate((12, 1, 12))
            },
            **{
                f'headwise_rank_step_seconds_total{{{POD}, rank="{rank}"}}': "0+30x40"
                for rank in range(3)
            },
        },
        "30m",
        {**MODEL, "pod": "p", "rank": "1"},
    ),
    # The tests' clock begins at 0.
    "HeadwiseCertificateExpires": (
        {'headwise_certificate_expiry_timestamp_seconds{namespace="n", pod="p"}': "900000x90"},
        "70m",
        {"namespace": "n", "pod": "p"},
    ),
}
# A server that is well: none of the alerts fires.
WELL = {
    f"headwise_ready{{{POD}}}": "1x400",
    f'headwise_rank_up{{{POD}, rank="0"}}': "1x400",
    f'headwise_rank_up{{{POD}, rank="1"}}': "1x400",
    f"vllm:num_requests_waiting{{{POD}}}": "3x400",
    f"vllm:kv_cache_usage_perc{{{POD}}}": "0.97 0.4x400",
    f"vllm:num_preemptions_total{{{POD}}}": "0+1x400",
    f'vllm:request_success_total{{{POD}, finished_reason="stop"}}': "0+100x400",
    f'headwise_request_errors_total{{{POD}, code="UNAVAILABLE"}}': "0+1x400",
    f'headwise_request_errors_total{{{POD}, code="RESOURCE_EXHAUSTED"}}': "0+1x400",
    f'headwise_request_errors_total{{{POD}, code="INVALID_ARGUMENT"}}': "0+900x400",
    f'vllm:time_to_first_token_seconds_bucket{{{POD}, le="2.5"}}': "0+995x400",
    f"vllm:time_to_first_token_seconds_count{{{POD}}}": "0+1000x400",
    **{
        f'headwise_rank_phase_seconds_total{{{POD}, rank="{rank}", phase="all_reduce"}}': (
            f"0+{wait}x400"
        )
        for rank, wait in enumerate((6, 4))
    },
    **{
        f'headwise_rank_step_seconds_total{{{POD}, rank="{rank}"}}': "0+30x400" for rank in range(2)
    },
    'headwise_certificate_expiry_timestamp_seconds{namespace="n", pod="p"}': "9000000x400",
}


@pytest.fixture(scope="module")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rules as Prometheus reads them."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not on the PATH; it comes with Prometheus")
    folder = tmp_path_factory.mktemp("rules")
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}))
    return folder


def check(folder: Path, *arguments: str) -> None:
    ran = subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def check_firing(
    folder: Path, series: dict[str, str], at: str, selector: str, *alerts: dict[str, str]
) -> None:
    """Hold what fires at a time against `alerts`, label by label."""
    fires = [
        "ALERTS{" + ", ".join(f'{name}="{value}"' for name, value in alert.items()) + "}"
        for alert in alerts
    ]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": value} for name, value in series.items()],
        "promql_expr_test": [
            {
                "expr": f'ALERTS{{alertstate="firing"{selector}}}',
                "eval_time": at,
                "exp_samples": [{"labels": labels, "value": 1} for labels in fires],
            }
        ],
    }
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (folder / "test.yaml").write_text(yaml.safe_dump(document))
    check(folder, "test", "rules", "test.yaml")


def test_prometheus_takes_the_rules(promtool: Path) -> None:
    check(promtool, "check", "rules", "rules.yaml")


def test_every_alert_has_a_case() -> None:
    assert set(FIRES) == {rule["alert"] for rule in rules() if "alert" in rule}


@pytest.mark.parametrize("alert", FIRES)
def test_an_alert_fires_and_names_who(promtool: Path, alert: str) -> None:
    series, at, labels = FIRES[alert]
    (severity,) = [rule["labels"]["severity"] for rule in rules() if rule.get("alert") == alert]
    expected = {"alertname": alert, "alertstate": "firing", "severity": severity, **labels}
    check_firing(promtool, series, at, f', alertname="{alert}"', expected)


def test_no_alert_fires_while_all_is_well(promtool: Path) -> None:
    check_firing(promtool, WELL, "399m", "")
