"""LiteLLM, unmodified, against `bitnet serve` as a server of OpenAI's kind.

    litellm_client.py BITNET
"""

import asyncio
import importlib.metadata
import sys

import litellm
from served import Wrong, check, equal, generated, replied, serving

TEXT, MESSAGE, LENGTH = "Once upon a time", "Tell me a story about a cat.", 24


def main():
    """Completion, streaming, texts, embeddings, errors."""
    bitnet = sys.argv[1]
    litellm.telemetry, litellm.suppress_debug_info = False, True
    messages = [{"role": "user", "content": MESSAGE}]
    with serving(bitnet, keys="ann:a-key-of-this-check") as base:
        place = {"model": "openai/default", "api_base": f"{base}/v1", "api_key": "a-key-of-this-check", "num_retries": 0}
        chat = {**place, "messages": messages, "temperature": 0, "max_tokens": LENGTH}
        expected = replied(bitnet, MESSAGE, LENGTH)
        whole = litellm.completion(**chat)
        equal("chat", whole.choices[0].message.content, expected)
        check(whole.usage.total_tokens > whole.usage.completion_tokens > 0, f"usage: {whole.usage}")
        chunks = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
        equal("chat in pieces", "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), expected)
        rebuilt = litellm.stream_chunk_builder(chunks, messages=messages)
        equal("usage in pieces", rebuilt.usage.completion_tokens, whole.usage.completion_tokens)
        equal("chat, awaited", asyncio.run(litellm.acompletion(**chat)).choices[0].message.content, expected)

        text_place = {**place, "model": "text-completion-openai/default"}
        text = litellm.text_completion(**text_place, prompt=TEXT, temperature=0, max_tokens=LENGTH)
        equal("text", text.choices[0].text, generated(bitnet, TEXT, LENGTH, "--temperature", "0")["text"])

        vectors = litellm.embedding(**place, input=[TEXT, MESSAGE]).data
        alone = litellm.embedding(**place, input=[MESSAGE], encoding_format="float").data[0]["embedding"]
        check(len(vectors) == 2 and vectors[0]["embedding"] != vectors[1]["embedding"], "two texts, but not two vectors")
        equal("vector", vectors[1]["embedding"], alone)

        for kind, fields in [
            (litellm.AuthenticationError, {**chat, "api_key": "wrong"}),
            (litellm.BadRequestError, {**chat, "temperature": -1}),
        ]:
            try:
                litellm.completion(**fields)
            except kind:
                continue
            raise Wrong(f"no {kind.__name__}")
    print(f"   litellm {importlib.metadata.version('litellm')}: as `bitnet generate` and `bitnet chat`")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"   {wrong}")
