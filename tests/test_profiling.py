"""Reading traces: times of operations inside of others, idle devices, and what a program says of its operations."""

import jax
import jax.numpy as jnp
import pytest

from fdm_jax import profiling
from fdm_jax.profiling import BETWEEN, OUTSIDE, UNNAMED, Event, idle, instructions, module_of, own_times


def test_own_times():
    """A loop holds two operations, one of which ran twice; another line runs beside it."""
    events = [
        Event("d", "a", "loop", 0, 100), Event("d", "a", "x", 10, 20), Event("d", "a", "y", 30, 40),
        Event("d", "a", "x", 80, 20), Event("d", "a", "z", 100, 5), Event("d", "b", "z", 0, 50),
    ]  # fmt: skip
    assert own_times(events) == {"loop": (20, 1), "x": (40, 2), "y": (40, 1), "z": (55, 2)}


def test_own_times_of_early_launches():
    """An operation that waits for the one before it, and one that waits for both: each has what nobody else had."""
    events = [Event("d", "a", "x", 0, 100), Event("d", "a", "y", 20, 90), Event("d", "a", "z", 60, 55)]
    assert own_times(events) == {"x": (100, 1), "y": (10, 1), "z": (5, 1)}


def test_idle():
    events = [
        Event("d", "a", "x", 10, 10), Event("d", "b", "y", 15, 15), Event("d", "a", "x", 40, 10),
        Event("d", "a", "x", 55, 55), Event("e", "a", "x", 0, 7),
    ]  # fmt: skip
    assert idle(events) == {
        "d": {"window": 100, "idle": 0.15, "between": None, "longest_gap": 10},
        "e": {"window": 7, "idle": 0, "between": None, "longest_gap": 0},
    }


def test_idle_between_programs():
    """Pauses of 10 within the first run, 5 from run to run, and none where the next begins before the last one ends."""
    events = [
        Event("d", "a", "x", 0, 10, "1"), Event("d", "a", "y", 20, 20, "1"), Event("d", "a", "x", 45, 15, "2"),
        Event("d", "b", "x", 55, 45, "3"),
    ]  # fmt: skip
    assert idle(events) == {"d": {"window": 100, "idle": 0.15, "between": 0.05, "longest_gap": 10}}


def test_runs_by_the_order_of_operations():
    """A trace that begins amid a run and says of none which it is; two streams, on one of which c is early."""
    program = "\nENTRY %main {\n" + "".join(f"  %{op} = f32[] add(%x)\n" for op in "xabcdy") + "}\n"
    ops = ["c", "d", "a", "c", "b", "other", "d", "a"]
    events = [Event("d", "a", op, 10 * i, 10 if op != "d" else 6) for i, op in enumerate(ops)]
    assert [event.run for event in profiling.runs_by_order(events, program)] == list("00111112")
    summary = profiling.summarise(events, program, {}, steps=2)
    assert summary["idle"]["d"]["between"] == pytest.approx(8 / 80)
    assert profiling.runs_by_order(events, program + "%w = f32[] while(%x)") == events
    known = [Event("d", "a", op, i, 1, "7") for i, op in enumerate("dada")]
    assert profiling.runs_by_order(known, program) == known


# As XLA's profiler writes it on NVIDIA GPUs: a line per stream, and the calls that launch marked with the operation too.
GPU_TRACE = """
planes {
  id: 1 name: "/device:GPU:0"
  lines {
    id: 7 name: "Stream #7(Compute,MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 5000 duration_ps: 20000 stats { metadata_id: 1 str_value: "fusion.5" } }
    events { metadata_id: 2 offset_ps: 30000 duration_ps: 10000 stats { metadata_id: 1 str_value: "cudnn.6" } }
    events { metadata_id: 3 offset_ps: 50000 duration_ps: 10000 }
  }
  event_metadata { key: 1 value { id: 1 name: "fusion_5" } }
  event_metadata { key: 2 value { id: 2 name: "sm90_xmma_fprop_implicit_gemm" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyH2D" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
planes {
  id: 2 name: "/host:CUPTI"
  lines {
    id: 9 name: "CUDA API" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 90000 stats { metadata_id: 1 str_value: "fusion.5" } }
  }
  event_metadata { key: 1 value { id: 1 name: "cuLaunchKernel" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
"""


def test_launches_on_the_host_are_not_operations(tmp_path):
    trace = tmp_path / "t.xplane.pb"
    trace.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(GPU_TRACE))
    line = "Stream #7(Compute,MemcpyD2D)#0"
    assert profiling.read_events(trace) == [
        Event("/device:GPU:0", line, "fusion.5", 1005, 20), Event("/device:GPU:0", line, "cudnn.6", 1030, 10),
    ]  # fmt: skip


# As XLA writes it on CPUs: operations on the threads that begin them, and, of what other threads may go on with, an "end: "
# with the same number.  A convolution that goes on until 100 while its thread has begun a sum and a copy; a loop, which
# goes on too, but in operations that have events of their own; an operation whose end was not traced any more.
CPU_TRACE = """
planes {
  id: 1 name: "/host:CPU"
  lines {
    id: 7 name: "tf_XLAEigen/1" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 5000 duration_ps: 20000
      stats { metadata_id: 1 str_value: "conv.1" } stats { metadata_id: 2 int64_value: 11 } }
    events { metadata_id: 2 offset_ps: 30000 duration_ps: 10000
      stats { metadata_id: 1 str_value: "sum.2" } stats { metadata_id: 2 int64_value: 12 } }
    events { metadata_id: 5 offset_ps: 39000 duration_ps: 500 stats { metadata_id: 3 int64_value: 12 } }
    events { metadata_id: 3 offset_ps: 50000 duration_ps: 3000
      stats { metadata_id: 1 str_value: "while.3" } stats { metadata_id: 2 int64_value: 13 } }
    events { metadata_id: 4 offset_ps: 51000 duration_ps: 1000
      stats { metadata_id: 1 str_value: "copy.4" } stats { metadata_id: 2 int64_value: 15 } }
  }
  lines {
    id: 8 name: "tf_XLAEigen/2" timestamp_ns: 1000
    events { metadata_id: 6 offset_ps: 100000 duration_ps: 500 stats { metadata_id: 3 int64_value: 11 } }
    events { metadata_id: 7 offset_ps: 120000 duration_ps: 500 stats { metadata_id: 3 int64_value: 13 } }
  }
  event_metadata { key: 1 value { id: 1 name: "conv.1" } }
  event_metadata { key: 2 value { id: 2 name: "sum.2" } }
  event_metadata { key: 3 value { id: 3 name: "while.3" } }
  event_metadata { key: 4 value { id: 4 name: "copy.4" } }
  event_metadata { key: 5 value { id: 5 name: "end: sum.2" } }
  event_metadata { key: 6 value { id: 6 name: "end: conv.1" } }
  event_metadata { key: 7 value { id: 7 name: "end: while.3" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "_p" } }
  stat_metadata { key: 3 value { id: 3 name: "_c" } }
}
"""


def test_operations_that_other_threads_go_on_with(tmp_path):
    trace = tmp_path / "t.xplane.pb"
    trace.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(CPU_TRACE))
    events = profiling.read_events(trace)
    assert [(event.op, event.start, event.duration, event.left_until) for event in events] == [
        ("conv.1", 1005, 20, 1100), ("sum.2", 1030, 10, 0), ("while.3", 1050, 3, 0), ("copy.4", 1051, 1, 0),
    ]  # fmt: skip
    # To the convolution the pauses of 5, 10 and 47 too.
    assert own_times(events) == {"conv.1": (82, 1), "sum.2": (10, 1), "while.3": (2, 1), "copy.4": (1, 1)}
    assert idle(events)["/host:CPU"] == {"window": 95, "idle": 0, "between": None, "longest_gap": 0}


def test_two_left_to_other_threads_share_the_pauses():
    """Both from 20 to 30, one of them to 50, where the other device's operation is in nobody's way; then all is idle."""
    events = [
        Event("d", "a", "x", 0, 10, None, 30), Event("d", "a", "y", 10, 10, None, 50), Event("e", "a", "z", 0, 60),
        Event("d", "a", "x", 60, 40),
    ]  # fmt: skip
    assert own_times(events) == {"x": (55, 2), "y": (35, 1), "z": (60, 1)}
    assert idle(events)["d"] == {"window": 100, "idle": 0.1, "between": None, "longest_gap": 10}


# What three platforms write, in short: a custom call, a tuple, a fusion that is named by its inside, layouts with tiles.
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0:T(8)} parameter(0)
  %mul.1 = f32[8]{0:T(8)} multiply(%p0, %p0), metadata={op_name="jit(step)/jvp(Net)/down/norm0/mul"}
  ROOT %convolution.2 = f32[8]{0:T(8)} convolution(%mul.1, %p0), metadata={op_name="jit(step)/jvp(Net)/down/conv0/conv"}
}

%fused_computation.2 (p1: f32[8]) -> f32[8] {
  %neg.1 = f32[8]{0} negate(%p1)
  ROOT %transpose.2 = f32[8]{0} transpose(%neg.1), dimensions={0}
}

%fused_computation.3 (p2: f32[8]) -> f32[8] {
  %concatenate.1 = f32[8]{0} concatenate(%p2, %p2), dimensions={0}
  ROOT %add.2 = f32[8]{0} add(%concatenate.1, %p2)
}

region_0.3 {
  a = f32[] parameter(0)
  ROOT add.4 = f32[] add(a, a)
}

ENTRY %main.9 (x: f32[8]) -> (f32[8], f32[]) {
  %x = f32[8]{0} parameter(0)
  %fusion.5 = f32[8]{0:T(8)} fusion(%x), kind=kOutput, calls=%fused_computation.1
  %cudnn.6 = (f32[8]{0}, /*index=1*/u8[0]) custom-call(%x), custom_call_target="__cudnn$conv"
  %moved.10 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_computation.2
  %summed.11 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_computation.3
  %topk.7 = (f32[8]{0}, s32[8]{0}) custom-call(%x), custom_call_target="TopK"
  %reduce.8 = f32[] reduce(%x, %x), dimensions={0,1}, to_apply=region_0.3, metadata={op_name="jit(step)/reduce_sum"}
  ROOT %tuple = (f32[8]{0}, f32[]) tuple(%fusion.5, %reduce.8)
}
"""  # fmt: skip


def test_instructions():
    found = instructions(PROGRAM)
    assert found["fusion.5"].category == found["cudnn.6"].category == "convolution"
    assert found["fusion.5"].op_name == "jit(step)/jvp(Net)/down/conv0/conv"
    assert found["moved.10"].category == "copy and transposition" and found["summed.11"].category == "elementwise"
    assert (found["topk.7"].category, found["topk.7"].op_name) == ("library call", "")
    assert found["reduce.8"].category == "reduction" and found["mul.1"].category == "elementwise"


def test_modules():
    parameters = {"down": {"conv0": {"kernel": 1}, "norm0": {"scale": 1}}, "out": {"kernel": 1}}
    assert module_of("jit(step)/jvp(Net)/down/conv0/conv_general_dilated", parameters) == ("down/conv0", "forward")
    assert module_of("jit(step)/transpose(jvp(Net))/down/mul", parameters) == ("down", "backward")
    assert module_of("jit(step)/transpose(jvp(down))/conv0/dot", parameters) == ("down/conv0", "backward")
    again = "jit(step)/transpose(jvp(Net))/down/rematted_computation/norm0/sub"
    assert module_of(again, parameters) == ("down/norm0", "recomputed")
    assert module_of("jit(step)/conv0/mul", parameters) == (OUTSIDE, OUTSIDE)
    assert module_of("jit(step)/transpose(jvp(Net))/split", parameters, "Net") == (BETWEEN, "backward")
    assert module_of("jit(sample)/while/body/Net/jit(silu)/mul", parameters, "Net") == (BETWEEN, "forward")
    assert module_of("jit(step)/transpose(jvp(Net))/split", parameters) == (OUTSIDE, OUTSIDE)
    assert module_of("", parameters) == (UNNAMED, UNNAMED)


def test_of_a_real_program(tmp_path):
    """Every operation in a trace is in the program's text, and the loop's inside is not counted twice."""

    @jax.jit
    def program(x):
        y = jax.lax.fori_loop(0, 30, lambda _, y: y @ x / 300, x)
        return jnp.sum(y * 2)

    x = jnp.ones((300, 300))
    compiled = program.lower(x).compile()
    jax.block_until_ready(compiled(x))
    with jax.profiler.trace(tmp_path):
        for _ in range(2):  # one after the other: on CPUs they would share the cores, and the times of both be longer
            jax.block_until_ready(compiled(x))
    (trace,) = tmp_path.rglob("*.xplane.pb")
    events = profiling.read_events(trace)
    summary = profiling.summarise(events, compiled.as_text(), {}, steps=2)
    assert "not in the program" not in {row["name"] for row in summary["categories"]}
    # How long one took is not asked: on a busy machine any may wait in the middle.
    assert sum(row["runs"] for row in summary["operations"] if row["category"] == "matrix product") == 30
    assert sum(row["share"] for row in summary["operations"]) == pytest.approx(1)
    (found,) = summary["idle"].values()
    assert 2 * summary["milliseconds"] <= found["window"] * 1.001 and 0 <= found["idle"] < 1
