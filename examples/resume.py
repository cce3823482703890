"""A stream that outlives its server: stop it meanwhile, and start it again at the same address.

python resume.py [host:port]

The stream stalls, and goes on at the next token as if nothing had been.
"""

import sys

from headwise import Client, RetryPolicy


def main(address: str) -> None:
    # A server that loads a large model again may take minutes.
    patient = RetryPolicy(resume_timeout=600)
    with (
        Client(address, retries=patient) as client,
        client.stream("Count: 1, 2, 3,", max_tokens=300, ignore_eos=True) as stream,
    ):
        for delta in stream:
            print(delta.text, end="", flush=True)
        print()
        usage = stream.result().usage
        print(f"{usage.completion_tokens} tokens, none lost, none twice", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["127.0.0.1:50051"])
