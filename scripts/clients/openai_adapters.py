"""Adapters by OpenAI's own Python client, unmodified: each is a model to it, and what it says is what `bitnet generate` says.

    openai_adapters.py BITNET SCRATCH       SCRATCH is a folder to train an adapter in
"""

import json
import pathlib
import subprocess
import sys

import openai
from served import Wrong, check, equal, generated, serving

TEXT, LENGTH = "Once upon a time", 24
KEY = "a-key-of-this-check"


def trained(bitnet, scratch):
    """The folder of an adapter that says something else than the model."""
    scratch.mkdir(parents=True, exist_ok=True)
    data = scratch / "numbers.jsonl"
    pairs = ({"prompt": f"What comes after {n}?", "completion": f"After {n} comes {n + 1}."} for n in range(1, 7))
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    output = scratch / "tuned"
    options = ["--steps", "3", "--max-length", "48", "--rank", "2", "--alpha", "4", "--lr", "2e-2", "--quiet", "-o", output]
    run = subprocess.run([bitnet, "train", "lora", "--data", data, *options], capture_output=True, text=True)
    check(run.returncode == 0, f"bitnet train lora: {run.stderr}")
    return output / "adapter"


def main():
    """One that is there from the start, and one that comes and goes."""
    bitnet, adapter = sys.argv[1], trained(sys.argv[1], pathlib.Path(sys.argv[2]))
    plain = generated(bitnet, TEXT, LENGTH, "--temperature", "0")["text"]
    tuned = generated(bitnet, TEXT, LENGTH, "--temperature", "0", "--adapter", str(adapter))["text"]
    check(plain != tuned, "the adapter says what the model says, so that nothing can be told from it")
    with serving(bitnet, "--adapter", f"tuned={adapter}", keys=f"admin:{KEY}") as base:
        client = openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=60)

        def says(model):
            fields = {"prompt": TEXT, "temperature": 0, "max_tokens": LENGTH}
            return client.completions.create(model=model, **fields).choices[0].text

        def is_missing(model):
            try:
                says(model)
            except openai.NotFoundError as error:
                equal("code and param", (error.code, error.param), ("model_not_found", "model"))
                return
            raise Wrong(f"no NotFoundError for the model `{model}`")

        equal("models", [model.id for model in client.models.list()], ["default", "default:tuned"])
        equal("model", client.models.retrieve("default:tuned").id, "default:tuned")
        for model, expected in [("default", plain), ("default:tuned", tuned), ("tuned", tuned)]:
            equal(f"text of `{model}`", says(model), expected)
        is_missing("default:other")
        other = {"lora_name": "other", "lora_path": str(adapter)}
        client.post("/load_lora_adapter", body=other, cast_to=object)
        equal("text of a loaded adapter", says("default:other"), tuned)
        client.post("/unload_lora_adapter", body={"lora_name": "other"}, cast_to=object)
        is_missing("default:other")
    print(f"   openai {openai.__version__}: adapters as `bitnet generate --adapter`")


if __name__ == "__main__":
    try:
        main()
    except Wrong as wrong:
        sys.exit(f"   {wrong}")
