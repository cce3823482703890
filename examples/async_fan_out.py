"""Many prompts at a time over one connection. python async_fan_out.py [host:port]"""

import asyncio
import sys

from headwise import AsyncClient, Completion

AT_A_TIME = 8
PROMPTS = [f"The square of {number} is" for number in range(32)]


async def main(address: str) -> None:
    room = asyncio.Semaphore(AT_A_TIME)

    async with AsyncClient(address) as client:

        async def answer(prompt: str) -> Completion:
            async with room:
                return await client.generate(prompt, max_tokens=8, temperature=0)

        answers = await asyncio.gather(*map(answer, PROMPTS))
    for prompt, completion in zip(PROMPTS, answers, strict=True):
        print(f"{prompt} {completion.text!r}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:] or ["127.0.0.1:50051"]))
