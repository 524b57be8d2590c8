"""GraphedBackward: what happens around a capture, with one that runs its function again instead of replaying it."""

import dataclasses

import pytest
import torch

from bitnet.training.config import TrainConfig
from bitnet.training.graphs import WARM_UP, GraphedBackward
from tests.builders import random_ids, tiny_model


class Again:
    """A capture on a CPU. Like a graph it writes loss and gradients where they were when it was captured."""

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = 0

    def warm_up(self, call):
        return call()

    def capture(self, call):
        self.captures += 1
        self.call, self.loss = call, call()
        self.gradients = [parameter.grad for parameter in self.parameters]
        for value in (self.loss, *self.gradients):
            value.fill_(torch.nan)  # nothing has run yet
        return self.loss

    def replay(self) -> None:
        self.replays += 1
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self.loss.copy_(self.call())
        for parameter, mine, known in zip(self.parameters, self.gradients, before, strict=True):
            mine.copy_(parameter.grad)
            parameter.grad = known


@pytest.fixture
def steps():
    """The model, its backward, and the graphs that were made."""
    model = tiny_model(num_hidden_layers=1)
    parameters, made = list(model.parameters()), []

    def backward(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        loss = model.loss(ids, ids) * weight
        loss.backward()
        return loss.detach()

    def recorded(device: torch.device) -> Again:
        made.append(Again(device))
        made[-1].parameters = parameters
        return made[-1]

    return model, backward, GraphedBackward(backward, parameters, recorded), made


def results(model, work, parts) -> torch.Tensor:
    """Losses and gradients of a step of micro-batches, whose weights are 1, 2, ..."""
    model.zero_grad(set_to_none=True)
    losses = [work(torch.tensor(float(number)), part) for number, part in enumerate(parts, 1)]
    return torch.cat([torch.stack(losses), *(parameter.grad.flatten() for parameter in model.parameters())]).clone()


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_every_step_has_the_gradient_of_its_own_batch(steps, micro_batches) -> None:
    model, backward, graphed, made = steps
    for step in range(6):
        parts = [random_ids(model.config, 2, 8) for part in range(micro_batches)]
        wanted = results(model, backward, parts)
        found = results(model, lambda *tensors: graphed(1, micro_batches == 1, *tensors), parts)
        assert torch.equal(found, wanted), step
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-0.1)  # in place, as optimizers do
    (graph,) = made
    assert (graph.captures, graph.replays) == (1, 6 * micro_batches - WARM_UP)


def test_another_phase_or_shape_is_another_graph(steps) -> None:
    model, backward, graphed, made = steps
    for phase, shape in ((0, (2, 8)), (1, (2, 8)), (1, (1, 8)), (0, (2, 8))):
        for _ in range(WARM_UP + 2):
            parts = [random_ids(model.config, *shape)]
            found = results(model, lambda *tensors, phase=phase: graphed(phase, True, *tensors), parts)
            assert torch.equal(found, results(model, backward, parts))
    assert [(graph.captures, graph.replays) for graph in made] == [(1, 2)] * 4


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_cannot_be_captured_goes_on_kernel_by_kernel(steps, capsys, micro_batches) -> None:
    model, backward, graphed, made = steps

    def refuse(self, call):
        call()
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    for _ in range(5):
        parts = [random_ids(model.config, 2, 8) for part in range(micro_batches)]
        wanted = results(model, backward, parts)
        for graph in made:
            graph.capture = refuse.__get__(graph)
        found = results(model, lambda *tensors: graphed(1, micro_batches == 1, *tensors), parts)
        assert torch.equal(found, wanted)
    assert graphed.refused
    assert capsys.readouterr().err.count("operation not permitted when stream is capturing") == 1


def test_graphs_are_refused_where_there_are_none() -> None:
    gpu = torch.device("cuda", 0)
    TrainConfig(graphs=True).check_graphs(gpu, "none", False)
    for config, device, strategy, borders, where in (
        (TrainConfig(graphs=True), torch.device("cpu"), "none", False, "on cpu"),
        (TrainConfig(graphs=True), gpu, "fsdp", False, "several processes"),
        (TrainConfig(graphs=True), gpu, "none", True, "documents"),
        (TrainConfig(graphs=True, recompute=True), gpu, "none", False, "with recompute"),
    ):
        with pytest.raises(ValueError, match=rf"not .*{where}.*; give --no-graphs"):
            config.check_graphs(device, strategy, borders)
        dataclasses.replace(config, graphs=False).check_graphs(device, strategy, borders)
