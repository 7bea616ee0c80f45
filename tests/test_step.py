"""The train step: the original's 20 steps, schedules, sanitising, accumulation, devices, pmap."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import enable_x64, needs_devices, nhwc
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fdm_jax.devices import AXIS, make_mesh
from fdm_jax.errors import UserError
from fdm_jax.families import EDM, VE
from fdm_jax.interop.state_dict import from_torch
from fdm_jax.momentum import Momentum
from fdm_jax.networks import SongUNet
from fdm_jax.training import parallel as parallel_module
from fdm_jax.training.axis import WHOLE, Axis
from fdm_jax.training.parallel import parallelise
from fdm_jax.training.schedules import ema_beta, images_after, learning_rate
from fdm_jax.training.step import (
    ROUNDS_WITHOUT_LOOP,
    Draws,
    TrainSpec,
    TrainState,
    draw_for_examples,
    init_state,
    make_train_step,
    sanitise,
)

FAMILY = EDM(momentum=Momentum(multiplier=2.0))


def test_golden_schedules(golden):
    data = golden("train20")
    nimg = data["sched/nimg"]
    np.testing.assert_allclose(learning_rate(nimg, 1.0, 1e7), data["sched/lr_factor_ramp10Mimg"], rtol=1e-6)
    np.testing.assert_allclose(learning_rate(nimg, 1.0, 0), data["sched/lr_factor_ramp0"], rtol=1e-6)
    for batch in (256, 512):
        for ratio, name in ((0.05, "ramp0.05"), (None, "noramp")):
            beta = ema_beta(jnp.asarray(nimg), batch, 500_000, ratio)
            np.testing.assert_allclose(beta, data[f"sched/ema_beta_b{batch}_half500_{name}"], rtol=2e-6, atol=1e-30)


def test_golden_sanitising(golden):
    data = golden("train20")
    clean, counts = sanitise({"a": jnp.asarray(data["nan_to_num/in"]), "b": jnp.ones(3)})
    np.testing.assert_array_equal(clean["a"], data["nan_to_num/out"])
    assert counts == {"a": np.sum(~np.isfinite(data["nan_to_num/in"])), "b": 0}


def test_golden_twenty_steps(golden):
    """The original's training loop: losses, rate, clamp, gradient norm, and the average at the end."""
    data = golden("train20")
    network = SongUNet(8, 1, 10, 0, "ddpmpp", 16, (1, 2), num_blocks=1, attn_resolutions=(16,), dropout=0.0)
    spec = TrainSpec(
        batch_size=8, learning_rate=1e-2, lr_rampup_images=100, ema_halflife_images=500, warmup_steps=12, num_classes=10
    )
    params = jax.tree.map(
        jnp.asarray, from_torch({key[5:]: data[key] for key in data if key.startswith("init/")})["params"]
    )
    fresh = jax.eval_shape(lambda: init_state(network, spec, (8, 8, 1)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh.params)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        constants={},
        ema=params,
        opt_state=spec.optimizer().init(params),
        bad_steps=jnp.zeros((), jnp.int32),
    )
    keys = jax.random.split(jax.random.key(0), 8)
    train_step = jax.jit(
        make_train_step(
            network, FAMILY, spec, draw_fn=lambda step, batch: Draws(batch["rnd_normal"], batch["noise"], keys, keys)
        )
    )
    losses = []
    for step in range(20):
        batch = {
            "image": np.rint(127.5 * (nhwc(data["images"][step]) + 1)).astype(
                np.uint8
            ),  # as the original's loader has them
            "label": data["labels"][step].argmax(-1),
            "rnd_normal": data["rnd_normal"][step].ravel(),
            "noise": nhwc(data["noise"][step]),
        }
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        assert float(metrics["learning_rate"]) == pytest.approx(data["lr"][step], rel=1e-5)
        assert float(metrics["clamp"]) == pytest.approx(data["clamp_cur"][step], rel=1e-5) or step >= 12
        # Adam divides by the root of the second moment, so a rounding grows over the steps.
        assert float(metrics["grad_norm"]) == pytest.approx(data["grad_norm"][step], rel=1e-4)
    np.testing.assert_allclose(losses, data["loss_sum"] / 8, rtol=1e-5)
    for part, ours in (("final_ema", state.ema), ("final_net", state.params)):
        expected = from_torch({key.removeprefix(part + "/"): data[key] for key in data if key.startswith(part + "/")})
        for path, value in jax.tree_util.tree_leaves_with_path(expected["params"]):
            leaf = ours
            for key in path:
                leaf = leaf[key.key]
            value, leaf = np.array(value), np.array(leaf)
            if path[-2].key == "qkv" and path[-1].key == "bias":  # the key part has gradient zero: its Adam is noise
                third = len(value) // 3
                value[third : 2 * third] = leaf[third : 2 * third] = 0
            np.testing.assert_allclose(leaf, value, atol=1e-4, err_msg=f"{part} {jax.tree_util.keystr(path)}")


# A network as small as it gets, for everything that is about the step and not about the network.
NETWORK = SongUNet(8, 1, 3, 9, "ddpmpp", 4, (1,), num_blocks=1, attn_resolutions=(), dropout=0.2, channel_mult_emb=1)
SPEC = TrainSpec(
    batch_size=16,
    learning_rate=1e-2,
    lr_rampup_images=0,
    ema_halflife_images=64,
    warmup_steps=3,
    num_classes=3,
    augment_probability=0.3,
    seed=5,
)


def batch_at(step):
    rng = np.random.default_rng(step)
    return {
        "image": rng.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8),
        "label": rng.integers(0, 3, 16, dtype=np.int32),
        "index": np.arange(16, dtype=np.int32),
    }


def run(mode="jit", devices=1, steps=3, **fields):
    spec = dataclasses.replace(SPEC, **fields)
    mesh = make_mesh(jax.devices()[:devices])
    parallel = parallelise(mode, lambda axis: make_train_step(NETWORK, FAMILY, spec, axis=axis), mesh)
    state = parallel.put_state(jax.jit(lambda: init_state(NETWORK, spec, (8, 8, 1)))())
    losses = []
    for step in range(steps):
        state, metrics = parallel.step(state, parallel.put_batch(batch_at(step)))
        losses.append(float(parallel.get_metrics(metrics)["loss"]))
    return np.asarray(losses), parallel.get_state(state)


@pytest.fixture(scope="module")
def reference_run():
    return run()


def assert_same_run(run, reference, rtol=2e-5):
    np.testing.assert_allclose(run[0], reference[0], rtol=rtol)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), run[1].params, reference[1].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), run[1].ema, reference[1].ema)


@pytest.mark.device
@needs_devices(8)
def test_jit_over_eight_devices_equals_one(reference_run):
    assert_same_run(run(devices=8), reference_run)


@pytest.mark.device
@needs_devices(8)
def test_pmap_over_eight_devices_equals_jit(reference_run):
    assert_same_run(run("pmap", devices=8), reference_run)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_steps_in_a_row(reference_run, mode):
    """Two as one program."""
    mesh = make_mesh(jax.devices()[:2])
    parallel = parallelise(mode, lambda axis: make_train_step(NETWORK, FAMILY, SPEC, axis=axis), mesh)
    state = parallel.put_state(jax.jit(lambda: init_state(NETWORK, SPEC, (8, 8, 1)))())
    state, metrics = parallel.steps(state, parallel.put_batches([batch_at(0), batch_at(1)]))
    np.testing.assert_allclose(parallel.get_metrics(metrics)["loss"], reference_run[0][:2], rtol=2e-5)
    assert int(parallel.get_state(state).step) == 2


def orders(state):
    """In which kernels lie in memory."""
    return {leaf.format.layout.major_to_minor for leaf in jax.tree.leaves(state) if leaf.ndim == 4}


@pytest.mark.device
@needs_devices(2)
def test_kernels_in_another_order_in_memory(reference_run, monkeypatch):
    """As on GPUs: within the run alone, and with the same curve, step by step and in a row."""
    order = parallel_module.KERNEL_LAYOUTS["gpu"]
    monkeypatch.setitem(parallel_module.KERNEL_LAYOUTS, jax.default_backend(), order)
    parallel = parallelise(
        "jit", lambda axis: make_train_step(NETWORK, FAMILY, SPEC, axis=axis), make_mesh(jax.devices()[:2])
    )
    first = parallel.put_state(jax.jit(lambda: init_state(NETWORK, SPEC, (8, 8, 1)))())
    assert orders(first) == {(3, 0, 1, 2)}
    second, metrics = parallel.step(first, parallel.put_batch(batch_at(0)))
    third, others = parallel.steps(second, parallel.put_batches([batch_at(1), batch_at(2)]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first, second)))  # donated
    assert orders(third) == {(3, 0, 1, 2)} and orders(parallel.get_state(third)) == {(0, 1, 2, 3)}
    losses = np.append(parallel.get_metrics(metrics)["loss"], parallel.get_metrics(others)["loss"])
    assert_same_run((losses, parallel.get_state(third)), reference_run)


def make_trivial_step(axis):
    """Without a network, for what is about how a step is compiled."""
    return lambda state, batch: (jax.tree.map(lambda a: a + 1, state), {"loss": batch["image"].sum()})


@pytest.mark.parametrize("mode", ["jit", "kernels in another order", "fsdp"])
def test_a_single_step_is_compiled_without_graphs(monkeypatch, mode):
    """On GPUs; here an option that XLA refuses shows where it arrives: in the step, not in steps in a row."""
    monkeypatch.setattr(parallel_module, "without_graphs", lambda platform: {"xla_gpu_enable_command_buffer": platform})
    if mode == "kernels in another order":
        monkeypatch.setitem(
            parallel_module.KERNEL_LAYOUTS, jax.default_backend(), parallel_module.KERNEL_LAYOUTS["gpu"]
        )
    parallel = parallelise("fsdp" if mode == "fsdp" else "jit", make_trivial_step, make_mesh(jax.devices()[:1]))
    params, zero = {"kernel": jnp.zeros((3, 3, 4, 4))}, jnp.zeros((), jnp.int32)
    state = parallel.put_state(TrainState(zero, params, constants={}, ema={}, opt_state=(), bad_steps=zero))
    rows = {"image": np.zeros((2, 4), np.float32)}
    parallel.steps.lower(state, parallel.put_batches([rows, rows])).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_enable_command_buffer, 'cpu' is not a valid"):
        parallel.step.lower(state, parallel.put_batch(rows)).compile()


@pytest.mark.device
@needs_devices(4)
def test_a_dealt_state_equals_a_whole_one(reference_run, monkeypatch):
    """fsdp: each device holds a quarter of every array that divides, before and after the step."""
    monkeypatch.setattr(parallel_module, "LEAST_DEALT", 16)
    losses, state = run("fsdp", devices=4, accumulation=2)
    assert_same_run((losses, state), reference_run)
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state))
    assert held < 0.35 * sum(leaf.size for leaf in jax.tree.leaves(state))
    moment = state.opt_state[0].mu["enc_8x8_block0"]["conv0"]["kernel"]
    assert {shard.data.shape for shard in moment.addressable_shards} == {(3, 3, 1, 4)}


@needs_devices(4)
def test_which_arrays_are_dealt_and_along_which_axis():
    """Large ones, along the longest axis that divides by the devices."""
    shapes = {
        (3, 3, 64, 128): P(None, None, None, AXIS),
        (1024, 4): P(AXIS),
        (130, 64): P(None, AXIS),
        (4094, 2): P(),
        (81, 81, 3): P(),
        (1023, 4): P(),
    }
    arrays = {shape: jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes}
    found = parallel_module.dealt(arrays, make_mesh(jax.devices()[:4]))
    assert {shape: sharding.spec for shape, sharding in found.items()} == shapes


@needs_devices(2)
@pytest.mark.parametrize("mode", ["jit", "fsdp", "pmap"])
def test_a_step_takes_the_memory_of_the_state_that_it_is_given(mode):
    parallel = parallelise(mode, make_trivial_step, make_mesh(jax.devices()[:2]))
    params, zero = {"kernel": jnp.zeros((3, 3, 64, 64))}, jnp.zeros((), jnp.int32)
    given = TrainState(zero, params, constants={}, ema={}, opt_state=(), bad_steps=zero + 0)
    state = parallel.put_state(given)
    parallel.step(state, parallel.put_batch({"image": np.zeros((2, 4), np.float32)}))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@needs_devices(4)
def test_a_number_of_each_parameter_counts_once():
    """fsdp: those of a dealt parameter's parts, and the one that all devices have of a whole one."""
    axis = Axis("devices", {"dealt": 0, "whole": WHOLE})
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    count = jax.shard_map(
        lambda dealt, whole: axis.total({"dealt": dealt.sum(), "whole": whole.sum()}),
        mesh=mesh,
        in_specs=(P("devices"), P()),
        out_specs=P(),
    )
    assert count(jnp.arange(8), jnp.arange(100, 103)) == 28 + 303


@needs_devices(4)
def test_what_is_gathered_and_scattered(monkeypatch):
    """fsdp: each dealt array once, kernels in the network's bfloat16, and the sums of gradients in float32."""
    monkeypatch.setattr(parallel_module, "LEAST_DEALT", 16)
    network, mesh = NETWORK.clone(dtype=jnp.bfloat16), make_mesh(jax.devices()[:4])
    parallel = parallelise("fsdp", lambda axis: make_train_step(network, FAMILY, SPEC, axis=axis), mesh)
    state = jax.eval_shape(lambda: init_state(network, SPEC, (8, 8, 1)))
    program = parallel.step.lower(state, batch_at(0)).as_text()
    shardings = jax.tree.leaves(parallel.state_sharding(state.params))
    arrays = jax.tree.leaves(state.params)
    parts = [(a.shape, sharding.shard_shape(a.shape)) for a, sharding in zip(arrays, shardings, strict=True)]
    dealt = [(whole, part) for whole, part in parts if whole != part]
    assert 5 < len(dealt) < len(parts)

    def tensors(pairs, kernels="bf16"):
        return sorted(
            tuple("x".join([*map(str, shape), kernels if len(shape) == 4 else "f32"]) for shape in pair)
            for pair in pairs
        )

    moved = r'"stablehlo.{}"(?:(?!stablehlo.{}).)*? : \(tensor<([^>]*)>\) -> tensor<([^>]*)>'
    gathered = re.findall(moved.format("all_gather", "all_gather"), program, re.DOTALL)
    scattered = re.findall(moved.format("reduce_scatter", "reduce_scatter"), program, re.DOTALL)
    assert sorted(gathered) == tensors([(part, whole) for whole, part in dealt])
    assert sorted(scattered) == tensors(dealt, "f32")


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_gradients_are_summed_over_the_devices_once(accumulation):
    """One all-reduce in the whole compiled step, outside the loop over rounds, and no other talk between devices."""
    spec = dataclasses.replace(SPEC, accumulation=accumulation)
    mesh = make_mesh(jax.devices()[:2])
    parallel = parallelise("jit", lambda axis: make_train_step(NETWORK, FAMILY, spec, axis=axis), mesh)
    state = parallel.put_state(jax.jit(lambda: init_state(NETWORK, spec, (8, 8, 1)))())
    program = parallel.step.lower(state, parallel.put_batch(batch_at(0))).compile().as_text()
    talk = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
    assert talk.findall(program) == talk.findall(program[program.index("\nENTRY") :]) == ["all-reduce"]
    donated = re.search(r"input_output_alias=\{(.*)\}, entry", program)
    assert donated[1].count("alias") == len(jax.tree.leaves(state))


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_accumulation_changes_nothing_but_rounding(reference_run, devices):
    assert_same_run(run(devices=devices, accumulation=4), reference_run)


def test_rounds_take_less_memory_and_are_not_slow():
    """A quarter of the images at a time; and on CPUs no convolution but of the one form that XLA's library computes."""

    def compiled(accumulation):
        spec = dataclasses.replace(SPEC, batch_size=256, accumulation=accumulation, augment_probability=0.0)
        state = jax.eval_shape(lambda: init_state(NETWORK, spec, (8, 8, 1)))
        batch = {key: np.resize(value, (256, *value.shape[1:])) for key, value in batch_at(0).items()}
        return jax.jit(make_train_step(NETWORK, FAMILY, spec)).lower(state, batch).compile()

    whole, rounds = compiled(1), compiled(4)
    taken = [program.memory_analysis().temp_size_in_bytes for program in (rounds, whole)]
    assert taken[0] < 0.5 * taken[1]
    forms = set(re.findall(r" convolution\(.*dim_labels=(\w+->\w+)", rounds.as_text()))
    if jax.default_backend() == "cpu" and ROUNDS_WITHOUT_LOOP:
        assert forms == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_size": 32}, "The batch has 16 images, and spec.batch_size is 32"),
        ({"accumulation": 3}, "8 images on a device cannot be cut into 3 rounds"),
        ({"accumulation": 0}, "8 images on a device cannot be cut into 0 rounds"),
    ],
)
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_a_batch_of_another_size_is_refused(mode, fields, said):
    with pytest.raises(UserError, match=said):
        run(mode, devices=2, steps=1, **fields)


def test_integers_are_not_taken_for_images_from_minus_one_to_one():
    step, state = make_train_step(NETWORK, FAMILY, SPEC), jax.eval_shape(lambda: init_state(NETWORK, SPEC, (8, 8, 1)))
    with pytest.raises(UserError, match="uint8, or floats in .* and these are int32"):
        jax.eval_shape(step, state, batch_at(0) | {"image": np.zeros((16, 8, 8, 1), np.int32)})


def test_draws_differ_between_examples_steps_and_seeds():
    index = jnp.arange(4)
    a = draw_for_examples(FAMILY, 0, jnp.asarray(3), index, (8, 8, 1))
    others = [
        draw_for_examples(FAMILY, 0, jnp.asarray(4), index, (8, 8, 1)),
        draw_for_examples(FAMILY, 1, jnp.asarray(3), index, (8, 8, 1)),
        draw_for_examples(FAMILY, 0, jnp.asarray(3), index + 4, (8, 8, 1)),
    ]
    assert len({float(s) for s in a.sigma}) == 4
    assert not any(np.isin(a.noise, other.noise).any() for other in others)
    part = draw_for_examples(FAMILY, 0, jnp.asarray(3), index[2:], (8, 8, 1))
    np.testing.assert_array_equal(part.noise, a.noise[2:])


def test_the_default_generator_changes_neither_draws_nor_parameters():
    def numbers():
        draws = draw_for_examples(FAMILY, 0, jnp.int32(3), jnp.arange(2), (1, 1, 1))
        return draws.noise, jax.random.bits(draws.dropout_keys[1]), init_state(NETWORK, SPEC, (8, 8, 1)).params

    expected = jax.jit(numbers)()
    with jax.default_prng_impl("rbg"):
        jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda: numbers())(), expected)


def test_double_precision_changes_neither_draws_nor_the_type_of_parameters():
    spec, step, index = TrainSpec(batch_size=4, learning_rate=1e-2), jnp.int32(3), jnp.arange(2)

    def draws():
        of_families = [draw_for_examples(family, 0, step, index, (1, 1, 1)) for family in (EDM(), VE())]
        return [np.asarray(a) for d in of_families for a in (d.sigma, d.noise)]

    def types():
        return jax.tree.map(lambda a: a.dtype, jax.eval_shape(lambda: init_state(NETWORK, spec, (8, 8, 1))))

    in_single = draws(), types()
    with enable_x64():
        for one, other in zip(in_single[0], draws(), strict=True):
            np.testing.assert_array_equal(one, other)
        assert types() == in_single[1]


def test_a_run_of_more_images_than_an_int32_counts():
    spec = TrainSpec(batch_size=512, learning_rate=1e-3)
    optimizer, steps = spec.optimizer(), jnp.int32(2**31 // 512)
    state = jax.tree.map(lambda a: steps if a.dtype == jnp.int32 else a, optimizer.init(jnp.ones(())))
    assert float(optimizer.update(jnp.ones(()), state)[0]) < 0
    assert learning_rate(images_after(steps, 512), 1e-3, 1e7) == np.float32(1e-3)
    np.testing.assert_array_equal(images_after(jnp.arange(9), 96), np.arange(9) * 96.0)


def test_the_average_starts_at_the_parameters():
    state = jax.jit(lambda: init_state(NETWORK, SPEC, (8, 8, 1)))()
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    assert all(
        p.unsafe_buffer_pointer() != e.unsafe_buffer_pointer()
        for p, e in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True)
    )


def test_bad_gradients_are_counted_and_do_not_spread():
    step = jax.jit(make_train_step(NETWORK, FAMILY, dataclasses.replace(SPEC, augment_probability=0.0)))
    state = jax.jit(lambda: init_state(NETWORK, SPEC, (8, 8, 1)))()
    batch = batch_at(0) | {"image": np.full((16, 8, 8, 1), np.nan, np.float32)}
    for expected in (1, 2):
        state, metrics = step(state, batch)
        assert int(metrics["bad_gradients"]) > 0 and int(metrics["bad_steps"]) == expected
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    batch["image"] = np.zeros_like(batch["image"])
    state, metrics = step(state, batch)
    assert int(metrics["bad_gradients"]) == 0 and int(state.bad_steps) == 0


def test_optimiser_is_adam_with_the_rate_of_the_images_seen(reference_run):
    state = reference_run[1]
    counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    assert [int(count) for _, count in counts] == [3, 3]  # of the moments, and of the rate
    assert isinstance(state.opt_state[0], optax.ScaleByAdamState)


def test_unknown_mode():
    with pytest.raises(UserError, match="no parallel mode 'pjit'"):
        parallelise("pjit", lambda axis: None, make_mesh())
