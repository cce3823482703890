"""The `openai` package at headwise's HTTP port. python openai_client.py [http://host:port/v1]"""

import os
import sys

from openai import OpenAI


def main(base_url: str) -> None:
    # The server's bearer token; it takes any where it asks for none.
    client = OpenAI(base_url=base_url, api_key=os.environ.get("HEADWISE_TOKEN", "none"))
    model = client.models.list().data[0].id

    completion = client.completions.create(model=model, prompt="Roses are", max_tokens=8)
    print(completion.choices[0].text)

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_tokens=64,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["http://127.0.0.1:8000/v1"])
