"""The application's arguments, as a Serve config file and as a command line give them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from deploy.args import AppArgs, flattened

SECTIONS = {
    "cluster": {"model": "m", "capacity": [2, 1]},
    "server": {"grpc_port": 0, "host": "0.0.0.0"},
    "replicas": 2,
}


def test_sections_and_flat_fields_are_the_same() -> None:
    flat = {
        "model": "m",
        "capacity": "2,1",
        "grpc_port": "0",
        "host": "0.0.0.0",
        "replicas": "2",
    }

    assert AppArgs.model_validate(flat) == AppArgs.model_validate(SECTIONS)
    assert AppArgs.model_validate(flattened(SECTIONS)) == AppArgs.model_validate(SECTIONS)
    assert AppArgs.model_validate(flat).cluster.tensor_parallel == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"model": "m", "tensor_paralell": 2},
        {"cluster": {"model": "m", "grpc_port": 1}},
        {"cluster": {"model": "m"}, "host": "0.0.0.0"},
        {"model": "m", "replicas": 0},
        {"model": "m", "quantization": "int3"},
        {"model": "m", "log_format": "xml"},
        {"model": "m", "tls_client_ca": "ca.pem"},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AppArgs.model_validate(wrong)


def test_arguments_survive_the_way_to_another_process() -> None:
    args = AppArgs.model_validate({"model": "m", "kv_memory": "2GiB", "capacity": "2,1"})

    assert AppArgs.model_validate_json(args.model_dump_json()) == args
    assert args.cluster.kv_memory == 2 << 30
