"""A reader of pickles that builds plain data and runs nothing.

A pickle is a program for a small machine whose one danger is to call what it names.  Here it can name what is on a
list only, and what is on the list are functions of ours: dictionaries, tuples, texts, numbers, bytes and their like come
out, never an object of another library.  The stock `pickle.Unpickler` could be restricted to the same list, but hashes
keys and builds objects in C, where a pickle nested deeply enough overflows the stack; hence the one in Python.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from fdm_jax.errors import UserError

# Opcodes that data written by Python 3 consists of; no others are run.
_OPCODES = (
    "PROTO FRAME STOP MARK POP MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS "
    "GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
).split()
_KEYS = (str, int, float, bytes, type(None))  # what may be hashed: none of these holds another object


class Record:
    """What stands for a class on the list, or an object of it.

    Attributes:
      kind: the name of the class.
      code: what it was made from.
      state: what the pickle gives it afterwards.
    """

    def __init__(self, kind: str, code: Any = None):
        self.kind, self.code = kind, code
        self.state: Any = None


class PlainUnpickler(pickle._Unpickler):
    """Reads one pickle.

    Args:
      file: where it starts; ``read(n)`` must not set memory aside for what is not there (mmap and BytesIO do not).
      functions: "module name" -> what is called in its place.
      classes: "module name" of classes whose objects become a :class:`Record`.
      most: bytes that the functions may give in all.  An instruction of a few bytes can have a large text, say, converted
        once more; without a limit a small file could fill the memory.

    ``load`` raises :class:`UserError` for a name that is not on the lists, and nearly any exception for a pickle that is
    damaged.
    """

    stack: list[Any]  # of the machine; made by the base class
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, file: BinaryIO, functions: Mapping[str, Callable[..., Any]], classes: tuple[str, ...] = (),
        most: float = math.inf,
    ):  # fmt: skip
        super().__init__(file)
        self._functions, self._classes, self._left = functions, classes, most

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._functions:
            return self._functions[full]
        if full in self._classes:
            return Record(full)
        raise UserError(f"it asks for {full!r:.100}, which a snapshot does not need, and nothing of it was run")

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("it refers to something outside of itself")

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if not any(function is known for known in self._functions.values()) or type(arguments) is not tuple:
            raise UserError("it calls something that is no function")
        made = self.stack[-1] = function(*arguments)
        self._left -= len(made) if isinstance(made, bytes) else getattr(made, "nbytes", 0)
        self._left -= 16 * len(made) if isinstance(made, (dict, set)) else 0  # an item is two references
        if self._left < 0:
            raise UserError("it makes far more of its parts than it holds")

    def _newobj(self) -> None:
        if not isinstance(self.stack[-2], Record):  # a dictionary's subclass, which has a function here
            return self._reduce()
        arguments, cls = self.stack.pop(), self.stack[-1]
        if cls.state is not None or arguments != ():
            raise UserError("it makes an object in an unknown way")
        self.stack[-1] = Record(cls.kind)

    def _build(self) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if not isinstance(record, Record):
            raise UserError("it changes something that is no object")
        record.state = state

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(self.stack[-1], [key, value])

    def _setitems(self) -> None:
        items = self.pop_mark()
        self._put(self.stack[-1], items)

    @staticmethod
    def _put(target: Any, items: list[Any]) -> None:
        if type(target) is not dict:
            raise UserError("it puts items into something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _KEYS):
                raise UserError("it has a dictionary whose keys are no texts or numbers")
            target[key] = value

    def _additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set or not all(isinstance(item, _KEYS) for item in items):
            raise UserError("it has a set of something else than texts or numbers")
        self.stack[-1].update(items)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UserError("it appends to something that is no list")
        self.stack[-1].extend(items)

    def _unknown(self) -> None:
        raise UserError("it uses a kind of instruction that no snapshot has")

    dispatch: dict[int, Callable[..., None]] = dict.fromkeys(range(256), _unknown)  # type: ignore[assignment, misc]
    for _name in _OPCODES:
        dispatch[getattr(pickle, _name)[0]] = pickle._Unpickler.dispatch[getattr(pickle, _name)[0]]
    for _name, _function in (
        ("REDUCE", _reduce), ("NEWOBJ", _newobj), ("BUILD", _build), ("SETITEM", _setitem), ("SETITEMS", _setitems),
        ("ADDITEMS", _additems), ("APPEND", _append), ("APPENDS", _appends),
    ):  # fmt: skip
        dispatch[getattr(pickle, _name)[0]] = _function
