"""Stubs that stand in for a model's decoder blocks, so that its own forward can be run without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

StubHandler = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Any]
"""Called in the place of a block with its layer, the states that enter it, and its other arguments."""


class StopForward(Exception):
    """Leaves the model's forward at a stub, with the states that entered it."""

    def __init__(self, entering: Tensor):
        self.entering = entering


class StubSwitch:
    """What all stubs of one model do at present."""

    def __init__(self) -> None:
        self.handler: StubHandler | None = None

    @contextmanager
    def to(self, handler: StubHandler) -> Iterator[None]:
        """Let `handler` answer for the blocks inside the context."""
        self.handler = handler
        try:
            yield
        finally:
            self.handler = None


class BlockStub(nn.Module):
    """Stands in for the block of one layer. What models ask of their blocks beside a forward, the block answers."""

    def __init__(self, block: nn.Module, layer: int, switch: StubSwitch):
        super().__init__()
        # not as attributes of the Module, so that the block's tensors are not the model's any more
        object.__setattr__(self, "_stand_in", (block, layer, switch))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stand_in[0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the handler says the block returns."""
        _, layer, switch = self._stand_in
        assert switch.handler is not None, "stubs are only called through StreamedModel"
        return switch.handler(layer, hidden_states, args, kwargs)
