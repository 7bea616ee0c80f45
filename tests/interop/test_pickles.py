"""What the machine of pickles refuses to do, an instruction at a time, and that it does the rest."""

import io

import pytest

from fdm_jax.errors import UserError
from fdm_jax.interop.pickles import PlainUnpickler, Record

FUNCTIONS = {"m.dict": dict, "m.bytes": bytes}
START, STOP = b"\x80\x04", b"."
CLASS, DICT, BYTES = b"\x8c\x01m\x8c\x01C\x93", b"\x8c\x01m\x8c\x04dict\x93", b"\x8c\x01m\x8c\x05bytes\x93"
TEXT, ONE = b"\x8c\x01x", b"K\x01"


def load(program, **limits):
    return PlainUnpickler(io.BytesIO(START + program + STOP), FUNCTIONS, ("m.C",), **limits).load()


@pytest.mark.parametrize(
    ("program", "made"),
    [
        (b"}" + TEXT + ONE + b"s", {"x": 1}),
        (b"}(" + TEXT + ONE + ONE + TEXT + b"u", {"x": 1, 1: "x"}),
        (b"]" + ONE + b"a", [1]),
        (b"](" + ONE + TEXT + b"e", [1, "x"]),
        (b"\x8f(" + ONE + TEXT + b"\x90", {1, "x"}),
        (DICT + b")R", {}),
        (DICT + b")\x81", {}),  # an object of a subclass
        (BYTES + ONE + b"\x85R", b"\0"),
    ],
)
def test_data_are_built(program, made):
    assert load(program) == made


def test_objects_become_records():
    made = load(CLASS + b")\x81}" + TEXT + ONE + b"sb")
    assert isinstance(made, Record) and (made.kind, made.code, made.state) == ("m.C", None, {"x": 1})


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (b"\x8c\x05posix\x8c\x06system\x93", "it asks for 'posix.system', which a snapshot does not need, and nothing"),
        (b"cm\nD\n", "it asks for 'm.D'"),
        (TEXT + b"Q", "it refers to something outside of itself"),
        (TEXT + b")R", "it calls something that is no function"),
        (CLASS + b")R", "it calls something that is no function"),
        (DICT + b"]R", "it calls something that is no function"),  # on a list, not a tuple
        (TEXT + b")\x81", "it calls something that is no function"),
        (CLASS + ONE + b"\x85\x81", "it makes an object in an unknown way"),
        (CLASS + b"}b)\x81", "it makes an object in an unknown way"),  # after its class was changed
        (b"]}b", "it changes something that is no object"),
        (DICT + b"}b", "it changes something that is no object"),
        (b"]" + TEXT + ONE + b"s", "it puts items into something that is no dictionary"),
        (CLASS + b"(" + TEXT + ONE + b"u", "it puts items into something that is no dictionary"),
        (b"})" + ONE + b"s", "it has a dictionary whose keys are no texts or numbers"),
        (b"}(" + TEXT + ONE + b")" + ONE + b"u", "it has a dictionary whose keys are no texts or numbers"),
        (b"\x8f(" + ONE + b")\x90", "it has a set of something else"),
        (b"](" + ONE + b"\x90", "it has a set of something else"),
        (b"}" + ONE + b"a", "it appends to something that is no list"),
        (CLASS + b"(" + ONE + b"e", "it appends to something that is no list"),
        (b"I1\n", "it uses a kind of instruction that no snapshot has"),
        (b"(im\ndict\n", "it uses a kind of instruction that no snapshot has"),
        (b"(cm\ndict\no", "it uses a kind of instruction that no snapshot has"),
        (b"\x82\x01", "it uses a kind of instruction that no snapshot has"),  # an extension
        (b"\xff", "it uses a kind of instruction that no snapshot has"),
    ],
)
def test_what_is_not_data_is_refused(program, said):
    with pytest.raises(UserError) as caught:
        load(program)
    assert str(caught.value).startswith(said)


def test_what_functions_give_is_counted():
    """A byte each, and 16 for each item of a dictionary."""
    ten = BYTES + b"K\x0a\x85R"
    assert load(ten, most=10) == bytes(10)
    with pytest.raises(UserError, match="it makes far more of its parts than it holds"):
        load(ten, most=9)
    pair = DICT + b"}" + TEXT + ONE + b"s\x85R"
    assert load(pair, most=16) == {"x": 1}
    with pytest.raises(UserError, match="it makes far more of its parts than it holds"):
        load(pair, most=15)
