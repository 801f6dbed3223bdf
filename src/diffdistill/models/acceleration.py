"""The same denoiser, evaluated faster: compiled, or, without gradients, recorded as a CUDA graph."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.devices import channels_last as to_channels_last
from diffdistill.errors import one_line
from diffdistill.models import Wrapper
from diffdistill.solvers.features import FeatureTap

Outputs = tuple[Tensor, Tensor | None]
Record = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], object]]]
"""Evaluates a function, and returns the tensors that it filled and what fills them again."""

MOST_GRAPHS = 8
MOST_COMPILATIONS = 256
WARM_UP = 3


def accelerated(
    denoiser: Denoiser, *, channels_last: bool = False, compile: bool = False, cuda_graph: bool = False
) -> Denoiser:
    """The same denoiser, computed faster. Its answers change by rounding only.

    Args:
        denoiser: with `channels_last` its weights change their layout in place.
        channels_last: the layout that convolutions in bf16 want on a GPU; images follow the weights.
        compile: `torch.compile` it, which takes a minute or more before the first answer.
        cuda_graph: launch each evaluation as one CUDA graph.

    Raises:
        ValueError: `cuda_graph` without a GPU.
    """
    if channels_last:
        to_channels_last(denoiser)
    if compile:
        denoiser = Compiled(denoiser)
    return CudaGraphs(denoiser) if cuda_graph else denoiser


class _OneFunction(Wrapper):
    """A denoiser whose evaluation is one function without side effects, `(x, sigma, cond) -> (denoised, features)`.

    The hooks of modules do not run where a compiled or recorded function does. So the output of the bottleneck is a
    result of that function, which a stand-in hands on to the hooks that learned solvers set.
    """

    def __init__(self, denoiser: Callable[..., Tensor]) -> None:
        super().__init__(denoiser)
        self.cost, self.w, self.w_range = self.denoiser.cost, self.denoiser.w, self.denoiser.w_range
        inner = super().bottleneck
        self._stand_in = nn.Identity()
        self._tap = None if inner is None else FeatureTap(inner)

    @property
    def bottleneck(self) -> nn.Module | None:
        return None if self._tap is None else self._stand_in

    @property
    def wants_features(self) -> bool:
        return bool(self._stand_in._forward_hooks)

    def evaluate(self, x: Tensor, sigma: Tensor, cond: Any, s: Tensor | None = None) -> Outputs:
        ends = {} if s is None else {"s": s}
        denoised = self.denoiser(x, sigma, cond, **ends)
        if self._tap is None:
            return denoised, None
        features, self._tap.output = self._tap.output, None
        return denoised, features

    def hand_on(self, outputs: Outputs) -> Tensor:
        denoised, features = outputs
        if features is not None and self.wants_features:
            self._stand_in(features)
        return denoised


class Compiled(_OneFunction):
    """A denoiser compiled by `torch.compile`, once for every shape of its arguments and every number w that guides it.

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0`.
        backend: of torch.compile.
    """

    def __init__(self, denoiser: Callable[..., Tensor], *, backend: str = "inductor") -> None:
        super().__init__(denoiser)
        # PyTorch counts the compilations of all denoisers together, and after 8 of them computes as if uncompiled.
        dynamo: Any = importlib.import_module("torch._dynamo.config")
        dynamo.cache_size_limit = max(dynamo.cache_size_limit, MOST_COMPILATIONS)
        self._compiled = torch.compile(self.evaluate, backend=backend, dynamic=False)

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        """Denoise `x: [B, ...]` at `sigma: [B]` under `cond`; of a flow map, for a step that ends at `s: [B]`."""
        return self.hand_on(self._compiled(x, sigma, cond, s))


@dataclass(frozen=True, eq=False)
class _Graph:
    """A recorded evaluation: the tensors that it reads and fills, and what runs it."""

    inputs: list[Tensor]
    outputs: Outputs
    replay: Callable[[], object]


class CudaGraphs(_OneFunction):
    """A denoiser whose evaluation is recorded once for every shape and then launched as a whole (CUDA graphs).

    What is saved is the time in which the CPU launches hundreds of kernels one by one: most for small batches and for
    small networks. Weights may change in place between evaluations, but not move.

    Args:
        denoiser: any callable `(x, sigma, cond) -> x0` on a GPU. It must not read a tensor on the CPU.
        record: records one evaluation; replaced in tests.

    Raises:
        ValueError: the denoiser is not on a GPU.
    """

    def __init__(self, denoiser: Callable[..., Tensor], *, record: Record | None = None) -> None:
        super().__init__(denoiser)
        device = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        if record is None and device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA GPU, but this model is on {device}: choose cuda_graph=false")
        self._record: Record = record or record_on_gpu
        self._graphs: dict[Any, _Graph] = {}

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        """Denoise `x: [B, ...]` at `sigma: [B]` under `cond`; of a flow map, for a step that ends at `s: [B]`.

        Raises:
            RuntimeError: gradients are enabled.
            ValueError: the evaluation cannot be recorded.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a CUDA graph computes no gradients: sample under torch.no_grad(), or without CudaGraphs"
            )
        parts = [] if cond is None else list(cond.values()) if isinstance(cond, dict) else [cond]
        given = [x, sigma, *([] if s is None else [s]), *parts]
        names = tuple(cond) if isinstance(cond, dict) else ()
        kind = x.device.type
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        key = (names, s is None, autocast, *((t.shape, t.dtype, t.device) for t in given))
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            graph = self._graphs[key] = self._recorded(given, names, told=s is not None)
        for static, tensor in zip(graph.inputs, given, strict=True):
            static.copy_(tensor)
        graph.replay()
        denoised, features = graph.outputs
        # Copies, since solvers keep past evaluations and the next replay fills the same memory.
        kept = features.clone() if features is not None and self.wants_features else None
        return self.hand_on((denoised.clone(), kept))

    def _recorded(self, given: list[Tensor], names: tuple[str, ...], *, told: bool) -> _Graph:
        inputs = [tensor.clone() for tensor in given]
        x, sigma, *parts = inputs
        s = parts.pop(0) if told else None
        cond = dict(zip(names, parts, strict=True)) if names else parts[0] if parts else None
        kind = x.device.type

        def evaluate() -> Outputs:
            # Without autocast's cache: what it holds is freed when the caller leaves autocast, and would be read again.
            state = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
            with torch.autocast(kind, cache_enabled=False, **state):
                return self.evaluate(x, sigma, cond, s)

        # The streams of a recording are those of the current GPU.
        with torch.cuda.device(x.device) if kind == "cuda" else nullcontext():
            outputs, replay = self._record(evaluate)
        return _Graph(inputs, outputs, replay)


def record_on_gpu(evaluate: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], object]]:
    """Record a function of kernels on the current GPU.

    Raises:
        ValueError: the function waits for the GPU or copies from the CPU, which a graph cannot hold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # libraries set themselves up in their first calls
            evaluate()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = evaluate()
    except RuntimeError as error:
        raise ValueError(
            f"this model cannot be recorded as a CUDA graph ({one_line(error)}): choose cuda_graph=false"
        ) from error
    return outputs, graph.replay
