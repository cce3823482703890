"""An answer that is an instance of a model of yours. python structured_output.py [host:port]"""

import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from headwise import Client


class Review(BaseModel):
    # Small models do not stop by themselves: nothing else may follow, and texts have an end.
    model_config = ConfigDict(extra="forbid")

    product: str = Field(max_length=40)
    sentiment: Literal["good", "bad"]
    stars: int


PROMPT = "Review: 'The kettle boils in a minute, I love it.'\nAs JSON: "


def main(address: str) -> None:
    with Client(address) as client:
        answer = client.generate(PROMPT, json_schema=Review, max_tokens=200, temperature=0)
        try:
            review: Review = answer.parsed
        except ValueError:  # only max_tokens can cut it short
            sys.exit(f"no whole answer in {answer.usage.completion_tokens} tokens: {answer.text}")
        print(f"{review.product}: {review.sentiment}, {review.stars} stars")

        verdict = client.generate(PROMPT + "Is that good?", choices=["yes", "no"])
        print(verdict.text)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["127.0.0.1:50051"])
