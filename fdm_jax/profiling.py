"""What a trace of ``jax.profiler`` says: the time of every operation, and how long a device had none to do.

A trace names operations as the compiled program does (``fusion.3``); the program's text says which part of which
module each of them came from.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fdm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Event:
    """One run of an operation.

    Attributes:
      device: that it ran on; all of a host's CPU devices are one.
      line: of execution: a stream or a thread.
      op: its name in the compiled program.
      start, duration: in nanoseconds.
      run: which run of which program it belongs to; None where the trace does not say.
      left_until: in nanoseconds; until when it was, perhaps, in the hands of other threads than the one that began it, as
        convolutions on CPUs are for nearly all of their time; 0 if it was not.
    """

    device: str
    line: str
    op: str
    start: float
    duration: float
    run: str | None = None
    left_until: float = 0.0

    @property
    def end(self) -> float:
        return self.start + self.duration


def read_events(trace: Path) -> list[Event]:
    """The operations in a trace (``*.xplane.pb``) of CPUs, GPUs or TPUs.

    Raises:
      UserError: it holds none.
    """
    import jax

    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    # A host's calls that launch an operation are marked with its name as well; where there are devices, theirs count.
    events = _events(plane for plane in planes if plane.name.startswith("/device:")) or _events(planes)
    if not events:
        raise UserError(f"The trace {trace} has no operations of a compiled program in it.")
    return events


def _events(planes: Iterable[Any]) -> list[Event]:
    events = []
    for plane in planes:
        lines = list(plane.lines)
        # TPUs have a line whose events are the operations; on GPUs and CPUs those that are say so.
        whole = [line for line in lines if line.name == "XLA Ops" and plane.name.startswith("/device:")]
        numbered: list[tuple[int, Event]] = []
        ends: dict[int, float] = {}
        for place, line in enumerate(whole or lines):
            for event in line.events:
                stats, start = dict(event.stats), float(event.start_ns)
                op = stats.get("hlo_op", _leading_name(event.name) if whole else None)
                if op is not None:
                    run = f"{stats.get('hlo_module')}#{stats['run_id']}" if "run_id" in stats else None
                    own = Event(plane.name, f"{line.name}#{place}", str(op), start, float(event.duration_ns), run)
                    numbered.append((stats.get("_p", 0), own))
                elif event.name.startswith("end: "):
                    ends[stats.get("_c", 0)] = start
        for number, event in numbered:
            left_until = ends.get(number, 0.0)
            # Of a loop or a call the operations in it have events of their own.
            if left_until > event.end and not re.match(r"(while|call|conditional)\b", event.op):
                event = dataclasses.replace(event, left_until=left_until)
            events.append(event)
    return events


def _leading_name(text: str) -> str:
    """ "%fusion.3 = f32[8]..." -> "fusion.3" """
    return text.split(" ", 1)[0].lstrip("%")


def own_times(events: Iterable[Event]) -> dict[str, tuple[float, int]]:
    """Nanoseconds and number of runs of each operation, without what it spent inside of another or waiting for one.

    Of an operation that ends within another, which is a loop's body, the time is its own and not the loop's.  One that
    only begins within another on the same line is launched early, as NVIDIA's GPUs do (programmatic dependent launch),
    and waits for it: its own time begins where the other ends.  (A convolution's 1.8 ms on an H200 would otherwise be
    those of a sum of 0.3 MB after it.)

    One that was left to other threads also has the time in which no operation was in the hands of the thread that had
    begun it; those that were left at once share it.  (Not all of the time until its end is said: a thread may go on with
    the next operations before it says so.)
    """
    times: dict[str, float] = collections.defaultdict(float)
    runs: collections.Counter[str] = collections.Counter()
    lines = collections.defaultdict(list)
    for event in events:
        lines[event.device, event.line].append(event)
    for line in lines.values():
        around: list[Event] = []
        for event in sorted(line, key=lambda e: (e.start, -e.duration)):
            while around and around[-1].end <= event.start:
                around.pop()
            inside = bool(around) and event.end <= around[-1].end + 1  # a nanosecond, for rounding
            if inside:
                times[around[-1].op] -= event.duration
            times[event.op] += event.end - around[-1].end if around and not inside else event.duration
            runs[event.op] += 1
            around.append(event)
    for op, time in _times_of_others(events):
        times[op] += time
    return {op: (max(time, 0.0), runs[op]) for op, time in times.items()}


def _times_of_others(events: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """Operation and nanoseconds, of those left to other threads."""
    devices = collections.defaultdict(list)
    for event in events:
        devices[event.device].append(event)
    for own in devices.values():
        marks: list[tuple[float, int, Event]] = []  # when, how many more are in the hands of their own threads, which
        for event in own:
            marks += [(event.start, 1, event), (event.end, -1, event)]
            if event.left_until:
                marks.append((event.left_until, 0, event))
        marks.sort(key=lambda mark: mark[0])
        begun, left, before = 0, set[Event](), 0.0
        for now, more, event in marks:
            if not begun and left:
                yield from ((other.op, (now - before) / len(left)) for other in left)
            begun, before = begun + more, now
            if more < 0 and event.left_until:
                left.add(event)
            elif not more:
                left.discard(event)


def runs_by_order(events: Iterable[Event], program: str) -> list[Event]:
    """The events of a trace that does not tell runs apart (of GPUs), with numbered runs, by the order of operations.

    A run begins where the operations jump from the end of the program's schedule to its beginning.  Events that say
    their run stay as they are, and so do all of a program with loops, whose operations jump back within a run.
    """
    events = list(events)
    if any(event.run is not None for event in events) or re.search(r"\swhile\(", program):
        return events
    seen = {event.op for event in events}
    schedule = [m[1] for line in program.partition("\nENTRY ")[2].splitlines() if (m := _INSTRUCTION.match(line))]
    order = {op: place for place, op in enumerate(op for op in schedule if op in seen)}
    runs: collections.Counter[str] = collections.Counter()
    last: dict[str, int] = {}
    numbered = []
    for event in sorted(events, key=lambda e: e.start):
        place = order.get(event.op, last.get(event.device, 0))
        if last.get(event.device, 0) - place > len(order) / 2:  # streams beside each other jump back by less
            runs[event.device] += 1
        last[event.device] = place
        numbered.append(dataclasses.replace(event, run=str(runs[event.device])))
    return numbered


def idle(events: Iterable[Event]) -> dict[str, dict[str, Any]]:
    """Per device, from its first operation to its last: nanoseconds ("window"), the share of them in which no
    operation ran ("idle"), that share's part between runs of programs, where the host is what is waited for ("between",
    None where the trace does not tell runs apart), and the longest time of both kinds ("longest_gap", nanoseconds)."""
    devices = collections.defaultdict(list)
    for event in events:
        devices[event.device].append(event)
    found: dict[str, dict[str, Any]] = {}
    for device, own in devices.items():
        own.sort(key=lambda e: e.start)
        begin, end, run = own[0].start, own[0].start, own[0].run
        pauses: list[float] = []
        between = 0.0
        for event in own:
            if event.start > end:
                pauses.append(event.start - end)
                between += pauses[-1] if event.run != run else 0.0
            end, run = max(end, event.end, event.left_until), event.run
        window = max(end - begin, 1.0)
        found[device] = {
            "window": window,
            "idle": sum(pauses) / window,
            "between": None if any(event.run is None for event in own) else between / window,
            "longest_gap": max(pauses, default=0.0),
        }
    return found


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What a compiled program says of an operation.

    Attributes:
      category: what kind of work, see :data:`CATEGORIES`.
      op_name: path of the JAX function that it came from, with the modules of the network; "" if it does not say.
    """

    category: str
    op_name: str


# Of an operation's opcodes the first that is here names its category; of none, it is elementwise.
CATEGORIES = {
    "convolution": "convolution",
    "dot": "matrix product",
    "all-reduce": "communication",
    "all-reduce-start": "communication",
    "all-reduce-done": "communication",
    "all-gather": "communication",
    "reduce-scatter": "communication",
    "custom-call": "library call",
    "rng-bit-generator": "random numbers",
    "while": "loop",
    "reduce": "reduction",
    "reduce-window": "reduction",
    "scatter": "gather and scatter",
    "gather": "gather and scatter",
}
MOVES, MOVING = "copy and transposition", ("transpose", "copy", "copy-start", "copy-done", "concatenate")
LIBRARIES = {"conv": "convolution", "gemm": "matrix product", "matmul": "matrix product", "fmha": "attention"}

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")


def instructions(program: str) -> dict[str, Instruction]:
    """Operations of a compiled program, given as text (``compiled.as_text()``), by name."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}  # computation -> name, opcode and text of its instructions
    body: list[tuple[str, str, str]] = []
    for line in program.splitlines():
        if match := _INSTRUCTION.match(line):
            body.append((match[1], match[2], line))
        elif match := _COMPUTATION.match(line):
            body = bodies.setdefault(match[1], [])

    def inside(text: str) -> list[tuple[str, str, str]]:
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", text)
        return bodies.get(called[1], []) if called else []

    found = {}
    for body in bodies.values():
        for name, opcode, text in body:
            parts = [(opcode, text)]
            if opcode in ("fusion", "call"):
                parts = [(code, line) for _, _, outer in inside(text) for _, code, line in inside(outer)]
                parts += [(code, line) for _, code, line in inside(text)]  # its result comes last
            named = re.search(r'op_name="([^"]*)"', text)
            if named is None:  # a fusion: what its last named operation is
                names = [match[1] for _, line in parts if (match := re.search(r'op_name="([^"]*)"', line))]
            found[name] = Instruction(_category(parts), named[1] if named else names[-1] if names else "")
    return found


def _category(parts: Sequence[tuple[str, str]]) -> str:
    """Of an operation made of these (opcode, text), the last of which gives its result."""
    opcodes = {code for code, _ in parts}
    for opcode, category in CATEGORIES.items():
        if opcode in opcodes:
            if opcode == "custom-call":
                targets = " ".join(re.findall(r'custom_call_target="([^"]*)"', " ".join(text for _, text in parts)))
                return next((kind for part, kind in LIBRARIES.items() if part in targets.lower()), category)
            return category
    # Arithmetic may well move values on the way; what moves them last is a copy that computes on the way.
    return MOVES if parts and parts[-1][0] in MOVING else "elementwise"


OUTSIDE = "outside the network"
BETWEEN = "between modules"
UNNAMED = "unnamed"  # copies that the compiler puts in


def module_of(op_name: str, parameters: Mapping[str, Any], network: str = "SongUNet") -> tuple[str, str]:
    """The network's module that an operation belongs to, and its pass.

    Args:
      op_name: such as "jit(train_step)/transpose(jvp(SongUNet))/dec_8x8_up/conv0/conv_general_dilated".
      parameters: of the network, nested as its modules are.
      network: what the module around all of them is called.

    Returns:
      "dec_8x8_up/conv0", or :data:`BETWEEN` (what the network does itself, as putting skips beside features), or
      :data:`OUTSIDE` (loss, draws, optimiser), or :data:`UNNAMED` if there is no path; and
      "forward", "backward" or "recomputed", or of an operation of no module what it is instead of one.
    """
    if not op_name:
        return UNNAMED, UNNAMED
    path: list[str] = []
    tree: Any = parameters
    within = False
    for part in op_name.split("/"):
        while match := re.fullmatch(r"[\w.\-]+\((.*)\)", part):  # jvp(SongUNet) -> SongUNet
            part = match[1]
        within |= part == network
        if isinstance(tree, Mapping) and part in tree and isinstance(tree[part], Mapping):
            path.append(part)
            tree = tree[part]
    if not path and not within:
        return OUTSIDE, OUTSIDE
    recomputed = "rematted_computation" in op_name
    which = "recomputed" if recomputed else "backward" if "transpose(" in op_name else "forward"
    return "/".join(path) or BETWEEN, which


def summarise(
    events: Sequence[Event], program: str, parameters: Mapping[str, Any], steps: int, top: int = 30
) -> dict[str, Any]:
    """The costliest operations, categories and modules: plain data, for JSON.

    Args:
      events: of ``steps`` runs of the program.
      program: the compiled program as text.
      parameters: of the network, see :func:`module_of`.
      top: operations to list.

    Returns:
      "operations" (the ``top`` costliest), "categories", "modules" and "passes", each a list of rows with
      "milliseconds" (per step, over all devices together) and "share" of the time of all operations, costliest
      first; "idle" (see :func:`idle`, in milliseconds) and the total "milliseconds".
    """
    known = instructions(program)
    times = own_times(events)
    total = sum(time for time, _ in times.values()) or 1.0
    sums: dict[str, dict[str, float]] = {
        key: collections.defaultdict(float) for key in ("categories", "modules", "passes")
    }
    rows = []
    for op, (time, runs) in times.items():
        instruction = known.get(op, Instruction("not in the program", ""))
        module, which = module_of(instruction.op_name, parameters)
        sums["passes"][which] += time
        sums["categories"][instruction.category] += time
        sums["modules"][module] += time
        row = {"operation": op, "category": instruction.category, "module": module, "pass": which, "runs": runs / steps}
        rows.append((time, row))

    def timed(time: float) -> dict[str, float]:
        return {"milliseconds": time / steps / 1e6, "share": time / total}

    rows.sort(key=lambda row: -row[0])
    summary: dict[str, Any] = {"milliseconds": total / steps / 1e6, "steps": steps}
    summary["operations"] = [row | timed(time) for time, row in rows[:top]]
    for key, by_name in sums.items():
        ordered = sorted(by_name.items(), key=lambda item: -item[1])
        summary[key] = [{"name": name} | timed(time) for name, time in ordered]
    summary["idle"] = {
        device: found | {"window": found["window"] / 1e6, "longest_gap": found["longest_gap"] / 1e6}
        for device, found in idle(runs_by_order(events, program)).items()
    }
    return summary
