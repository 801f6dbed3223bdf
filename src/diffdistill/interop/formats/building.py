"""From a foreign state to a denoiser of ours, strictly, and with no allocation that the file does not account for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.errors import one_line
from diffdistill.interop.containers.checkpoints import ForeignCheckpoint
from diffdistill.interop.containers.records import MAX_TENSORS, ForeignFileError, Record, shown
from diffdistill.interop.containers.tensors import ArrayRecord, TensorRecord
from diffdistill.models.building import build_denoiser
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.storage import load_state

ALWAYS_LABELLED = "; it was never trained without labels, so that classifier-free guidance of it means nothing"
"""What is said of class-conditional models that did not leave out labels in training."""
_MAX_CHANNELS = 2**16
_MAX_BLOCKS = 512


@dataclass(frozen=True)
class ForeignModel:
    """The model in a foreign file.

    Attributes:
        kind: "edm", "adm", "consistency", "ldm", "stable-diffusion", "flux", "classifier" or "amed-predictor".
        denoiser: the model, or None where the file holds a classifier or a predictor.
        description: one sentence for people.
        other: the classifier, or the predictor.
        settings: what else the file says, such as the settings that a predictor was trained for, or the other parts of
            Stable Diffusion.
    """

    kind: str
    denoiser: Denoiser | None
    description: str
    other: nn.Module | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def module_state(record: Record) -> dict[str, TensorRecord | ArrayRecord]:
    """Parameters and buffers of a module's record and all those within it, by their names in a state dict.

    Raises:
        ForeignFileError: something else stands where a parameter or a module should.
    """
    state: dict[str, TensorRecord | ArrayRecord] = {}
    seen: set[int] = set()

    def collect(module: Any, prefix: str, depth: int) -> None:
        if not isinstance(module, Record) or depth > 32 or id(module) in seen:
            raise ForeignFileError(f"{prefix[:80] or 'the root'} is not a module, or is nested in itself")
        seen.add(id(module))
        for part in ("_parameters", "_buffers", "_modules"):
            children = module.state.get(part, {})
            if not isinstance(children, dict):
                raise ForeignFileError(f"{part} of {prefix[:80] or 'the root'} is damaged")
            for name, child in children.items():
                if child is None:
                    continue
                if part == "_modules":
                    collect(child, f"{prefix}{name}.", depth + 1)
                elif isinstance(child, (TensorRecord, ArrayRecord)):
                    state[f"{prefix}{name}"] = child
                else:
                    raise ForeignFileError(f"{prefix[:80]}{name} is not a tensor")
                if len(state) > MAX_TENSORS:
                    raise ForeignFileError(f"the network has more than {MAX_TENSORS} parameters")

    collect(record, "", 0)
    return state


def bounded_int(value: Any, name: str, *, low: int = 0, high: int = _MAX_CHANNELS) -> int:
    """A whole number of an architecture, within bounds.

    Raises:
        ForeignFileError: it is none, or is out of bounds.
    """
    if type(value) is not int or not low <= value <= high:
        raise ForeignFileError(f"{name} is {shown(value)}: expected a whole number from {low} to {high}")
    return value


def finite_float(value: Any, name: str, *, positive: bool = False) -> float:
    """A finite number.

    Raises:
        ForeignFileError: it is none.
    """
    if type(value) not in (int, float) or not abs(value) < 1e30 or (positive and value <= 0):
        raise ForeignFileError(f"{name} is {shown(value)}: expected a {'positive ' * positive}number")
    return float(value)


def check_size(levels: int, blocks: int) -> None:
    """Refuse an architecture of more blocks than any published one has, before it is built."""
    if levels < 1 or levels * blocks > _MAX_BLOCKS:
        raise ForeignFileError(f"an architecture of {levels} levels with {blocks} blocks each is refused")


def build_strictly(
    config: Mapping[str, Any], records: Mapping[str, Any], checkpoint: ForeignCheckpoint
) -> NetworkDenoiser:
    """Build the denoiser of `config` and copy `records` into it, in float32.

    Raises:
        ForeignFileError: the config is invalid, or the state belongs to another architecture.
    """
    # The table of the noise levels has values, which a module without memory cannot hold.
    light = {**config, "preconditioning": {"name": "edm"}}
    return build_part(lambda: build_denoiser(config), records, checkpoint, skeleton=lambda: build_denoiser(light))


def build_part(
    make: Callable[[], Any],
    records: Mapping[str, Any],
    checkpoint: ForeignCheckpoint,
    *,
    part: str = "file",
    skeleton: Callable[[], Any] | None = None,
) -> Any:
    """A module with the tensors of the file, strictly.

    Args:
        make: makes it, with any weights.
        records: its state.
        checkpoint: the file.
        part: what errors call it.
        skeleton: makes a module with the same parameters, on the device "meta"; `make` itself by default.

    Raises:
        ForeignFileError: the options are invalid, or the state belongs to another architecture.
    """
    try:
        # A module without memory first: a damaged size must not allocate.
        with torch.device("meta"):
            shapes = {name: torch.empty(_shape(record)) for name, record in records.items()}
            load_state((skeleton or make)(), shapes, source=f"the {part}")
        state = checkpoint.tensors(records)
        module: nn.Module = make()
        load_state(module, state, source=f"the {part}")
    except ForeignFileError:
        raise
    except (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError) as error:
        raise ForeignFileError(one_line(error)) from None
    return module.eval()


def sizes_of(config: Mapping[str, Any]) -> str:
    """The sizes of images and the number of classes of a denoiser's config, for people."""
    labels = f"{config['num_classes']} classes" if config["num_classes"] else "no classes"
    return f"{'x'.join(str(n) for n in config['data_shape'])}, {labels}"


def with_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): record for name, record in state.items() if name.startswith(prefix)}


def size_of(records: Mapping[str, Any], name: str, axis: int, part: str = "network") -> int:
    """The length of a tensor along an axis.

    Raises:
        ForeignFileError: the part misses the tensor, or it has no such axis.
    """
    record = records.get(name)
    if not isinstance(record, TensorRecord) or len(record.size) <= axis:
        raise ForeignFileError(f"the {part} misses {name}")
    return bounded_int(record.size[axis], name, low=1)


def count_of(records: Mapping[str, Any], beginning: str) -> int:
    """Elements of a list of modules, the names of whose parameters begin so.

    Raises:
        ForeignFileError: there are none, or too many.
    """
    return bounded_int(
        len({name.partition(".")[0] for name in with_prefix(records, beginning)}), beginning, low=1, high=512
    )


def _shape(record: Any) -> tuple[int, ...]:
    if not isinstance(record, (TensorRecord, ArrayRecord)):
        raise ForeignFileError(f"a {type(record).__name__} stands where a tensor should")
    return record.size if isinstance(record, TensorRecord) else record.shape


def load_strictly(module: nn.Module, records: Mapping[str, Any], checkpoint: ForeignCheckpoint) -> None:
    """Copy `records` into a module that is small, or whose size was checked.

    Raises:
        ForeignFileError: the state belongs to another architecture.
    """
    state: dict[str, Tensor] = checkpoint.tensors(records)
    try:
        load_state(module, state, source="the file")
    except (ValueError, RuntimeError) as error:
        raise ForeignFileError(one_line(error)) from None
