"""The peers behind one interface, each in the fastest configuration it documents for a CPU.

An engine has `start(capacity)`, an empty context for so many tokens; `prefill(tokens)`, all tokens in
one call; `decode(token)`; and `truncate(length)`, which forgets what lies behind.  `prefill` and
`decode` return the logits of the last position, f32 of (vocab,), which hold until the next call.
MODULES are imported beforehand, so that loading a model does not include loading Python code.

Runs in the environment that has the peers; nothing here is imported by the parent process.
"""

import ctypes
from pathlib import Path

import numpy as np


class LlamaCpp:
    """The llama.cpp inside llama-cpp-python, called through its C interface: no sampling, no tokenizer."""

    MODULES = ("llama_cpp",)

    def __init__(self, path, threads):
        import llama_cpp

        self.api, self.threads, self.context = llama_cpp, threads, None
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def start(self, capacity):
        if self.context:
            self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch = capacity, capacity
        params.n_threads = params.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {capacity} tokens")

    def prefill(self, tokens):
        ids = (self.api.llama_token * len(tokens))(*tokens)
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocab,))

    def decode(self, token):
        return self.prefill([token])

    def truncate(self, length):
        memory = self.api.llama_get_memory(self.context)
        if not self.api.llama_memory_seq_rm(memory, 0, length, -1):
            raise RuntimeError(f"llama.cpp does not forget the tokens from {length} on")


class Transformers:
    """transformers in bf16; what it compiles by torch.compile it compiles again for new shapes."""

    MODULES = ("torch", "transformers.models.bitnet.modeling_bitnet")

    def __init__(self, path, threads):
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        self.torch, self.new_cache = torch, DynamicCache
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, local_files_only=True).eval()

    def start(self, capacity):
        self.cache = self.new_cache(config=self.model.config)  # grows by itself

    def prefill(self, tokens):
        with self.torch.inference_mode():
            output = self.model(input_ids=self.torch.tensor([tokens]), past_key_values=self.cache,
                                use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float().numpy()

    def decode(self, token):
        return self.prefill([token])

    def truncate(self, length):
        self.cache.crop(length - self.cache.get_seq_length())  # a negative count is removed


class Litespark:
    """litespark-inference without torch, from a latent checkpoint, embedding and head in int4 (its default)."""

    MODULES = ("litespark_inference.torchless",)

    def __init__(self, path, threads):
        from litespark_inference.torchless import loader, runtime

        files = Path(path) / "config.json", Path(path) / "model.safetensors"
        loader._resolve_hf_snapshot = lambda _: files  # it only takes names of Hub repositories
        self.runtime, self.model = runtime, loader.load_bitnet_2b()

    def start(self, capacity):
        self.state = self.runtime.init_state(self.model, t_max=capacity)

    def prefill(self, tokens):
        return self.runtime.forward_prefill(self.model, self.state, tokens)

    def decode(self, token):
        return self.runtime.forward_one(self.model, self.state, token)

    def truncate(self, length):
        self.state.pos = length


ENGINES = {"llama.cpp": LlamaCpp, "transformers": Transformers, "litespark": Litespark}
