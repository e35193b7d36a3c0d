"""The protocol's parser and streams that are cut, broken or of another kind: bytes in their place, or none."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.shared import HEAD_NBYTES
from kvstore.shared.long_values import HEAD_REPLY
from kvstore.shared.resp import MISFIT, PENDING, SKIP_MAX_NBYTES, Broken, Misfit, Refusal, Replies, command


class Stream:
    """A socket that has received these parts; then nothing."""

    def __init__(self, parts):
        self.parts = [part for part in parts if part]

    def recv_into(self, view):
        if not self.parts:
            raise BlockingIOError
        part = self.parts[0][: len(view)]
        view[: len(part)] = part
        self.parts[0] = self.parts[0][len(part) :]
        if not self.parts[0]:
            del self.parts[0]
        return len(part)


def bulk(value):
    return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


def parsed(parts, sizes, *, targets=False):
    """What is parsed of values of these sizes, and what ended it."""
    replies = Replies(Stream(parts).recv_into)
    found = []
    for size in sizes:
        target = bytearray(size)
        made = partial(memoryview, target) if targets else None
        try:
            while (reply := replies.next(b"$", size, size, made)) is PENDING:
                replies.receive()
        except (Broken, BlockingIOError) as error:
            return found, type(error), replies
        if targets and isinstance(reply, int):
            assert reply == size
            reply = bytes(target)
        found.append(bytes(reply) if isinstance(reply, bytearray) else reply)
    return found, None, replies


values = st.one_of(
    st.none(),
    st.binary(max_size=40),
    st.integers(0, 3000).map(lambda n: bytes(i * 7 % 251 for i in range(n))),
    st.sampled_from([b"$5\r\nhello\r\n" * 200, b"\r\n" * 1000, b"x" * 70_000]),
)


def cut(data, stream):
    at = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    return [stream[a:b] for a, b in zip([0, *at], [*at, len(stream)], strict=True)]


@given(st.lists(values, max_size=6), st.booleans(), st.data())
def test_values_come_whole_and_in_order_however_the_stream_is_cut(sent, targets, data):
    parts = cut(data, b"".join(map(bulk, sent)))
    found, end, replies = parsed(parts, [len(value or b"") for value in sent], targets=targets)
    assert (found, end) == (sent, None)
    assert replies.is_empty


@given(st.lists(values, min_size=1, max_size=5), st.booleans(), st.data())
def test_of_a_stream_that_ends_anywhere_only_whole_values_are_taken(sent, targets, data):
    stream = b"".join(map(bulk, sent))
    stream = stream[: data.draw(st.integers(0, len(stream) - 1))]
    found, end, _ = parsed(cut(data, stream), [len(value or b"") for value in sent], targets=targets)
    assert found == sent[: len(found)]
    assert len(found) < len(sent)
    assert end is BlockingIOError


@given(st.lists(values, min_size=1, max_size=5), st.booleans(), st.data())
def test_a_stream_that_was_changed_gives_values_of_the_length_asked_for_or_none(sent, targets, data):
    """What the bytes of a body are the record's checksum proves; here: nothing out of place, nothing but `Broken`."""
    stream = bytearray(b"".join(map(bulk, sent)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(stream) - 1))
        if data.draw(st.booleans()):
            stream[at] = data.draw(st.integers(0, 255))
        else:
            stream[at:at] = data.draw(st.sampled_from([b"\r\n", b"$3\r\nabc\r\n", b"*1\r\n", b"$-2\r\n", b">2\r\n"]))
    sizes = [len(value or b"") for value in sent]
    found, end, _ = parsed(cut(data, bytes(stream)), sizes, targets=targets)
    assert end in (None, Broken, BlockingIOError)
    for value, size in zip(found, sizes, strict=False):
        assert value is None or isinstance(value, Refusal | Misfit) or len(value) == size


@given(st.binary(max_size=300), st.data())
def test_garbage_is_broken_or_unfinished(garbage, data):
    found, end, _ = parsed(cut(data, garbage), [5, 5, 5])
    assert end in (None, Broken, BlockingIOError)
    assert all(value is None or isinstance(value, Refusal | Misfit) or len(value) == 5 for value in found)


@pytest.mark.parametrize(
    "stream",
    [
        b"*1\r\n$1\r\na\r\n", b">1\r\n+x\r\n", b"%1\r\n", b":5\r\n", b"+OK\r\n", b"$\r\n", b"$ 5\r\nhello\r\n",
        b"$+5\r\nhello\r\n", b"$5_0\r\n", b"$-2\r\n", b"\r\n", b"$5\r\nhelloXX", b"$%d\r\n" % (SKIP_MAX_NBYTES + 1),
        b"$99999999999999999999\r\n", b"$" + b"1" * 5000, b"x" * 5000, b"$\xd9\xa5\r\nhello\r\n",
    ],
)  # fmt: skip
def test_what_is_not_the_reply_that_is_due_breaks_the_connection(stream):
    assert parsed([stream], [5])[:2] == ([], Broken)


def test_a_body_of_another_length_is_dropped_and_the_next_one_is_in_its_place():
    for size in (3, 700, 5000, 200_000):
        found, end, replies = parsed([bulk(b"y" * size) + bulk(b"hello")], [5, 5])
        assert (found, end) == ([MISFIT, b"hello"], None)
        assert replies.is_empty


def test_an_error_is_a_reply_and_the_next_one_is_in_its_place():
    found, end, _ = parsed([b"-MOVED 5 h:1\r\n" + bulk(b"hello")], [5, 5])
    assert (found, end) == ([Refusal("MOVED 5 h:1"), b"hello"], None)
    assert found[0].code == "MOVED"


def test_the_end_of_the_stream_is_no_reply():
    replies = Replies(lambda view: 0)
    with pytest.raises(Broken, match="closed"):
        replies.receive()


def test_a_command_has_the_length_of_each_of_its_words():
    assert b"".join(command("SET", b"a\r\nb", 12)) == b"*3\r\n$3\r\nSET\r\n$4\r\na\r\nb\r\n$2\r\n12\r\n"


def heads_of(parts, count, pattern):
    """Replies to lookups, and what ended them. pattern: of the usual ones; None: each is parsed step by step."""
    replies, found = Replies(Stream(parts).recv_into), []
    while len(found) < count:
        found += replies.usual([pattern] * (count - len(found)))
        if len(found) == count:
            break
        try:
            while (reply := replies.next(b"$", 0, HEAD_NBYTES)) is PENDING:
                replies.receive()
                found += replies.usual([pattern] * (count - len(found)))
                if len(found) == count:
                    return found, replies.is_empty
        except (Broken, BlockingIOError) as error:
            return found, type(error)
        found.append(reply)
    return found, replies.is_empty


@given(
    st.data(),
    st.lists(
        st.one_of(
            st.sampled_from(
                [b"$-1\r\n", bulk(b""), bulk(b"\r\n" * 48), b"-MOVED 1 a:1\r\n", b"$96\r\n\r\n", b"$0\r\n$0"]
            ),
            st.binary(min_size=HEAD_NBYTES, max_size=HEAD_NBYTES).map(bulk),
            st.sampled_from([1, 95, 97, 200]).map(bytes).map(bulk),
        ),
        max_size=8,
    ),
)
def test_replies_taken_in_one_step_are_those_that_are_parsed(data, replies):
    parts = cut(data, b"".join(replies))
    assert heads_of(parts, len(replies), HEAD_REPLY) == heads_of(list(parts), len(replies), None)
