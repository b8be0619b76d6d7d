"""LayerHooks: inputs and output gradients of layers, from one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hf_iau.curvature.layers import Call, Layer
from hf_iau.errors import UnsupportedModelError


class LayerHooks:
    """Hooks on layers, removed on leaving the context.

    Inputs are kept by the hook of the call that they belong to, and a (input, output gradient) pair is recorded when
    that call's graph is differentiated. So activation checkpointing, which runs forward twice, counts once, and a
    module that is called several times in a forward pass gives one pair a call.

    The gradient hook sits on the output *tensor*: it sees the gradient of the layer's own output even when an
    activation changes that tensor in place afterwards. An output that is a view is copied first, because an in-place
    change of a view takes the hook out of the graph.

    Args:
        model: the model.
        layers: the layers to listen to.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.model = model
        self.layers = list(layers)
        self.needs_backward = False
        self._calls: dict[str, list[Call]] = {}
        self._open: dict[str, int] = {}  # calls that have not been differentiated yet
        self._take: Callable[[Layer, list[Call]], None] | None = None
        self._edges: list[GradientEdge] = []
        self._handles: list[Any] = []
        self.unreadable: dict[str, str] = {}

    def __enter__(self) -> LayerHooks:
        for layer in self.layers:
            self._handles.append(layer.module.register_forward_hook(self._hook(layer), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()

    def run(
        self, loss: Callable[[], Tensor], take: Callable[[Layer, list[Call]], None] | None = None
    ) -> dict[str, list[Call]]:
        """Evaluate `loss()` and differentiate it.

        Args:
            loss: runs the model forward and returns a scalar.
            take: is given the calls of a layer as soon as all of them are differentiated, while differentiation goes
                on, so that those of all layers are not held at once.

        Returns:
            The calls of each layer, by layer name, in the order in which they were differentiated, but for those that
            were taken; layers that the loss does not depend on are absent.
        """
        self._clear()
        self._take = take
        value = loss()
        if value.requires_grad:
            if self.needs_backward or not self._edges:
                # Re-entrant checkpointing works with `backward` only.
                value.backward()
                for parameter in self.model.parameters():
                    parameter.grad = None
            else:
                # Down to the layers' outputs: no gradient of a weight is ever formed.
                torch.autograd.grad(value, _last_of(self._edges, value), allow_unused=True)
        calls = self._calls
        self._clear()
        return calls

    def _clear(self) -> None:
        self._calls, self._open, self._edges = {}, {}, []
        self.needs_backward, self._take = False, None

    def _hook(self, layer: Layer) -> Callable[..., Tensor | None]:
        def after_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Tensor | None:
            if not torch.is_grad_enabled():
                self.needs_backward = True
                return None
            if not self.needs_backward and torch._C._current_graph_task_id() != -1:
                return None  # recomputed in the backward pass: this call was seen in the forward pass
            source = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(source, Tensor) or not isinstance(output, Tensor):
                self.unreadable[layer.name] = "its input or output is not a tensor"
                return None
            if not output.requires_grad:
                return None
            copied = output._is_view()
            if copied:
                output = output.clone()
            inputs = [source.detach()]  # handed on below, for the hook itself lives as long as the graph
            version = source._version

            def after_backward(gradient: Tensor) -> None:
                source = inputs.pop()
                if source._version != version:
                    raise UnsupportedModelError(
                        f"The input of layer {layer.name!r} was changed in place after the layer had used it, so its "
                        "curvature cannot be measured. Make that operation out of place."
                    )
                self._calls.setdefault(layer.name, []).append((source, gradient.detach()))
                self._open[layer.name] -= 1
                # Re-entrant checkpointing tells of a layer's next call only when it comes to it.
                if self._take is not None and not self.needs_backward and not self._open[layer.name]:
                    self._take(layer, self._calls.pop(layer.name))

            self._open[layer.name] = self._open.get(layer.name, 0) + 1
            output.register_hook(after_backward)
            self._edges.append(get_gradient_edge(output))
            return output if copied else None

        return after_forward


def _last_of(edges: Sequence[GradientEdge], value: Tensor) -> list[GradientEdge]:
    """Those of `edges` from which differentiation of `value` leads to no other: it goes through all on the way to them.

    What is asked for is held until the end, so the fewer and (with LoRA) the narrower the better.
    """
    ends = {edge.node for edge in edges}
    leads: dict[Any, bool] = {}  # whether a node's inputs lead to one of the ends
    stack: list[Any] = [get_gradient_edge(value).node]
    while stack:
        node = stack[-1]
        below = [other for other, _ in node.next_functions if other is not None]
        unseen = [other for other in below if other not in leads]
        if node not in leads and unseen:
            stack += unseen
            continue
        leads.setdefault(node, any(other in ends or leads[other] for other in below))
        stack.pop()
    return [edge for edge in edges if not leads.get(edge.node, False)]


def parameter_gradients(loss: Tensor, parameters: Sequence[nn.Parameter], *, backward: bool) -> list[Tensor | None]:
    """Gradients of `loss` for some parameters (None where it does not depend on one).

    Args:
        loss: a scalar.
        parameters: the parameters.
        backward: go through `backward` and the parameters' `.grad`, for re-entrant checkpointing.
    """
    if not loss.requires_grad:
        return [None] * len(parameters)
    if not backward:
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients
