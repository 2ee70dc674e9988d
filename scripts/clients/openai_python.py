"""OpenAI's own Python client, unmodified, against `bitnet serve`: what it gets must be what `bitnet generate` and `bitnet chat` say.

    openai_python.py BITNET
"""

import asyncio
import math
import sys
from typing import Literal

import openai
import pydantic
from served import Wrong, check, equal, generated, idle, replied, serving, statistics

TEXT, MESSAGE = "Once upon a time", "Tell me a story about a cat."
KEY = "a-key-of-this-check"
LENGTH = 24  # tokens of most answers
GREEDY = ["--temperature", "0"]


class Pet(pydantic.BaseModel):
    """What a model of any size can fill in."""

    kind: Literal["cat", "dog"]
    is_small: bool


def client_of(base, **options):
    """A client without retries, so that every mistake shows."""
    return openai.OpenAI(base_url=f"{base}/v1", **{"api_key": KEY, "max_retries": 0, "timeout": 60, **options})


def chat_fields(**more):
    """A short greedy conversation."""
    messages = [{"role": "user", "content": MESSAGE}]
    return {"model": "default", "messages": messages, "temperature": 0, "max_completion_tokens": LENGTH, **more}


def text_fields(**more):
    """A short greedy text."""
    return {"model": "default", "prompt": TEXT, "temperature": 0, "max_tokens": LENGTH, **more}


def chats(bitnet, client):
    """Whole and in pieces."""
    expected = replied(bitnet, MESSAGE, LENGTH)
    answer = client.chat.completions.create(**chat_fields())
    equal("chat", answer.choices[0].message.content, expected)
    equal("role", answer.choices[0].message.role, "assistant")
    equal("total", answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
    chunks = list(client.chat.completions.create(**chat_fields(stream=True, stream_options={"include_usage": True})))
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    equal("chat in pieces", "".join(piece.delta.content or "" for piece in pieces), expected)
    equal("first piece", pieces[0].delta.role, "assistant")
    equal("reasons", [piece.finish_reason for piece in pieces if piece.finish_reason], [answer.choices[0].finish_reason])
    equal("usage", [chunk.usage.completion_tokens for chunk in chunks if chunk.usage], [answer.usage.completion_tokens])
    equal("last chunk has", chunks[-1].choices, [])
    # The helper takes a text that was cut by its length for a failure.
    with client.chat.completions.stream(**chat_fields(stop="e", max_completion_tokens=200)) as stream:
        helped = stream.get_final_completion().choices[0].message.content
    equal("chat by the stream helper", helped, replied(bitnet, MESSAGE, 200, "--stop", "e"))
    several = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": MESSAGE}]}]
    system = client.chat.completions.create(**chat_fields(messages=several, logprobs=True, top_logprobs=2))
    equal("chat with a system message", system.choices[0].message.content, replied(bitnet, MESSAGE, LENGTH, "--system", "Be kind."))
    scored = system.choices[0].logprobs.content
    equal("log-probabilities", len(scored), system.usage.completion_tokens)
    for token in scored:
        check(token.logprob <= 0 and len(token.top_logprobs) == 2, f"of a token: {token}")
        equal("bytes of a token", bytes(token.bytes).decode(), token.token)


def texts(bitnet, client):
    """Continuations, with what the completions API knows besides."""
    expected = generated(bitnet, TEXT, LENGTH, *GREEDY)
    whole = client.completions.create(**text_fields(echo=True, logprobs=2))
    choice = whole.choices[0]
    equal("text with echo", choice.text, TEXT + expected["text"])
    equal("tokens", whole.usage.completion_tokens, len(expected["tokens"]))
    logprobs = choice.logprobs
    lengths = {len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.top_logprobs), len(logprobs.text_offset)}
    equal("lengths of the lists of logprobs", lengths, {whole.usage.total_tokens})
    for token, offset in zip(logprobs.tokens[1:], logprobs.text_offset[1:]):  # the first is the begin of text
        equal(f"at {offset}", choice.text[offset : offset + len(token)], token)
    check(logprobs.token_logprobs[0] is None, "the first token has a log-probability though nothing is before it")
    check(all(value <= 0 for value in logprobs.token_logprobs[1:]), "a probability above 1")
    pieces = client.completions.create(**text_fields(stream=True))
    equal("text in pieces", "".join(piece.choices[0].text for piece in pieces), expected["text"])
    scored = client.completions.create(**text_fields(echo=True, logprobs=0, max_tokens=0)).choices[0]
    equal("nothing new", scored.text, TEXT)
    equal("log-probabilities of the prompt", scored.logprobs.token_logprobs, logprobs.token_logprobs[: whole.usage.prompt_tokens])
    ids = [0, 306, 77, 1200]
    by_id = client.completions.create(**text_fields(prompt=ids)).choices[0].text
    equal("text after token ids", by_id, generated(bitnet, ids, LENGTH, *GREEDY)["text"])
    both = client.completions.create(**text_fields(prompt=[TEXT, "The dog"])).choices
    equal("two prompts", [choice.text for choice in both], [expected["text"], generated(bitnet, "The dog", LENGTH, *GREEDY)["text"]])


def sampled(bitnet, client):
    """`n`, `seed` and `stop`."""
    hot = text_fields(temperature=1, seed=7, n=2)
    first, second = (client.completions.create(**hot).choices for _ in range(2))
    equal("the same seed", [choice.text for choice in second], [choice.text for choice in first])
    each = [generated(bitnet, TEXT, LENGTH, "--temperature", "1", "--seed", seed)["text"] for seed in ("7", "8")]
    equal("choices of seeds 7 and 8", [choice.text for choice in first], each)
    check(each[0] != each[1], "two seeds say the same")
    stopped = client.completions.create(**text_fields(stop=[".", "!"], max_tokens=100)).choices[0]
    expected = generated(bitnet, TEXT, 100, *GREEDY, "--stop", ".", "--stop", "!")
    equal("text before a stop string", (stopped.text, stopped.finish_reason), (expected["text"], "stop"))
    equal("ended by", expected["finish"], "stop")
    pieces = client.completions.create(**text_fields(stop=".", max_tokens=100, stream=True))
    cut = "".join(piece.choices[0].text for piece in pieces)
    check(cut and "." not in cut, f"pieces before a stop string: {cut!r}")


def forms(_, client):
    """Answers that a schema describes."""
    parsed = client.chat.completions.parse(**chat_fields(response_format=Pet, max_completion_tokens=80))
    check(isinstance(parsed.choices[0].message.parsed, Pet), f"no pet: {parsed.choices[0].message}")
    with client.chat.completions.stream(**chat_fields(response_format=Pet, max_completion_tokens=80)) as stream:
        equal("the form in pieces", stream.get_final_completion().choices[0].message.parsed, parsed.choices[0].message.parsed)
    response = client.responses.parse(model="default", input=MESSAGE, text_format=Pet, temperature=0, max_output_tokens=80)
    equal("the form of a response", response.output_parsed, parsed.choices[0].message.parsed)


def functions(_, client):
    """Calls of functions, whole and in pieces, and a result that is given back."""
    fields = chat_fields(tools=[openai.pydantic_function_tool(Pet, name="find_pet")], tool_choice="required", max_completion_tokens=200)
    fields["parallel_tool_calls"] = False
    choice = client.chat.completions.parse(**fields).choices[0]
    equal("reason", choice.finish_reason, "tool_calls")
    call = choice.message.tool_calls[0]
    equal("function", (call.type, call.function.name), ("function", "find_pet"))
    check(isinstance(call.function.parsed_arguments, Pet), f"arguments: {call.function}")
    arguments, names, ids, reasons = "", [], [], []
    for chunk in client.chat.completions.create(**fields, stream=True):
        piece = chunk.choices[0]
        reasons += [piece.finish_reason] if piece.finish_reason else []
        for part in piece.delta.tool_calls or []:
            equal("index of the call", part.index, 0)
            arguments += part.function.arguments or ""
            names += [part.function.name] if part.function.name else []
            ids += [part.id] if part.id else []
    equal("the call in pieces", (names, arguments, reasons), (["find_pet"], call.function.arguments, ["tool_calls"]))
    equal("ids of the call", len(ids), 1)
    with client.chat.completions.stream(**fields) as stream:
        final = stream.get_final_completion().choices[0].message.tool_calls[0].function
    equal("the call by the stream helper", final.parsed_arguments, call.function.parsed_arguments)
    named = client.chat.completions.create(**{**fields, "tool_choice": {"type": "function", "function": {"name": "find_pet"}}})
    equal("a call by name", named.choices[0].message.tool_calls[0].function.name, "find_pet")
    result = {"role": "tool", "tool_call_id": call.id, "content": "It sleeps."}
    given = [*fields["messages"], choice.message, result]
    after = client.chat.completions.create(**{**fields, "messages": given, "tool_choice": "none"}).choices[0]
    check(after.message.content and not after.message.tool_calls, f"after the result: {after}")


def vectors(_, client):
    """Embeddings; the client asks for base64 unless told otherwise."""
    both = client.embeddings.create(model="default", input=[TEXT, MESSAGE])
    equal("indices", [item.index for item in both.data], [0, 1])
    for item, text in zip(both.data, (TEXT, MESSAGE)):
        alone = client.embeddings.create(model="default", input=text, encoding_format="float").data[0].embedding
        equal("a vector as base64 and as numbers", item.embedding, alone)
        length = math.sqrt(sum(x * x for x in alone))
        # Each of the d values is off by 2⁻²⁴ of itself at most, and so is the length.
        check(abs(length - 1) <= 2**-23, f"a vector has the length {length}")
    check(both.data[0].embedding != both.data[1].embedding, "two texts have one vector")


def lists(_, client):
    """Models."""
    equal("models", [model.id for model in client.models.list()], ["default"])
    equal("model", client.models.retrieve("default").id, "default")


def responses(bitnet, client):
    """The Responses API, whole and in pieces."""
    expected = replied(bitnet, MESSAGE, LENGTH)
    fields = {"model": "default", "input": MESSAGE, "temperature": 0, "max_output_tokens": LENGTH}
    whole = client.responses.create(**fields)
    equal("response", whole.output_text, expected)
    events = list(client.responses.create(**fields, stream=True))
    equal("response in pieces", "".join(event.delta for event in events if event.type == "response.output_text.delta"), expected)
    equal("numbers of the events", [event.sequence_number for event in events], list(range(len(events))))
    check(events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete"), f"{events[-1]}")
    equal("last event", events[-1].response.output_text, expected)
    equal("usage", events[-1].response.usage.output_tokens, whole.usage.output_tokens)
    # The helper takes the name of the last event from the answer, and knows one for answers that were cut, too.
    with client.responses.stream(**fields) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    equal("response by the stream helper", deltas, expected)
    told = client.responses.create(**{**fields, "instructions": "Be kind.", "input": [{"role": "user", "content": MESSAGE}]})
    equal("response with instructions", told.output_text, replied(bitnet, MESSAGE, LENGTH, "--system", "Be kind."))


def raised(kind, what, ask):
    """The error that the client makes of an answer."""
    try:
        ask()
    except openai.APIError as error:
        check(type(error) is kind, f"{what}: {type(error).__name__} instead of {kind.__name__}: {error}")
        return error
    raise Wrong(f"{what}: no {kind.__name__}")


def mistakes(_, client):
    """Errors are of the classes that the client has for them, and name the field."""
    chat, text = client.chat.completions.create, client.completions.create
    equal("param", raised(openai.BadRequestError, "temperature", lambda: chat(**chat_fields(temperature=-1))).param, "temperature")
    equal("param", raised(openai.BadRequestError, "best_of", lambda: text(**text_fields(best_of=3))).param, "best_of")
    equal("param", raised(openai.BadRequestError, "too long", lambda: text(**text_fields(prompt=[5] * 600))).param, "prompt")
    error = raised(openai.BadRequestError, "previous response", lambda: client.responses.create(input="x", previous_response_id="y"))
    equal("param", error.param, "previous_response_id")
    error = raised(openai.NotFoundError, "unknown model", lambda: client.models.retrieve("none"))
    equal("code and param", (error.code, error.param), ("model_not_found", "model"))
    check(error.request_id, "an error without a request id")
    adapter = {"lora_name": "a", "lora_path": "."}
    raised(openai.PermissionDeniedError, "adapters", lambda: client.post("/load_lora_adapter", body=adapter, cast_to=object))


def endless(n):
    """Texts as long as the context allows, in pieces."""
    unending = {str(id): -100 for id in (1, 2)}
    return text_fields(stream=True, n=n, max_tokens=480, temperature=1, logit_bias=unending, extra_body={"repetition_penalty": 1})


def goings(base, client):
    """A client that goes away, and one whose patience ends."""
    n = 16
    for way in ("close", "timeout"):
        before = statistics(base)["engine"]["new_tokens"]
        if way == "close":
            with client.completions.create(**endless(n)) as stream:
                next(iter(stream))
        else:
            fields = {**endless(n), "stream": False}
            raised(openai.APITimeoutError, "timeout", lambda: client.with_options(timeout=0.2).completions.create(**fields))
        idle(base)
        new = statistics(base)["engine"]["new_tokens"] - before
        check(new < n * 480, f"{way}: all {new} tokens were made for nobody")


async def together(base):
    """Sixteen at once say what each says alone."""
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        prompts = [f"{TEXT} there were {number} cats" for number in range(16)]
        fields = [text_fields(prompt=prompt, temperature=number % 2, seed=number) for number, prompt in enumerate(prompts)]
        alone = [(await client.completions.create(**field)).choices[0].text for field in fields]

        async def streamed(field):
            return "".join([piece.choices[0].text async for piece in await client.completions.create(**field, stream=True)])

        async def whole(field):
            return (await client.completions.create(**field)).choices[0].text

        equal("sixteen at once", await asyncio.gather(*(whole(field) for field in fields)), alone)
        equal("sixteen at once, in pieces", await asyncio.gather(*(streamed(field) for field in fields)), alone)


def keys_and_rates(bitnet):
    """Wrong keys, used up rates, and the client's own patience with both."""
    with serving(bitnet, "--requests-per-minute", "60", keys=f"ann:{KEY}") as base:
        client = client_of(base)
        equal("code", raised(openai.AuthenticationError, "wrong key", client_of(base, api_key="wrong").models.list).code, "invalid_api_key")
        fields = text_fields(max_tokens=1)

        def use_up():
            for _ in range(200):
                client.completions.create(**fields)

        error = raised(openai.RateLimitError, "rate", use_up)
        equal("code", error.code, "rate_limit_exceeded")
        check(int(error.response.headers["retry-after"]) >= 1, f"Retry-After: {error.response.headers}")
        patient = client_of(base, max_retries=5).completions.with_raw_response.create(**fields)
        check(patient.retries_taken >= 1 and patient.parse().choices[0].text, "the client did not ask again, and had to")


def full(bitnet):
    """A server that takes one text and lets none wait."""
    with serving(bitnet, "--max-batch", "1", "--max-queue", "0") as base:
        client = client_of(base)
        with client.completions.create(**endless(1)) as stream:
            next(iter(stream))
            error = raised(openai.RateLimitError, "full", lambda: client.completions.create(**text_fields()))
            equal("code", error.code, "queue_full")
        answer = client_of(base, max_retries=5).completions.create(**text_fields())
        check(answer.choices[0].text, "nothing after the queue was free again")


def main():
    """One server for what needs no flags, others for what does."""
    bitnet = sys.argv[1]
    with serving(bitnet) as base:
        with client_of(base) as client:
            for part in (chats, texts, sampled, forms, functions, vectors, lists, responses, mistakes):
                part(bitnet, client)
            goings(base, client)
        asyncio.run(together(base))
    keys_and_rates(bitnet)
    full(bitnet)
    print(f"   openai {openai.__version__}: as `bitnet generate` and `bitnet chat`, in pieces, in company, and in error")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"   {wrong}")
