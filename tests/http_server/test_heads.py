"""Request heads that two programs could read in two ways are refused; those that clients really send are not."""

from __future__ import annotations

import pytest

from phasewatch.http_server.heads import MAX_HEAD_BYTES, MAX_HEADER_LINES, find_head_fault

HOST = b"Host: store\r\n"
PUT = b"PUT /x HTTP/1.1\r\n" + HOST

SOUND = {
    "a browser's": b"GET / HTTP/1.1\r\n" + HOST + b"Cookie: a=b; c=\xc3\xa9\r\nAccept: */*\r\nX-Empty:\r\n\r\n",
    "with a length": PUT + b"Content-Length: 1600\r\n\r\n",
    "with an empty body": PUT + b"content-length:0\r\n\r\n",
    "chunked": PUT + b"Transfer-Encoding: chunked\r\n\r\n",
    "of HTTP/1.0": b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    "with a tab": PUT + b"X:\ta\tb\r\n\r\n",
    "not complete": b"GET / HTTP/1.1\r\nHost: st",
    "nothing yet": b"",
    "with a body that looks odd": PUT + b"Content-Length: 4\r\n\r\n\n\x00\r \n",
}

ODD = {
    "a length and chunks": PUT + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunks and a length": PUT + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
    "two lengths": PUT + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "one length twice": PUT + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n",
    "a list of lengths": PUT + b"Content-Length: 5, 5\r\n\r\n",
    "a length with a sign": PUT + b"Content-Length: +5\r\n\r\n",
    "a negative length": PUT + b"Content-Length: -5\r\n\r\n",
    "a hexadecimal length": PUT + b"Content-Length: 0x5\r\n\r\n",
    "a length that could be octal": PUT + b"Content-Length: 010\r\n\r\n",
    "a length with an underscore": PUT + b"Content-Length: 1_0\r\n\r\n",
    "a length without digits": PUT + b"Content-Length:\r\n\r\n",
    "a length beyond all bounds": PUT + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "a length in other digits": PUT + "Content-Length: ٥\r\n\r\n".encode(),
    "two encodings": PUT + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a list of encodings": PUT + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "an unknown encoding": PUT + b"Transfer-Encoding: xchunked\r\n\r\n",
    "an encoding in quotes": PUT + b'Transfer-Encoding: "chunked"\r\n\r\n',
    "an encoding with a vertical tab": PUT + b"Transfer-Encoding: \x0bchunked\r\n\r\n",
    "chunks in HTTP/1.0": b"PUT /x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a space before the colon": PUT + b"Content-Length : 5\r\n\r\n",
    "a tab before the colon": PUT + b"Transfer-Encoding\t: chunked\r\n\r\n",
    "an underscore for a dash": PUT + b"Content_Length: 5\r\n\r\n",
    "a folded header": PUT + b"X: a\r\n b\r\n\r\n",
    "a header folded by a tab": PUT + b"Transfer-Encoding:\r\n\tchunked\r\n\r\n",
    "a folded first header": b"GET / HTTP/1.1\r\n Host: store\r\n\r\n",
    "a line that ends in LF": b"GET / HTTP/1.1\r\nHost: store\n\r\n",
    "all lines ending in LF": b"GET / HTTP/1.1\nHost: store\n\n",
    "a head that ends in LF": b"GET / HTTP/1.1\r\nHost: store\r\n\n",
    "a CR within a line": PUT + b"X: a\rContent-Length: 5\r\n\r\n",
    "two CR": PUT + b"X: a\r\r\n\r\n",
    "a NUL": PUT + b"X: a\x00b\r\n\r\n",
    "an escape": PUT + b"X: a\x1b[2Jb\r\n\r\n",
    "a header without a colon": PUT + b"nonsense\r\n\r\n",
    "a header without a name": PUT + b": x\r\n\r\n",
    "a method that is none": b"GE(T / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a space in the path": b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\n" + HOST + b"\r\n",
    "bytes beyond ASCII in the path": "GET /é HTTP/1.1\r\n".encode() + HOST + b"\r\n",
    "too many headers": PUT + b"A:b\r\n" * (MAX_HEADER_LINES + 1) + b"\r\n",
    "too many headers without an end": PUT + b"A:b\r\n" * (MAX_HEADER_LINES + 3),
    "a head that is too long": PUT + b"X: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
    "a long head without an end": PUT + b"X: " + b"a" * MAX_HEAD_BYTES,
}


@pytest.mark.parametrize("head", SOUND.values(), ids=SOUND)
def test_heads_that_clients_send_are_sound(head: bytes) -> None:
    assert find_head_fault(head) is None


@pytest.mark.parametrize("head", ODD.values(), ids=ODD)
def test_heads_that_could_be_read_in_two_ways_are_refused(head: bytes) -> None:
    assert find_head_fault(head)
