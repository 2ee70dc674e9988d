"""LangChain's models of OpenAI's kind, unmodified, against `bitnet serve`.

    langchain_client.py BITNET
"""

import importlib.metadata
import sys
from typing import Literal

import pydantic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from served import Wrong, check, equal, generated, replied, serving

TEXT, MESSAGE, LENGTH = "Once upon a time", "Tell me a story about a cat.", 24


class Pet(pydantic.BaseModel):
    """A pet."""

    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    is_small: bool


def main():
    """Chat, forms, functions, texts, embeddings."""
    bitnet = sys.argv[1]
    with serving(bitnet) as base:
        place = {"model": "default", "base_url": f"{base}/v1", "api_key": "none", "max_retries": 0}
        chat = ChatOpenAI(**place, temperature=0, max_completion_tokens=LENGTH)
        expected = replied(bitnet, MESSAGE, LENGTH, "--system", "Be kind.")
        messages = [SystemMessage("Be kind."), HumanMessage(MESSAGE)]
        whole = chat.invoke(messages)
        equal("chat", whole.content, expected)
        pieces = list(chat.stream(messages, stream_usage=True))
        equal("chat in pieces", "".join(piece.content for piece in pieces), expected)
        counts = [piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata]
        equal("usage in pieces", sum(counts), whole.usage_metadata["output_tokens"])
        told = ChatOpenAI(**place, temperature=0, max_completion_tokens=LENGTH, use_responses_api=True).invoke(messages)
        equal("chat by the Responses API", told.text, expected)

        long = ChatOpenAI(**place, temperature=0, max_completion_tokens=200)
        for method in ("json_schema", "function_calling"):
            pet = long.with_structured_output(Pet, method=method).invoke(MESSAGE)
            check(isinstance(pet, Pet), f"by {method}: {pet!r}")
        bound = long.bind_tools([Pet], tool_choice="required", parallel_tool_calls=False)
        called = bound.invoke(MESSAGE)
        equal("function", [call["name"] for call in called.tool_calls], ["Pet"])
        Pet(**called.tool_calls[0]["args"])
        streamed = None
        for piece in bound.stream(MESSAGE):
            streamed = piece if streamed is None else streamed + piece
        equal("the call in pieces", [call["args"] for call in streamed.tool_calls], [called.tool_calls[0]["args"]])
        result = ToolMessage("It sleeps.", tool_call_id=called.tool_calls[0]["id"])
        check(chat.invoke([HumanMessage(MESSAGE), called, result]).content, "no answer after the result")

        text = OpenAI(**place, temperature=0, max_tokens=LENGTH, frequency_penalty=0, presence_penalty=0)
        equal("text", text.invoke(TEXT), generated(bitnet, TEXT, LENGTH, "--temperature", "0")["text"])

        # With the length check it would send ids of tiktoken's vocabulary, which are other texts to this model.
        embeddings = OpenAIEmbeddings(**place, check_embedding_ctx_length=False)
        both = embeddings.embed_documents([TEXT, MESSAGE])
        equal("a vector alone and in company", both[1], embeddings.embed_query(MESSAGE))
        check(both[0] != both[1], "two texts have one vector")
        # It sends a thousand at once.
        many = embeddings.embed_documents([f"{TEXT} {number}" for number in range(600)])
        equal("one of many vectors", many[-1], embeddings.embed_query(f"{TEXT} 599"))
    print(f"   langchain-openai {importlib.metadata.version('langchain-openai')}: as `bitnet generate` and `bitnet chat`")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"   {wrong}")
