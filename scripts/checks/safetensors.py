"""Files of safetensors, without the library."""

import json
import struct

import numpy as np


def read_safetensors(path):
    """Tensors by name; bf16 comes as f32, which loses nothing."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, entry in json.loads(data[8:8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U8": "u1"}[entry["dtype"]]
        tensor = np.frombuffer(data[begin:end], dtype).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = tensor
    return tensors


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, tensor in tensors.items():
        dtype = {"uint8": "U8", "float32": "F32", "float16": "F16"}[str(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())
