"""The driver's control sockets, with strangers at the door."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cluster.links import RankGone, RankLinks
from shards.channel import Channel, ChannelClosed, connect, pack
from shards.contract import Hello, Progress, Stop, decode_to_rank


@pytest.fixture(params=[None, "127.0.0.1"], ids=["unix", "tcp"])
def links(request: pytest.FixtureRequest) -> Iterator[RankLinks]:
    links = RankLinks(2, request.param)
    yield links
    links.close()


def dial(links: RankLinks) -> socket.socket:
    return connect(links.address, 5)


def until(links: RankLinks, count: int) -> list[object]:
    found: list[object] = []
    while len(found) < count:
        messages = links.poll(10)
        found += messages
    return found


def test_a_rank_is_greeted_and_heard(links: RankLinks) -> None:
    channel = Channel(dial(links))
    # In one piece: what follows the greeting must not be lost.
    hello, progress = Hello(1, links.token, "host", 7), Progress(1, 3, 4)
    channel.sock.sendall(pack(hello) + pack(progress))
    assert until(links, 2) == [hello, progress]
    assert links.hello(1) == hello
    links.send(Stop())
    assert isinstance(decode_to_rank(channel.receive()), Stop)
    channel.close()
    assert until(links, 1) == [RankGone(1)]


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 8192,
        pack(Progress(0, 1, 1)),
        pack(Hello(0, "wrong", "host", 1)),
        pack(Hello(0, "\u00e9", "host", 1)),
        b"",
    ],
)
def test_strangers_are_sent_away_and_hold_up_nobody(links: RankLinks, greeting: bytes) -> None:
    silent, stranger = dial(links), dial(links)
    if greeting:
        stranger.sendall(greeting)
    stranger.shutdown(socket.SHUT_WR)
    rank = Channel(dial(links))
    rank.send(Hello(0, links.token, "host", 1))
    assert until(links, 1) == [Hello(0, links.token, "host", 1)]
    stranger.settimeout(5)
    links.poll(0)
    assert stranger.recv(1) == b""
    for sock in (silent, stranger):
        sock.close()
    rank.close()


def test_a_second_rank_of_the_same_number_is_a_stranger(links: RankLinks) -> None:
    first, second = Channel(dial(links)), dial(links)
    first.send(Hello(0, links.token, "first", 1))
    until(links, 1)
    second.sendall(pack(Hello(0, links.token, "second", 2)))
    second.settimeout(5)
    links.poll(10)
    assert second.recv(1) == b""
    hello = links.hello(0)
    assert hello is not None
    assert hello.host == "first"
    first.close()
    second.close()


def test_wake_after_close_is_nothing(links: RankLinks) -> None:
    links.close()
    links.wake()
    links.close()


def test_another_process_takes_the_place_of_a_rank(links: RankLinks) -> None:
    both = [Channel(dial(links)) for _ in range(2)]
    for rank, channel in enumerate(both):
        channel.send(Hello(rank, links.token, "host", rank))
    until(links, 2)
    before = links.token
    links.expect(1)
    with pytest.raises(ChannelClosed):
        both[1].receive()
    late, next_one = dial(links), Channel(dial(links))
    late.sendall(pack(Hello(1, before, "host", 8)))  # of the one that was given up
    next_one.send(Hello(1, links.token, "host", 9))
    assert until(links, 1) == [Hello(1, links.token, "host", 9)]
    links.send(Stop())
    for channel in (both[0], next_one):
        assert isinstance(decode_to_rank(channel.receive()), Stop)
        channel.close()
    late.settimeout(5)
    links.poll(0)
    assert late.recv(1) == b""
    late.close()
    both[1].close()
