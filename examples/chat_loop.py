"""A conversation; an empty line or Ctrl-D ends it. python chat_loop.py [host:port]"""

import sys

from headwise import ChatMessage, Client


def main(address: str) -> None:
    messages = [ChatMessage(role="system", content="Answer in one sentence.")]
    with Client(address) as client:
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline().strip()
            if not line:
                break
            messages.append(ChatMessage(role="user", content=line))
            with client.stream_chat(messages, max_tokens=128) as stream:
                for delta in stream:
                    print(delta.text, end="", flush=True)
                print()
                messages.append(stream.result().message)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["127.0.0.1:50051"])
