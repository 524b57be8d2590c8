"""Forward and backward of a micro-batch as one CUDA graph: a launch instead of a thousand.

    graphed = GraphedBackward(backward, parameters)
    loss = graphed(phase, alone, input_ids, labels)     as backward(input_ids, labels), gradients and all

Small models and batches train as fast as the host launches kernels, and a GPU waits for it; a graph is replayed at the
GPU's own speed. The kernels are the same ones, so are their numbers.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from bitnet.console import note

WARM_UP = 3
"""Calls that run kernel by kernel before a capture: they compile, and let libraries allocate what they work in."""


class Recorded:
    """Calls of a function without arguments that are captured once, on a stream of its own, and replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        """The call, on the stream of the capture."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def capture(self, call: Callable[[], Tensor]) -> Tensor:
        """Record the call, which does not run; what it returns is where replays write."""
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            return call()

    def replay(self) -> None:
        assert self.graph is not None
        self.graph.replay()


class GraphedBackward:
    """`backward(*tensors)`, which returns a loss `[]` and adds to the parameters' gradients, from its fourth call on as
    a graph. The tensors' shapes and what else the kernels depend on, the `phase`, may change: there is a graph for the
    last of them. What cannot be captured goes on kernel by kernel, and a note says so."""

    def __init__(
        self,
        backward: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        recorded: Callable[[torch.device], Recorded] = Recorded,
    ) -> None:
        self.backward = backward
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.recorded = recorded
        self.refused = False
        """Whether it was found that this backward cannot be captured."""
        self._key: Hashable = None
        self._calls = 0
        self._graph: Recorded | None = None
        self._tensors: tuple[Tensor, ...] = ()
        self._gradients: list[Tensor | None] = []

    def __call__(self, phase: Hashable, alone: bool, *tensors: Tensor) -> Tensor:
        """The loss; `alone` says that no other micro-batch adds to the gradients of this step."""
        if self.refused:
            return self.backward(*tensors)
        key = phase, *((tensor.shape, tensor.dtype) for tensor in tensors)
        if key != self._key:
            self._forget(key)
        self._calls += 1
        if self._graph is None:
            self._graph = self.recorded(tensors[0].device)
        if self._calls <= WARM_UP:
            return self._graph.warm_up(lambda: self.backward(*tensors))
        if self._calls == WARM_UP + 1 and not self._capture(tensors):
            return self.backward(*tensors)
        for ours, theirs in zip(self._tensors, tensors, strict=True):
            ours.copy_(theirs, non_blocking=True)
        self._graph.replay()
        self._add_gradients(alone)
        return self._loss.clone()

    def _forget(self, key: Hashable) -> None:
        """Give back what the last graph holds, most of all its memory."""
        self._key, self._calls = key, 0
        self._graph, self._tensors, self._gradients = None, (), []
        self._loss = torch.empty(0)

    def _capture(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it could be captured. Gradients of the step so far stay."""
        assert self._graph is not None
        self._tensors = tuple(tensor.clone() for tensor in tensors)
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        try:
            self._loss = self._graph.capture(lambda: self.backward(*self._tensors))
            self._gradients = [parameter.grad for parameter in self.parameters]
        except RuntimeError as error:
            note(f"a step is no CUDA graph here and runs kernel by kernel: {str(error).strip().splitlines()[0]}")
            self._forget(None)
            self.refused = True
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient
        return not self.refused

    def _add_gradients(self, alone: bool) -> None:
        """Hand the graph's gradients to the parameters: the tensors themselves, which the next replay writes anew, or,
        where more micro-batches follow, copies."""
        known, new = list[Tensor](), list[Tensor]()
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient if alone else gradient.clone()
            else:
                known.append(parameter.grad)
                new.append(gradient)
        if known:
            torch._foreach_add_(known, new)
