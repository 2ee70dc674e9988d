"""Requests that are hostile or merely odd, each with the statuses that `bitnet serve` may answer: the shapes of HTTP, and bodies."""

import json

HOST = b"Host: localhost\r\n"
BODY = b'{"prompt":"a","max_tokens":2}'
LEN = b"Content-Length: %d\r\n" % len(BODY)
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CLOSE = b"Connection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)
NEXT = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"


def get(path, more=b""):
    """A GET as bytes."""
    return b"GET " + path + b" HTTP/1.1\r\n" + HOST + more + CLOSE + b"\r\n"


# Name, what is sent, and the statuses of all answers on the connection: a smuggled request would have one too many.
# An empty list is a connection that ends without a word.
SHAPES = [
    ("HTTP/1.0", b"GET /health HTTP/1.0\r\n" + HOST + b"\r\n", [200]),
    ("HTTP/1.0 without a host", b"GET /health HTTP/1.0\r\n\r\n", [403]),
    ("no host", b"GET /health HTTP/1.1\r\n" + CLOSE + b"\r\n", [403]),
    ("two hosts", get(b"/health", b"Host: evil.example\r\n"), [403]),
    ("another host", b"GET /health HTTP/1.1\r\nHost: evil.example\r\n" + CLOSE + b"\r\n", [403]),
    ("HEAD", b"HEAD /health HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", [200]),
    ("OPTIONS", b"OPTIONS /v1/completions HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", [405]),
    ("OPTIONS *", b"OPTIONS * HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", [404]),
    ("CONNECT", b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", [404]),
    ("DELETE", b"DELETE /v1/models HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", [405]),
    ("absolute form", b"GET http://localhost/health HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n", [200]),
    ("HTTP/2 by foreknowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []),
    ("TLS to a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n", [400]),
    ("bare line feeds", b"GET /health HTTP/1.1\nHost: localhost\nConnection: close\n\n", [200]),
    ("a long path", get(b"/" + b"a" * 70_000), [414]),
    ("a long header", get(b"/health", b"X: " + b"a" * 200_000 + b"\r\n"), [431]),
    ("many headers", get(b"/health", b"".join(b"X%d: a\r\n" % i for i in range(100))), [431]),
    ("a null byte in a header", get(b"/health", b"X: a\0b\r\n"), [400]),
    ("a folded header", get(b"/health", b"X-Request-Id: a\r\n Set-Cookie: b\r\n"), [400]),
    ("an id that is no text", get(b"/health", b"X-Request-Id: a\xc3\xa9\r\n"), [200]),
    ("a space before the colon", POST + b"Content-Length : 29\r\n\r\n" + BODY, [400]),
    ("path traversal", get(b"/../../etc/passwd"), [404]),
    ("encoded path traversal", get(b"/v1/models/%2e%2e%2f%00"), [404]),
    ("a path that is no text", get(b"/v1/models/%ff"), [400]),
    ("a GET whose body does not come", b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\n", [200]),
    ("length and chunks", POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n" + NEXT, [200]),
    ("chunks before a smuggled request", POST + b"Content-Length: 4\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + NEXT, [400]),
    ("two lengths", POST + LEN + b"Content-Length: 2\r\n\r\n" + BODY, [400]),
    ("a length with a sign", POST + b"Content-Length: +29\r\n\r\n" + BODY, [400]),
    ("a negative length", POST + b"Content-Length: -1\r\n\r\n" + BODY, [400]),
    ("a length beyond 64 bits", POST + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY, [400]),
    ("a length too short", POST + CLOSE + b"Content-Length: 9\r\n\r\n" + BODY, [400]),
    ("a length that never comes", POST + b"Content-Length: 90\r\n\r\n" + BODY, [408]),
    ("another coding", POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNK + b"0\r\n\r\n", [400]),
    ("chunked, but not last", POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNK + b"0\r\n\r\n", [400]),
    ("chunks in HTTP/1.0", POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n", [400]),
    ("a chunk of no size", POST + CHUNKED + b"\r\nzz\r\n" + BODY + b"\r\n0\r\n\r\n", [400]),
    ("a chunk beyond 64 bits", POST + CHUNKED + b"\r\nffffffffffffffffff\r\n" + BODY, [400]),
    ("a long chunk extension", POST + CHUNKED + b"\r\n1d;" + b"a" * 70_000 + b"\r\n" + BODY, [400]),
    ("many trailers", POST + CHUNKED + b"\r\n" + CHUNK + b"0\r\n" + b"X: y\r\n" * 2000 + b"\r\n", [400]),
    ("100-continue", POST + CLOSE + b"Expect: 100-continue\r\n" + LEN + b"\r\n" + BODY, [100, 200]),
    ("no type", b"POST /v1/completions HTTP/1.1\r\n" + HOST + CLOSE + LEN + b"\r\n" + BODY, [415]),
    ("fifty at once", NEXT * 49 + get(b"/health"), [200] * 50),
    ("a text among others", NEXT + POST + LEN + b"\r\n" + BODY + get(b"/ready"), [200, 200, 200]),
]

REGEX = "(a|aa)+" * 40 + "(([a-z]{1,999}){1,999}){1,999}$"


def nested(depth):
    """A schema of objects in objects."""
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


def schema(value):
    """A request whose text must be as a schema says."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    return {"prompt": "a", "max_tokens": 4, "response_format": form}


def text(**more):
    """A request for a text."""
    return {"prompt": "a", "max_tokens": 2, **more}


WIDE = {"type": "object", "properties": {f"k{i}": {"enum": [f"{i}-{j}" for j in range(40)]} for i in range(2000)}}
REFERENCES = {"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": {"type": "null"}}, "$ref": "#/$defs/d0"}
ITSELF = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
TOOLS = [{"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object"}}} for i in range(20_000)]

# Name, a body for /v1/completions (bytes or a value), and the statuses that it may have.
BODIES = [
    ("a lone surrogate", b'{"prompt":"\\ud800","max_tokens":2}', {400}),
    ("a pair of surrogates", b'{"prompt":"\\ud83d\\ude00","max_tokens":2}', {200}),
    ("a null character", b'{"prompt":"a\\u0000b","max_tokens":2}', {200}),
    ("a null byte", b'{"prompt":"a\0b"}', {400}),
    ("no UTF-8", b'{"prompt":"\xff\xfe"}', {400}),
    ("overlong UTF-8", b'{"prompt":"\xc0\xaf"}', {400}),
    ("nothing", b"", {400}),
    ("lists in lists", b"[" * 100_000, {400}),
    ("objects in objects", b'{"a":' * 100_000, {400}),
    ("1e999", b'{"prompt":"a","temperature":1e999}', {400}),
    ("a number of a million digits", b'{"prompt":"a","max_tokens":' + b"9" * 1_000_000 + b"}", {400}),
    ("the largest whole number", text(max_tokens=2**64 - 1), {200}),
    ("a negative number", text(max_tokens=-1), {400}),
    ("a broken number", text(max_tokens=1.5), {400}),
    ("a key twice", b'{"prompt":"a","prompt":"b","max_tokens":1}', {200, 400}),
    ("300 000 keys", text(**{f"k{i}": 0 for i in range(300_000)}), {200, 400}),
    ("a million lists", b'{"prompt":"a","max_tokens":1,"x":[' + b",".join([b"[]"] * 1_300_000) + b"]}", {200, 400}),
    ("10 MB", b'{"prompt":"' + b"a" * 10_000_000 + b'"}', {413}),
    ("no new token", text(max_tokens=0), {200}),
    ("a prompt as long as the context", text(prompt=[5] * 512), {200}),
    ("a prompt longer than it", text(prompt=[5] * 513), {400}),
    ("a token that there is not", text(prompt=[4_000_000_000]), {400}),
    ("a million tokens", text(prompt=[1] * 1_000_000), {400}),
    ("a word of 3 MB", text(prompt="a" * 3_000_000), {400}),
    ("3 MB of spaces", text(prompt=" " * 3_000_000), {400}),
    ("10 000 prompts, 128 choices each", text(prompt=["a"] * 10_000, n=128), {400}),
    ("300 000 prompts", text(prompt=["a"] * 300_000), {400}),
    ("128 choices", text(n=128), {200}),
    ("129 choices", text(n=129), {400}),
    ("100 000 stop strings", text(stop=["x"] * 100_000), {400}),
    ("long stop strings", text(stop=["x" * 60_000] * 64, n=64, max_tokens=50), {200, 400}),
    ("an empty stop string", text(stop=""), {400}),
    ("a bias on every token", text(logit_bias={str(i): -100 for i in range(2048)}), {200}),
    ("a bias on no token", text(logit_bias={str(i): 1 for i in range(100_000)}), {400}),
    ("a bias of 1e9", text(logit_bias={"3": 1e9}), {400}),
    ("a model's name of 1 MB", text(model="x" * 1_000_000), {400}),
    ("a regular expression that grows", schema({"type": "string", "pattern": REGEX}), {400, 200}),
    ("a schema of 100 levels", schema(nested(30)), {400, 200}),
    ("a wide schema", schema(WIDE), {400, 200}),
    ("references that double", schema(REFERENCES), {400, 200}),
    ("a reference to itself", schema(ITSELF), {400, 200}),
    ("a string of 1e9 characters", schema({"type": "string", "minLength": 10**9}), {400, 200}),
    ("a list of 1e6 items", schema({"type": "array", "items": {"type": "null"}, "minItems": 10**6}), {400, 200}),
]

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
# The same for other routes: path, name, body, statuses.
ELSEWHERE = [
    ("/v1/chat/completions", "20 000 tools", {**CHAT, "tools": TOOLS}, {400, 200}),
    ("/v1/chat/completions", "no messages", {**CHAT, "messages": []}, {400, 200}),
    ("/v1/chat/completions", "50 000 messages", {**CHAT, "messages": CHAT["messages"] * 50_000}, {400}),
    ("/v1/embeddings", "2048 inputs", {"input": ["a"] * 2048}, {200}),
    ("/v1/responses", "a model's name of 1 MB", {"input": "a", "model": "x" * 1_000_000}, {400}),
    ("/tokenize", "a word of 3 MB", {"prompt": "a" * 3_000_000}, {200, 400}),
    ("/detokenize", "a token that there is not", {"tokens": [4_000_000_000]}, {400}),
    ("/v1/load_lora_adapter", "an adapter without a key", {"lora_name": "x", "lora_path": "../../etc"}, {403}),
]


def is_json_error(body):
    """Whether a body is an error as OpenAI words it."""
    try:
        return isinstance(json.loads(body)["error"]["message"], str)
    except (ValueError, KeyError, TypeError):
        return False
