"""The numbers in what `torch.save` wrote of a storage in its old format, without torch: for tests of all the rest."""

import io
import pickle

import numpy as np

TYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2"}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        assert module == "torch"
        return name

    def persistent_load(self, pid):
        return pid


def plain_storage(data):
    file = io.BytesIO(data)
    magic, protocol, machine, storage, keys = (_Unpickler(file).load() for _ in range(5))
    assert magic == 0x1950A86A20F9469CFC6C and protocol == 1001 and machine["little_endian"] and len(keys) == 1
    _, kind, key, _, count, _ = storage
    assert key == keys[0] and count == int.from_bytes(file.read(8), "little")
    return np.frombuffer(file.read(), TYPES[kind], count)


def torch_bytes(array):
    """What `torch.save` writes of a float32 storage."""
    count = array.size
    header = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}]
    out = b"".join(pickle.dumps(part, protocol=2) for part in header)
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("1") + _text("cpu") + _number(count) + b"NtQ."
    return out + b"\x80\x02" + storage + pickle.dumps(["1"], protocol=2) + count.to_bytes(8, "little") + array.tobytes()


def _text(text):
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _number(number):
    data = number.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data
