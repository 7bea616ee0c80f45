"""Snapshots written as the original's training loop writes them, without its code and without torch."""

import io
import pickle

from interop.storages import torch_bytes


class Name:
    """Pickled as the name of a function or class, which need not exist."""

    def __init__(self, full):
        self.full = full

    def __call__(self):
        raise AssertionError("only its name is of use")


class Call:
    """Pickled as a call of what is called ``name``."""

    def __init__(self, name, *args):
        self.reduced = Name(name), args

    def __reduce__(self):
        return self.reduced


class _Pickler(pickle._Pickler):
    def save_name(self, name):
        module, _, attribute = name.full.rpartition(".")
        if self.proto >= 4:
            self.save(module)
            self.save(attribute)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
        self.memoize(name)

    dispatch = pickle._Pickler.dispatch | {Name: save_name}


def dump(content, file, protocol=4):
    """Like ``pickle.dump``, with names and calls."""
    _Pickler(file, protocol).dump(content)


def dumps(content, protocol=4):
    """The same as bytes."""
    file = io.BytesIO()
    dump(content, file, protocol)
    return file.getvalue()


def persistent(class_name="EDMPrecond", state=None, source="", version=6):
    meta = {"type": "class", "version": version, "module_src": source, "class_name": class_name, "state": state or {}}
    return Call("torch_utils.persistence._reconstruct_persistent_obj", meta)


def storage(array):
    return Call("torch.storage._load_from_bytes", torch_bytes(array))


def tensor(array, offset=0, size=None, stride=None):
    size = array.shape if size is None else size
    stride = tuple(s // 4 for s in array.strides) if stride is None else stride
    return Call("torch._utils._rebuild_tensor_v2", storage(array), offset, size, stride, False, {})


def module(parameters):
    return persistent(state={"_parameters": parameters, "_buffers": {}, "_modules": {}})


def tree(state_dict, settings=None):
    """The persistent modules of a state dict, as the original nests them; ``settings`` by prefix add to a module's state."""
    settings = settings or {}

    def node(prefix, entries):
        parameters, children = {}, {}
        for name, array in entries.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = array
            else:
                parameters[head] = tensor(array)
        name, state = settings.get(prefix, ("Module", {}))
        modules = {child: node(f"{prefix}{child}.", inside) for child, inside in children.items()}
        return persistent(name, state | {"_parameters": parameters, "_buffers": {}, "_modules": modules})

    return node("", state_dict)


def write_snapshot(path, state_dict, preconditioning, network):
    """A snapshot file.

    Args:
      path: of the file.
      state_dict: arrays under the names of the original's SongUNet.
      preconditioning: (class name, attributes).
      network: keyword arguments of SongUNet.
    """
    settings = {"": preconditioning, "model.": ("SongUNet", {"_init_args": (), "_init_kwargs": network})}
    ema = tree({f"model.{name}": array for name, array in state_dict.items()}, settings)
    with open(path, "wb") as file:
        dump({"ema": ema, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}}, file)
