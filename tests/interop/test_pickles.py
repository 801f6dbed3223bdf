"""Pickles are read as data: what is on the allow-list comes back equal, anything else is refused and named."""

import builtins
import collections
import io
import json
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffdistill.interop import ForeignFileError, UnsafePickleError, open_checkpoint, read_arrays, read_foreign
from diffdistill.interop.containers.pickle_machine import OPERATIONS
from diffdistill.interop.containers.pickles import Machine
from diffdistill.interop.containers.records import Budget
from diffdistill.interop.containers.tensors import ALLOWED
from tests.interop.persistence import Persistent, pickled


def load(data):
    return Machine(data, ALLOWED).load()


def plain(value):
    """Views of the file as bytes, for comparisons."""
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


VALUES = {
    "numbers": [0, 1, -1, 255, 256, -70000, 2**31, 2**70, -(2**2000), 1.5, -0.0, 1e300, True, False, None],
    "text": ["", "a", "é" * 300, "line\nbreak", "x" * 70000],
    "bytes": [b"", b"\x00\xff" * 40, b"y" * 70000],
    "containers": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], {1, 2}, frozenset({3}), {"a": {"b": [1]}, 2: 3}],
    "ordered": collections.OrderedDict([("b", 1), ("a", [2, 3])]),
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back(protocol):
    result = load(pickle.dumps(VALUES, protocol=protocol))
    assert plain(result) == VALUES
    assert list(result["ordered"]) == ["b", "a"]


@pytest.mark.parametrize("protocol", range(6))
def test_shared_and_recursive_values_keep_their_identity(protocol):
    shared = [1]
    loop = [shared, shared]
    loop.append(loop)
    result = load(pickle.dumps(loop, protocol=protocol))
    assert result[0] is result[1] and result[2] is result


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_back(protocol, tmp_path):
    content = {
        "fid": {"mu": np.arange(3.0), "sigma": np.asfortranarray(np.arange(6.0).reshape(2, 3))},
        "big_endian": np.arange(4, dtype=">i4"),
        "half": np.array([[1.5]], np.float16),
        "empty": np.zeros((0, 5), np.int64),
        "scalar": np.float64(2.5),
    }
    (tmp_path / "reference.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    result = read_arrays(tmp_path / "reference.pkl")
    for name in ("mu", "sigma"):
        np.testing.assert_array_equal(result["fid"][name], content["fid"][name])
    for name in ("big_endian", "half", "empty"):
        assert result[name].dtype == content[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(result[name], content[name])
    assert result["scalar"] == 2.5


TENSORS = {
    "float": torch.randn(3, 2, 5),
    "transposed": torch.randn(4, 3).t(),
    "view": torch.arange(20.0)[3:15].view(3, 4)[:, 1:],
    "half": torch.randn(7).half(),
    "bfloat": torch.randn(7).bfloat16(),
    "long": torch.arange(5),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.randn(2, 2)),
}


@pytest.mark.parametrize("how", ["pickle", "legacy", "zip"])
def test_tensors_come_back(how, tmp_path):
    path = tmp_path / "tensors"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state": TENSORS}))
    else:
        torch.save({"state": TENSORS}, path, _use_new_zipfile_serialization=how == "zip")
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.tensors(checkpoint.root["state"])
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].is_contiguous()
        assert torch.equal(tensors[name], tensor), name


def test_a_tensor_whose_sign_is_a_mark_beside_it_is_refused(tmp_path):
    torch.save({"a": torch._neg_view(torch.ones(3))}, tmp_path / "x.pt")
    with pytest.raises(ForeignFileError, match="resolve_neg"), open_checkpoint(tmp_path / "x.pt"):
        pass


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def payloads(witness):
    write = f"open({str(witness)!r}, 'w').close()"
    return {
        f"{os.system.__module__}.system": Calls(os.system, f"touch {witness}"),
        "builtins.exec": Calls(builtins.exec, write),
        "builtins.eval": Calls(builtins.eval, write),
        "builtins.getattr": Calls(builtins.getattr, "x", "upper"),
        "torch.serialization.load": Calls(torch.load, str(witness)),
        "io.open": Calls(builtins.open, str(witness), "w"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", payloads("x"))
def test_a_payload_is_refused_by_name_and_not_executed(name, protocol, tmp_path):
    witness = tmp_path / "witness"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"ema": payloads(witness)[name]}, protocol=protocol))
    with pytest.raises(UnsafePickleError, match=name.replace(".", r"\.")), open_checkpoint(tmp_path / "evil.pkl"):
        pass
    assert not witness.exists()


class Nested:
    """Pickles as a storage whose bytes are a stream of our choice."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize("layout", ["bare", "legacy", "zip"])
def test_a_payload_within_a_storage_is_refused(layout, tmp_path):
    witness = tmp_path / "witness"
    evil = Calls(os.system, f"touch {witness}")
    if layout == "bare":
        data = pickle.dumps(evil)
    else:
        buffer = io.BytesIO()
        torch.save(evil, buffer, _use_new_zipfile_serialization=layout == "zip")
        data = buffer.getvalue()
    (tmp_path / "evil.pkl").write_bytes(pickled({"ema": Persistent("EDMPrecond", weight=Nested(data))}))
    error = ForeignFileError if layout == "zip" else UnsafePickleError
    with pytest.raises(error, match=None if layout == "zip" else r"\.system"), open_checkpoint(tmp_path / "evil.pkl"):
        pass
    assert not witness.exists()


def test_persistent_objects_become_records_without_their_source(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickled({"ema": Persistent("EDMPrecond", sigma_data=0.5)}))
    os.environ.pop("EXECUTED", None)
    with open_checkpoint(tmp_path / "x.pkl") as checkpoint:
        record = checkpoint.root["ema"]
    assert record.kind == "EDMPrecond" and record.state["sigma_data"] == 0.5
    assert len(record.source_sha256) == 64 and "EXECUTED" not in os.environ


def test_arrays_of_strange_sizes_end_in_the_documented_error(tmp_path):
    for dtype, size in ((torch.bfloat16, (2,)), (torch.float32, (0, 2**40, 2**40))):
        storage = torch.zeros(2, dtype=dtype).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
        tensor = Calls(torch._utils._rebuild_tensor_v2, typed, 0, size, (1,) * len(size), False, {})
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": tensor}))
        with pytest.raises(ForeignFileError):
            read_arrays(tmp_path / "x.pkl")


def declared(code, size, layout):
    return code + struct.pack(layout, size)


@pytest.mark.parametrize(
    "data",
    [
        declared(b"\x8e", 2**62, "<Q"),  # bytes
        declared(b"\x8d", 2**40, "<Q"),  # text
        declared(b"\x96", 2**63 - 1, "<Q"),  # bytearray
        declared(b"\x8b", 2**31 - 1, "<i"),  # a long integer
        declared(b"\x95", 2**40, "<Q") + b".",  # a frame
        b"]" + declared(b"r", 2**32 - 1, "<I") + b"0.",  # a far entry of the memo; the stack is empty afterwards
        b"(" * 10_000 + b"l" * 5_000,
        b"\x80\x09.",
        b"",
    ],
    ids=["bytes", "text", "bytearray", "long", "frame", "memo", "marks", "protocol", "empty"],
)
def test_declared_sizes_allocate_nothing(data):
    tracemalloc.start()
    with pytest.raises(ForeignFileError):
        load(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize(
    "key",
    [b")" + b"\x85" * 200_000, b"(" + b"K\x01" * 30 + b"t", b"\x8a\x09" + b"\x01" * 9],
    ids=["nested tuple", "tuple", "integer"],
)
def test_keys_that_are_slow_to_hash_or_can_collide_are_refused(key):
    with pytest.raises(ForeignFileError, match="key"):
        load(b"}" + key + b"K\x01s.")


def test_long_integers_are_refused():
    # Sizes of a tensor, whose product would take minutes.
    with pytest.raises(ForeignFileError, match="integer of 100000 bytes"):
        load(declared(b"\x8b", 100_000, "<i") + b"\x7f" * 100_000 + b".")


def test_nested_values_are_not_written_out():
    # Each list holds the one before twice: as text the last would have 2**18 of the first.
    double = b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(18))
    nested = b"]q\x00" + double + b"0"
    assert load(nested + b"ctorch\ndevice\nh\x12\x85R.") == "a list"
    for call in (b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n"):
        with pytest.raises(ForeignFileError, match="a list") as refused:
            load(nested + call + b"h\x12\x85R.")
        assert len(str(refused.value)) < 200


def test_a_pickle_of_too_many_instructions_is_refused():
    with pytest.raises(ForeignFileError, match="instructions"):
        Machine(b"]" * 1001 + b".", ALLOWED, budget=Budget(1000)).load()


def test_repeated_data_cannot_grow(tmp_path):
    # One array of 80 kB, encoded from the same text again and again.
    text = "a" * 80_000
    calls = [Calls(__import__("_codecs").encode, text, "latin1") for _ in range(3_000)]
    with pytest.raises(ForeignFileError, match="instructions"):
        load(pickle.dumps(calls))
    # The same, as the content of arrays in pickles of Python 2.
    size = struct.pack("<i", 80_000)
    names = b"cnumpy.core.multiarray\n_reconstruct\nq\x000(cnumpy\nndarray\nK\x00tq\x010"
    state = b"((J" + size + b"tcnumpy\ndtype\n(U\x02u1tR\x89T" + size + b"a" * 80_000 + b"tq\x020"
    with pytest.raises(ForeignFileError, match="instructions"):
        load(names + state + b"h\x00h\x01Rh\x02b0" * 3_000 + b"N.")
    storage = torch.randn(1000)
    torch.save({str(i): storage for i in range(100)}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint, pytest.raises(ForeignFileError, match="repeat"):
        checkpoint.tensors(checkpoint.root)


def test_a_nested_stream_is_paid_for_each_time_it_is_read(tmp_path):
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x00tQ."
    unused = b"T" + struct.pack("<i", 4_000_000) + b"a" * 4_000_000 + b"0"
    stream = b"".join(pickle.dumps(part) for part in parts) + unused + storage + pickle.dumps(["0"]) + bytes(8)
    call = b"B" + struct.pack("<I", len(stream)) + stream + b"\x85q\x000ctorch.storage\n_load_from_bytes\nq\x010"
    for times, error in ((2, "no model of diffdistill, EDM"), (3_000, "instructions")):
        (tmp_path / "x.pkl").write_bytes(call + b"h\x01h\x00R0" * times + b"N.")
        with pytest.raises(ForeignFileError, match=error):
            read_foreign(tmp_path / "x.pkl")


def test_a_table_of_parameters_is_not_listed_by_every_module(tmp_path):
    table, weight = (
        {str(i): torch.zeros(0) for i in range(300)},
        Persistent("AMED_predictor", scale_dir=0, scale_time=0),
    )
    for i in range(300):
        weight._modules[str(i)] = Persistent("Linear", _parameters=table)
    (tmp_path / "x.pkl").write_bytes(pickled({"model": weight}))
    with pytest.raises(ForeignFileError, match="more than 65536 parameters"):
        read_foreign(tmp_path / "x.pkl")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64, torch.int8])
def test_safetensors_of_any_type_come_back(dtype, tmp_path):
    tensor = (3 * torch.randn(2, 3, 5)).to(dtype)
    save_file({"a": tensor}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        result = checkpoint.tensors(checkpoint.root)["a"]
    assert result.dtype == dtype and torch.equal(result.float(), tensor.float())


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": "F32", "shape": [1] * 200_000, "data_offsets": [0, 4]}, "9 sizes"),
        ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}, "declared in 4 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "outside"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, "outside"),
        ({"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}, "type F4 are not read: F64"),
        ({"dtype": [], "shape": [1], "data_offsets": [0, 4]}, "damaged header"),
    ],
)
def test_damaged_headers_of_safetensors_are_refused(entry, match, tmp_path):
    header = json.dumps({"model.diffusion_model.a": entry}).encode()
    (tmp_path / "x.ckpt").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ForeignFileError, match=match):
        read_foreign(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((7,), (1,), 0), ((2, 3), (3, 1), 1), ((6,), (2,), 0), ((1000,), (0,), 0), ((2,), (1,), 10**12)],
)
def test_a_tensor_outside_its_storage_is_refused(size, stride, offset, tmp_path):
    storage = torch.randn(6).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    tensor = Calls(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, collections.OrderedDict())
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": tensor}))
    with pytest.raises(ForeignFileError, match="storage of 6 numbers"), open_checkpoint(tmp_path / "x.pkl"):
        pass


def test_what_is_no_checkpoint_shows_its_beginning_and_an_archive_its_content(tmp_path):
    path = tmp_path / "model.ckpt"
    for content in (b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(content)
        with pytest.raises(ForeignFileError, match=content[:15].decode()):
            read_foreign(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("celeba/weights.ckpt", b"...")
        archive.writestr("celeba/config.yaml", b"model: {}")
    with pytest.raises(ForeignFileError, match=r"unpacked first: it holds celeba/weights\.ckpt, celeba/config\.yaml"):
        read_foreign(path)


def test_objects_on_the_stack_cannot_be_called_or_changed():
    # A list is called; a function gets attributes; a number is made into an object.
    for data in (b"(lN\x85R.", b"cbuiltins\nset\n(dS'x'\nK\x01sb.", b"K\x01)\x81."):
        with pytest.raises(ForeignFileError):
            load(data)


def test_every_instruction_of_the_format_is_read_or_refused():
    known = {ord(o.code) for o in pickletools.opcodes}
    refused = {"i", "o", "\x82", "\x83", "\x84", "\x97", "\x98"}  # INST, OBJ, EXT1-4, buffers
    assert set(OPERATIONS) | {ord(".")} == known - {ord(code) for code in refused}
    for code in refused:
        with pytest.raises(ForeignFileError, match="instruction"):
            load(code.encode("latin1") + b"\x00\x00\x00\x00.")
