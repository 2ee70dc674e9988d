"""The command `llm`, unmodified, against `bitnet serve`, which it knows from its file of further models.

    llm_client.py BITNET       in an environment with LLM_USER_PATH, a folder for what it writes
"""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

from served import Wrong, check, equal, generated, replied, serving

TEXT, MESSAGE, LENGTH = "Once upon a time", "Tell me a story about a cat.", 24


def llm(*arguments, text=None):
    """What the command says."""
    run = subprocess.run([sys.executable, "-m", "llm", *arguments], input=text, capture_output=True, text=True)
    check(run.returncode == 0, f"llm {' '.join(arguments)}: {run.stderr}")
    return run.stdout


def main():
    """Prompts, whole and in pieces, a conversation, a schema, texts."""
    bitnet = sys.argv[1]
    folder = pathlib.Path(os.environ["LLM_USER_PATH"])
    folder.mkdir(parents=True, exist_ok=True)
    with serving(bitnet) as base:
        chat = {"model_id": "tiny", "model_name": "default", "api_base": f"{base}/v1", "supports_schema": True}
        models = [chat, {**chat, "model_id": "tiny-text", "completion": True}]
        (folder / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
        options = ["-o", "temperature", "0", "-o", "max_tokens", str(LENGTH)]
        expected = replied(bitnet, MESSAGE, LENGTH)
        equal("whole", llm("-m", "tiny", "--no-stream", *options, MESSAGE), expected + "\n")
        equal("in pieces", llm("-m", "tiny", *options, MESSAGE), expected + "\n")
        check(llm("-c", *options, "And then?").strip(), "no answer in the conversation")
        talk = llm("chat", "-m", "tiny", *options, text=f"{MESSAGE}\nexit\n")
        check(expected in talk, f"`llm chat` says {talk!r} and not {expected!r}")
        kind = {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}}, "required": ["kind"], "additionalProperties": False}
        form = json.loads(llm("-m", "tiny", "--schema", json.dumps(kind), "-o", "temperature", "0", MESSAGE))
        check(form["kind"] in ("cat", "dog"), f"form: {form}")
        text = generated(bitnet, TEXT, LENGTH, "--temperature", "0")["text"]
        equal("text", llm("-m", "tiny-text", *options, TEXT), text + "\n")
    print(f"   llm {importlib.metadata.version('llm')}: as `bitnet generate` and `bitnet chat`")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"   {wrong}")
