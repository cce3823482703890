"""Generate client/headwise/v1 from proto/headwise/v1, or check that what is committed is current.

python scripts/generate_stubs.py            write the stubs
python scripts/generate_stubs.py --check    exit 1, with a summary, where they differ
"""

from __future__ import annotations

import argparse
import difflib
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
CLIENT = ROOT / "client"
PACKAGE = Path("headwise/v1")
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(target: Path) -> None:
    """Write the stubs of every proto file under `target`; exits as protoc does if it fails."""
    sources = sorted(str(path.relative_to(PROTO)) for path in (PROTO / PACKAGE).glob("*.proto"))
    # The well-known types (google/protobuf/*.proto) come with grpc_tools.
    well_known = files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"-I{PROTO}", f"-I{well_known}", *outputs, *sources])
    if status != 0:
        raise SystemExit(status)


def read(folder: Path) -> dict[str, str]:
    """Generated file name -> text."""
    paths = (path for pattern in GENERATED for path in (folder / PACKAGE).glob(pattern))
    return {path.name: path.read_text() for path in paths}


def differences(committed: dict[str, str], current: dict[str, str]) -> list[str]:
    """One line for each file that is missing, left over, or not what the protos say."""
    lines = []
    for name in sorted(committed.keys() | current.keys()):
        if name not in committed:
            lines.append(f"{name}: missing")
        elif name not in current:
            lines.append(f"{name}: belongs to no proto file")
        elif committed[name] != current[name]:
            diff = list(
                difflib.unified_diff(
                    committed[name].splitlines(), current[name].splitlines(), lineterm="", n=0
                )
            )[2:]
            added = sum(line.startswith("+") for line in diff)
            removed = sum(line.startswith("-") for line in diff)
            lines.append(f"{name}: +{added} -{removed} lines")
    return lines


def remove_leftovers(committed: dict[str, str], current: dict[str, str]) -> None:
    """Delete the stubs of proto files that are gone."""
    for name in committed.keys() - current.keys():
        (CLIENT / PACKAGE / name).unlink()


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    arguments = parser.parse_args()
    committed = read(CLIENT)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        current = read(Path(folder))
    changes = differences(committed, current)
    if not changes:
        print(f"{len(current)} files are current")
        return 0
    print(*changes, sep="\n", file=sys.stderr if arguments.check else sys.stdout)
    if arguments.check:
        print("run: python scripts/generate_stubs.py", file=sys.stderr)
        return 1
    for name, text in current.items():
        (CLIENT / PACKAGE / name).write_text(text)
    remove_leftovers(committed, current)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
