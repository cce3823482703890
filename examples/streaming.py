"""Text as it is made, until it is enough. python streaming.py [host:port]"""

import sys

from headwise import Client


def main(address: str) -> None:
    with (
        Client(address) as client,
        client.stream("Once upon a time", max_tokens=200, seed=7) as stream,
    ):
        for delta in stream:
            print(delta.text, end="", flush=True)
            if len(stream.text()) >= 80:
                break  # leaving the block stops the work on the server
    print()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["127.0.0.1:50051"])
