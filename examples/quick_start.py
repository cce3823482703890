"""One prompt, one answer. python quick_start.py [host:port]"""

import sys

from headwise import Client, HeadwiseError


def main(address: str) -> None:
    with Client(address, timeout=60) as client:
        client.wait_until_ready()
        answer = client.generate("The capital of France is", max_tokens=16, temperature=0)
        print(answer.text)
        print(
            f"{answer.finish_reason}: {answer.usage.prompt_tokens} tokens in, "
            f"{answer.usage.completion_tokens} out, {answer.usage.total_seconds:.2f} s",
            file=sys.stderr,
        )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:] or ["127.0.0.1:50051"])
    except HeadwiseError as error:
        sys.exit(f"{type(error).__name__}: {error}")
