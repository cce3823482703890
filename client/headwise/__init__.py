"""The client of a headwise server.

    from headwise import Client

    with Client("127.0.0.1:50051") as client:
        print(client.generate("The capital of France is", max_tokens=16).text)

`AsyncClient` is the same for asyncio. docs/sdk.md describes the whole.
"""

from headwise._version import __version__
from headwise.aio import AsyncClient
from headwise.client import Client
from headwise.errors import (
    AuthenticationError,
    DeadlineExceededError,
    HeadwiseError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    Quota,
    RequestCancelledError,
    Resource,
    UnavailableError,
    Violation,
)
from headwise.options import ChatOptions, GenerateOptions, RequestOptions, RetryPolicy, TLSOptions
from headwise.streams import AsyncCompletionStream, CompletionStream
from headwise.types import (
    ChatMessage,
    Choice,
    Completion,
    Delta,
    Finish,
    FinishReason,
    Health,
    HealthState,
    Load,
    ModelInfo,
    Range,
    Rank,
    RankHealth,
    ServerInfo,
    Tokenization,
    TokenLogprob,
    Tool,
    ToolCall,
    TopToken,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncCompletionStream",
    "AuthenticationError",
    "ChatMessage",
    "ChatOptions",
    "Choice",
    "Client",
    "Completion",
    "CompletionStream",
    "DeadlineExceededError",
    "Delta",
    "Finish",
    "FinishReason",
    "GenerateOptions",
    "HeadwiseError",
    "Health",
    "HealthState",
    "InvalidRequestError",
    "Load",
    "ModelInfo",
    "NotFoundError",
    "OverloadedError",
    "Quota",
    "Range",
    "Rank",
    "RankHealth",
    "RequestCancelledError",
    "RequestOptions",
    "Resource",
    "RetryPolicy",
    "ServerInfo",
    "TLSOptions",
    "TokenLogprob",
    "Tokenization",
    "Tool",
    "ToolCall",
    "TopToken",
    "UnavailableError",
    "Usage",
    "Violation",
    "__version__",
]
