"""The original's snapshots: D and samples of the golden ones; what each describes; and what is refused, unrun."""

import io
import pickle
import pickletools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, nhwc
from interop.storages import plain_storage, torch_bytes
from interop.written import Call, dumps, module, persistent, tensor

from fdm_jax.defaults import from_dict
from fdm_jax.errors import UserError
from fdm_jax.families import EDM, VE, VP
from fdm_jax.interop.models import config_of, load_snapshot
from fdm_jax.interop.pickles import PlainUnpickler
from fdm_jax.interop.snapshots import Persistent, Snapshot, read_snapshot, tensors, torch_storage
from fdm_jax.interop.state_dict import from_torch, to_torch
from fdm_jax.momentum import Momentum
from fdm_jax.networks.song_unet import PRESETS
from fdm_jax.sampling import edm_sigmas, sampling_range
from fdm_jax.sampling.grids import log_snr_sigmas
from fdm_jax.sampling.linear import integrate
from fdm_jax.sampling.solvers import make_calls

NAMES = ("fdm_edm", "ve", "edm")
FAMILIES = {"fdm_edm": EDM(momentum=Momentum(multiplier=2.0)), "ve": VE(), "edm": EDM()}


@pytest.fixture(scope="module")
def snapshots():
    """The three models, read without torch."""
    return {name: load_snapshot(GOLDEN / f"snapshot-{name}.pkl", plain_storage) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_golden_denoiser(snapshots, golden, name):
    model, data = snapshots[name], golden(f"snapshot_{name}")
    assert model.family == FAMILIES[name]
    wide = model.network.label_dim or None
    labels = data["D/class_labels"] if wide else None
    for i, sigma in enumerate(data["D/sigma"]):
        cases = [(labels, None, "out")]
        if "D/out_aug" in data and model.network.augment_dim:
            cases.append((labels, data["D/augment_labels"], "out_aug"))
        if wide and "D/out_nolabel" in data:
            cases.append((None, None, "out_nolabel"))
        for class_labels, augment_labels, key in cases:
            expected = nhwc(data[f"D/{key}"][i])
            D_x = model.denoise(nhwc(data["D/x"][i]), sigma, class_labels, augment_labels)
            np.testing.assert_allclose(D_x, expected, atol=1e-4 * np.abs(expected).max(), err_msg=f"{key} {sigma}")
    D_x = model.denoise(nhwc(data["D/x_unit"]), data["D/sigma_vec"], labels)
    np.testing.assert_allclose(D_x, nhwc(data["D/out_sigma_vec"]), atol=1e-4 * np.abs(D_x).max())


@pytest.mark.parametrize("sampler", ["edm18", "dpm25"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_samples(snapshots, golden, name, sampler):
    """EDM's sampler in the model's own range, DPM-Solver++ beyond it, as the original runs them."""
    model, data = snapshots[name], golden(f"snapshot_{name}")
    labels = data["D/class_labels"] if model.network.label_dim else None
    latents = jnp.asarray(nhwc(data["S/latents"]), jnp.float32)
    denoise = lambda x, sigma: model.denoise(x, sigma, labels)  # noqa: E731
    if sampler == "edm18":
        sigmas = edm_sigmas(18, *sampling_range(model.family))
        calls = make_calls("heun", 18, sigmas)
    else:
        sigmas, calls = log_snr_sigmas(2), make_calls("dpmpp", 25, log_snr_sigmas)
    called = np.array([call.sigma for call in calls])
    np.testing.assert_allclose(called, data[f"S/{sampler}/sigmas_called"], rtol=1e-6)
    out = jax.jit(lambda x: integrate(denoise, x, sigmas[0], calls))(latents)
    sensitivity = float(data[f"S/{sampler}/maxdiff_when_latents_perturbed_1e-6"])
    np.testing.assert_allclose(out, nhwc(data[f"S/{sampler}/out"]), atol=max(20 * sensitivity, 1e-4))


@pytest.mark.parametrize(
    "name, parameters, labels, augmentation, multiplier, warmup",
    [("fdm_edm", 180_513, 10, 0.12, 2.0, 200), ("ve", 181_665, 0, 0.12, None, 0), ("edm", 180_193, 0, 0.0, None, 0)],
)
def test_configuration_is_what_the_file_says(snapshots, name, parameters, labels, augmentation, multiplier, warmup):
    """As the golden files describe their snapshots: 8x8x1, 16 channels, mult 1,2, one block, dropout .13."""
    config = from_dict(snapshots[name].config)
    network, data = config.network, config.data
    assert (network.model_channels, network.channel_mult, network.num_blocks, network.dropout) == (16, (1, 2), 1, 0.13)
    assert (data.resolution, data.channels, data.num_classes or 0, data.class_conditional) == (8, 1, labels, labels > 0)
    assert (config.augment.probability, config.augment.labels) == (augmentation, augmentation > 0)
    assert config.momentum.enabled == (multiplier is not None) and config.warmup_steps == warmup
    assert not multiplier or config.momentum.multiplier == multiplier
    assert sum(leaf.size for leaf in jax.tree.leaves(snapshots[name].variables["params"])) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_there_and_back_has_the_same_names_and_bits(snapshots, name):
    original = tensors(read_snapshot(GOLDEN / f"snapshot-{name}.pkl", plain_storage).ema)
    original = {key.removeprefix("model."): value for key, value in original.items()}
    model = snapshots[name]
    written = to_torch(model.variables, PRESETS[model.network.preset]["resample_filter"])
    assert written.keys() == original.keys()
    for key, value in original.items():
        assert written[key].dtype == value.dtype == np.float32
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    back = from_torch(written)
    jax.tree.map(np.testing.assert_array_equal, back, dict(model.variables))


@pytest.mark.parametrize("name", NAMES)
def test_torch_reads_the_same_numbers(name):
    pytest.importorskip("torch")
    path = GOLDEN / f"snapshot-{name}.pkl"
    ours, theirs = (tensors(read_snapshot(path, load).ema) for load in (plain_storage, torch_storage))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


def test_torch_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch must be installed: pip install torch .*fdm_jax\[torch\]"):
        read_snapshot(GOLDEN / "snapshot-edm.pkl")


# --- Descriptions of models ---


def described(name="EDMPrecond", network=None, loss=None, **state):
    model = Persistent(
        "SongUNet", {"_init_kwargs": {"img_resolution": 8, "in_channels": 3, "out_channels": 3} | (network or {})}
    )
    ema = Persistent(name, state | {"_modules": {"model": model}})
    return Snapshot(ema, loss, None)


def family_of(config):
    from fdm_jax.experiment import Experiment

    return Experiment.from_config(from_dict(config)).family


@pytest.mark.parametrize(
    "snapshot, family",
    [
        (described("VPPrecond", beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5), VP()),
        (described("VPPrecond", beta_d=10, epsilon_t=1e-3), VP(beta_d=10.0, epsilon_t=1e-3)),
        (described("VPPrecond", beta_min=0.2, M=500.0), VP(beta_min=0.2, num_scales=500)),
        (described("FDM_VPPrecond", fdm_multiplier=2.0), VP(momentum=Momentum(multiplier=2.0))),
        (described("VEPrecond", sigma_min=0.02, sigma_max=100), VE()),
        (described("VEPrecond", sigma_max=50), VE(highest=50.0)),
        (
            described("FDM_VEPrecond", sigma_min=0.01, fdm_multiplier=2.0),
            VE(lowest=0.01, momentum=Momentum(multiplier=1.0)),
        ),
        (described("EDMPrecond", sigma_data=0.6, sigma_min=0, sigma_max=float("inf")), EDM(sigma_data=0.6)),
        (
            described("FDM_EDMPrecond", sigma_min=0.002, sigma_max=80.0, fdm_multiplier=1, fdm_beta_d=19.9),
            EDM(momentum=Momentum(multiplier=1.0)),
        ),
        (
            described("FDM_EDMPrecond", sigma_min=0.01, sigma_max=40.0),
            EDM(lowest=0.01, highest=40.0, momentum=Momentum(multiplier=1.0)),
        ),
        (described(loss=Persistent("EDMLoss", {})), EDM()),
        (described("VPPrecond", loss=Persistent("EDMLoss", {"P_mean": -1.0})), VP()),
        (
            described(loss=Persistent("EDMLoss", {"P_mean": -1.0, "P_std": 1.4, "warmup_ite": 200.0})),
            EDM(P_mean=-1.0, P_std=1.4),
        ),
    ],
)
def test_families(snapshot, family):
    assert family_of(config_of(snapshot)) == family


def test_numbers_keep_their_kind():
    scales = config_of(described("VPPrecond", M=500.0))["family"]["num_scales"]
    assert scales == 500 and isinstance(scales, int)


def test_an_augmentation_that_the_network_is_not_told_of():
    ema, pipe = described().ema, Persistent("AugmentPipe", {"p": 0.12})
    assert config_of(Snapshot(ema, None, pipe))["augment"] == {"labels": False}


def test_defaults_of_the_originals_network():
    network = from_dict(config_of(described())).network
    assert (network.model_channels, network.channel_mult, network.num_blocks) == (128, (1, 2, 2, 2), 4)
    assert (network.attn_resolutions, network.dropout, network.preset) == ((16,), 0.1, "ddpmpp")


NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


def endless():
    """A small list that takes for ever to print, or to compare with another such."""
    value = [1]
    for _ in range(60):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "snapshot, words",
    [
        (described("Generator"), "its network is a Generator, and VPPrecond"),
        (described("iDDPMPrecond"), "its network is a iDDPMPrecond"),
        (
            Snapshot(Persistent("EDMPrecond", {"_modules": {"model": Persistent("DhariwalUNet", {})}}), None, None),
            "DhariwalUNet; SongUNet .* not ADM",
        ),
        (Snapshot(Persistent("EDMPrecond", {}), None, None), "network of an unknown kind"),
        (described(network={"img_size": 3}), "made with 'img_size'"),
        (
            described(network={"in_channels": endless(), "out_channels": endless()}),
            r"its in_channels is \[\[.*, and a number",
        ),
        (described(network={"embedding_type": endless()}), "its embedding_type is "),
        (described("FDM_EDMPrecond", fdm_beta_d=endless()), "its fdm_beta_d is "),
        (described(network={"num_blocks": 10**9}), "its num_blocks is 1000000000, and 1 to 64"),
        (described(network={"channel_mult": [1] * 99}), "has 99 levels"),
        (described(network={"out_channels": 6}), "another number of channels"),
        (described(network={"encoder_type": "residual"}), "neither DDPM"),
        (described(network=NCSNPP | {"decoder_type": "skip"}), "neither DDPM"),
        (described(network={"augment_dim": 6}), "has 6 augment labels"),
        (described("FDM_EDMPrecond", fdm_beta_d=10.0), "fdm_beta_d is 10.0"),
        (described("VPPrecond", beta_d="x"), "its beta_d is no number"),
        (described("VPPrecond", beta_d=True), "its beta_d is no number"),
    ],
)
def test_networks_that_are_not_here(snapshot, words):
    with pytest.raises(UserError, match=words):
        config_of(snapshot)
    assert config_of(described(network=NCSNPP))["network"]["preset"] == "ncsnpp"


# --- Pickles that are not what they say ---


def written(tmp_path, content):
    path = tmp_path / "snapshot.pkl"
    path.write_bytes(content if isinstance(content, bytes) else dumps({"ema": content}))
    return path


def test_a_snapshot_written_here(tmp_path):
    """The tools of the tests below make what the reader takes."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    ema = module(
        {"a": tensor(values), "b": tensor(values, 0, (4, 3), (1, 4)), "c": tensor(values, 4, (2,), (1,)), "none": None}
    )
    found = tensors(read_snapshot(written(tmp_path, ema), plain_storage).ema)
    np.testing.assert_array_equal(found["a"], values)
    np.testing.assert_array_equal(found["b"], values.T)
    np.testing.assert_array_equal(found["c"], [4, 5])
    assert len(found) == 3


@pytest.mark.parametrize(
    "value",
    [np.float64(0.5), np.float32(0.25), np.int64(-3), np.int32(7), np.bool_(True)],
    ids=lambda value: value.dtype.name,
)
@pytest.mark.parametrize("where", ["numpy.core", "numpy._core"], ids=["NumPy 1", "NumPy 2"])
def test_numbers_of_numpy(tmp_path, value, where):
    dtype = Call("numpy.dtype", value.dtype.str[1:], False, True)
    number = Call(f"{where}.multiarray.scalar", dtype, value.tobytes())
    found = read_snapshot(written(tmp_path, persistent(state={"sigma_data": number})), plain_storage)
    assert found.ema.state["sigma_data"] == value and type(found.ema.state["sigma_data"]) is type(value.item())


def test_a_tensor_of_nothing(tmp_path):
    found = read_snapshot(written(tmp_path, module({"a": tensor(np.zeros((3, 0), np.float32))})), plain_storage)
    assert tensors(found.ema)["a"].shape == (3, 0)


def test_a_module_in_two_places(tmp_path):
    """Some levels of such would take for ever to walk through."""
    child = module({"a": tensor(np.zeros(2, np.float32))})
    twice = persistent(state={"_parameters": {}, "_buffers": {}, "_modules": {"x": child, "y": child}})
    with pytest.raises(UserError, match="^y is not a module of its own"):
        tensors(read_snapshot(written(tmp_path, twice), plain_storage).ema)


def test_carried_source_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    source = f"open({str(mark)!r}, 'w')"
    read_snapshot(written(tmp_path, persistent(source=source)), plain_storage)
    assert not mark.exists()


def deep(depth, opening, closing=b""):
    return b"\x80\x04}\x8c\x03ema" + opening * depth + closing * depth + b"s."


def hostile(mark):
    """Name -> what is pickled, or the bytes of a pickle."""
    touch, write = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    call = {
        "os.system": Call("posix.system", touch),
        "eval": Call("builtins.eval", write),
        "exec": Call("builtins.exec", write),
        "getattr": Call("builtins.getattr", Call("builtins.__import__", "os"), "system"),
        "import": Call("builtins.__import__", "os"),
        "in the state": persistent(state={"_modules": {"model": Call("posix.system", touch)}}),
        "subprocess": persistent(state={"x": Call("subprocess.call", ["touch", str(mark)])}),
        "a file": Call("io.open", str(mark), "w"),
        "torch.load": Call("torch.load", str(mark)),
        "torch.hub": Call("torch.hub.load", "x", "y"),
        "numpy.load": Call("numpy.save", str(mark), 1),
        "objects of numpy": Call("numpy.core.multiarray._reconstruct", 1, (0,), b"O"),
        "partial": Call("functools.partial", 1),
        "a nested pickle": Call("pickle.loads", dumps(Call("posix.system", touch))),
        "in a tensor's bytes": Call("torch.storage._load_from_bytes", dumps(Call("posix.system", touch), 2)),
        "after a tensor's header": Call(
            "torch.storage._load_from_bytes",
            b"".join(dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, Call("posix.system", touch))),
        ),
        "ema is text": "hello",
        "another version": persistent(version=7),
        "no version": persistent(version="6"),
        "an endless version": persistent(version=endless()),
        "object dtype": Call("numpy.core.multiarray.scalar", Call("numpy.dtype", "O8", False, True), b"x" * 8),
        "calls its own object": persistent(state={"x": Call("torch._utils._rebuild_tensor_v2", "text", 0, (1,), (1,))}),
    }  # fmt: skip
    values = np.zeros(4, np.float32)
    for name, claim in {
        "shape of a tensor": {"size": (10**12,), "stride": (0,)},
        "stride of a tensor": {"size": (2,), "stride": (10**9,)},
        "offset of a tensor": {"offset": 10**9, "size": (1,), "stride": (1,)},
        "negative offset": {"offset": -1, "size": (1,), "stride": (1,)},
        "text as a shape": {"size": "12", "stride": (1,)},
    }.items():
        call[name] = module({"w": tensor(values, **claim)})
    claimed = torch_bytes(values).replace((4).to_bytes(9, "little"), (10 * 2**30).to_bytes(9, "little"))
    call["10 GB in a storage"] = module({"w": Call("torch.storage._load_from_bytes", claimed)})
    return call | {
        "10 GB of bytes": b"\x80\x04}\x8c\x03ema\x8e" + (10 * 2**30).to_bytes(8, "little") + b"xs.",
        "10 GB of text": b"\x80\x04}\x8c\x03ema\x8d" + (10 * 2**30).to_bytes(8, "little") + b"xs.",
        "10 GB frame": b"\x80\x04\x95" + (10 * 2**30).to_bytes(8, "little") + b"}.",
        "10 GB number": b"\x80\x04\x8b\xff\xff\xff\x7f.",
        "deep lists": deep(300_000, b"]", b"a"),
        "deep tuples as a key": b"\x80\x04}" + b")" + b"\x85" * 300_000 + b"Ns.",
        "deep tuples in a set": b"\x80\x04\x8f(" + b")" + b"\x85" * 300_000 + b"\x90.",
        "deep dictionaries": b"\x80\x04" + b"}K\x01" * 300_000 + b"N" + b"s" * 300_000 + b".",
        "protocol 0 instance": f"(S'{touch}'\niposix\nsystem\n.".encode(),
        "protocol 0 call": f"cposix\nsystem\n(S'{touch}'\ntR.".encode(),
        "extension registry": b"\x80\x02\x82\x01.",
        "persistent id": b"\x80\x04\x8c\x01xQ.",
        "dotted name": b"\x80\x04\x8c\x0ctorch._utils\x8c.x_rebuild_parameter.__globals__"[:16] + b"\x8c\x05a.b.c\x93.",
        "empty": b"",
        "a zip": b"PK\x03\x04 and so on",
        "text": b"hello",
        "another pickle": pickle.dumps({"G_ema": 1}),
        "a list": pickle.dumps([1, 2]),
        "no stop": b"\x80\x04}",
        "popped too far": b"\x80\x0400000.",
        "build on a list": b"\x80\x04]}b.",
        "call of text": b"\x80\x04\x8c\x01x)R.",
        "items of text": b"\x80\x04\x8c\x01x\x8c\x01yNs.",
    }


CASES = list(hostile("mark"))


@pytest.mark.parametrize("name", CASES)
def test_hostile_and_foreign_files_are_refused_and_not_run(tmp_path, monkeypatch, name):
    assert len(CASES) > 40
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "mark"
    path = written(tmp_path, hostile(mark)[name])
    with pytest.raises(UserError) as caught:
        load_snapshot(path, plain_storage)
    sentence = str(caught.value)
    assert sentence.startswith(str(path)) and "\n" not in sentence and len(sentence) < 500
    assert not mark.exists()


def over_and_over(name, *arguments):
    """The same call a thousand times, in a few bytes each: its parts are in the pickle once."""
    calls = [Call(name, *arguments) for _ in range(1000)]
    for call in calls:
        call.reduced = calls[0].reduced
    return calls


@pytest.mark.parametrize(
    "call",
    [
        ("_codecs.encode", "a" * 1000, "latin1"),
        ("torch.storage._load_from_bytes", torch_bytes(np.zeros(1000, np.float32))),
        ("collections.OrderedDict", [(i, None) for i in range(1000)]),
        ("dnnlib.util.EasyDict", {f"{i}": i for i in range(1000)}),
        ("builtins.set", list(range(1000))),
    ],
)
def test_a_small_file_cannot_fill_the_memory(tmp_path, call):
    path = written(tmp_path, persistent(state={"x": over_and_over(*call)}))
    assert path.stat().st_size < 50_000
    with pytest.raises(UserError, match="it makes far more of its parts than it holds"):
        read_snapshot(path, plain_storage)
    read_snapshot(written(tmp_path, persistent(state={"x": over_and_over(*call)[:1]})), plain_storage)


def test_endless_names(tmp_path):
    """Each module's name comes before those of all its parameters."""
    snapshot = read_snapshot(written(tmp_path, persistent(state={"_modules": {"a" * 201: module({})}})), plain_storage)
    with pytest.raises(UserError, match="_modules is not a dictionary of names"):
        tensors(snapshot.ema)


def test_tensors_outside_of_all_modules():
    for name in ("foo", "model.foo", "enc.foo"):
        with pytest.raises(UserError, match="There is no module for the tensor"):
            from_torch({name: np.zeros((2, 2), np.float32)})


def test_tensors_of_as_many_dimensions_as_no_layer_has():
    for shape in ((), (2, 2, 2), (2, 2, 2, 2, 2)):
        with pytest.raises(UserError, match=re.escape(f"map_layer0.weight has shape {shape}; 1, 2 or 4")):
            from_torch({"map_layer0.weight": np.zeros(shape, np.float32)})


class EasyDict(dict):
    """A dictionary's subclass, as the original has one."""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_dictionaries_of_the_originals_own(tmp_path, monkeypatch, protocol):
    package = types.SimpleNamespace(EasyDict=EasyDict)
    monkeypatch.setitem(sys.modules, "dnnlib", types.SimpleNamespace(util=package))
    monkeypatch.setitem(sys.modules, "dnnlib.util", package)
    monkeypatch.setattr(EasyDict, "__module__", "dnnlib.util")
    path = tmp_path / "options.pkl"
    path.write_bytes(pickle.dumps(EasyDict(a=EasyDict(b=1)), protocol))
    functions = {"dnnlib.util.EasyDict": dict}
    with path.open("rb") as file:
        assert PlainUnpickler(file, functions).load() == {"a": {"b": 1}}


def test_modules_that_occur_twice(tmp_path):
    """A tree of sixty levels whose branches are one and the same: a walk would not end."""
    node = module({})
    for _ in range(60):
        node = persistent(state={"_modules": {"a": node, "b": node}})
    snapshot = read_snapshot(written(tmp_path, node), plain_storage)
    with pytest.raises(UserError, match="not a module of its own"):
        tensors(snapshot.ema)


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "nowhere.pkl", tmp_path):
        with pytest.raises(UserError, match="cannot be read .*: give the path of a network-snapshot"):
            read_snapshot(path)


def mutated(data, rng):
    """One to four random changes of bytes, mostly where the structure is."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        place = rng.randint(0, len(data)) if rng.rand() < 0.3 else rng.choice(STRUCTURE)
        kind = rng.randint(0, 5)
        if kind == 0:
            data[place] = rng.randint(0, 256)
        elif kind == 1:
            data[place] ^= 1 << rng.randint(0, 8)
        elif kind == 2:
            del data[place : place + rng.randint(1, 9)]
        elif kind == 3:
            data[place:place] = rng.bytes(rng.randint(1, 9))
        elif rng.rand() < 0.2:
            del data[place:]
        else:
            other = rng.choice(STRUCTURE)
            data[place : place + 8] = data[other : other + 8]
        if len(data) <= max(STRUCTURE) + 16:
            break
    return bytes(data)


STRUCTURE: list[int] = []  # where opcodes stand


def fuzz(tmp_path, count, seed, load_storage):
    data = (GOLDEN / "snapshot-fdm_edm.pkl").read_bytes()
    STRUCTURE[:] = [place for _, _, place in pickletools.genops(io.BytesIO(data))]
    rng, ends = np.random.RandomState(seed), {"read": 0, "refused": 0}
    for i in range(count):
        path = tmp_path / "mutated.pkl"
        path.write_bytes(mutated(data, rng))
        try:
            snapshot = read_snapshot(path, load_storage)
            config_of(snapshot)
            from_torch(tensors(snapshot.ema))
            ends["read"] += 1
        except UserError as error:
            assert "\n" not in str(error), i
            ends["refused"] += 1
    return ends


def test_mutations_of_a_good_snapshot(tmp_path):
    ends = fuzz(tmp_path, 100, 0, plain_storage)
    assert ends["read"] > 5 and ends["refused"] > 20


@pytest.mark.slow
def test_two_thousand_mutations_with_torch(tmp_path):
    pytest.importorskip("torch")
    ends = fuzz(tmp_path, 2000, 1, torch_storage)
    assert ends["read"] > 100 and ends["refused"] > 400
