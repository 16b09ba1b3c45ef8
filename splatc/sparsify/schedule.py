"""SPION's transition: when a model's layers change from dense attention to patterns found in it, and the change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from splatc.errors import InvalidInput
from splatc.sparsify.layer import SpionAttention
from splatc.sparsify.spion import Found, check_options, find_pattern

log = logging.getLogger(__name__)


class SpionSchedule:
    """Watches the attention of every `SpionAttention` of a model and switches all of them once it has settled.

        schedule = SpionSchedule(model, block=64, quantile=0.98)
        for step, x in enumerate(batches):
            if step % 500 == 0 and not schedule.switched:
                with schedule.watch():
                    model(x).mean().backward()
            ...

    The switch comes at the end of a `watch`; a backward pass that runs layers again (activation checkpoints) has to be
    inside, or it would run others.

    What a `watch` sees is an evaluation: each layer's mean attention A_t. Of two in a row it takes the distance d_t =
    ||A_t - A_{t-1}||_F. When |d_t - d_{t-1}| < change * d_{t-1} in every layer, which the third evaluation is the first
    to tell, layers get the patterns of `find_pattern`. (SPION's public code takes d_3 between the first evaluation and
    the third; here it is always the last two.) A model is changed in place and keeps its parameters, so the optimizer
    goes on as it was; a learning rate that should start again can do so in ``on_switch``.

    The patterns are part of the model's ``state_dict``; this one's has what it takes to go on watching. With
    ``torch.distributed``, every process watches, and maps are averaged over the calls of all, however many each has.
    """

    def __init__(self, model: torch.nn.Module, *, block: int = 64, quantile: float = 0.98, filter: int = 31,
                 variant: str = "CF", density: float | None = None, per_head: bool = False, change: float = 0.15,
                 pictures: str | Path | None = None,
                 on_switch: Callable[[dict[str, Found]], None] | None = None) -> None:  # fmt: skip
        """block ... per_head: as of `find_pattern`. change: the share by which distances may still change. pictures: a
        folder for a picture of each layer's maps at the switch (needs matplotlib). on_switch: called after the switch
        with what was found, by the layers' names. Raises InvalidInput for a model without a `SpionAttention`."""
        self.layers = {name: one for name, one in model.named_modules() if isinstance(one, SpionAttention)}
        if not self.layers:
            raise InvalidInput(f"{type(model).__name__} has no SpionAttention: build it with these layers")
        if not change > 0:
            raise InvalidInput(f"change is {change}: it must be above 0")
        check_options(block, quantile, filter, variant, density)
        self.find = partial(find_pattern, block=block, quantile=quantile, filter=filter, variant=variant,
                            density=density, per_head=per_head)  # fmt: skip
        self.per_head = per_head
        self.change, self.on_switch = change, on_switch
        self.pictures = None if pictures is None else Path(pictures)
        self.distances: list[dict[str, float]] = []
        self._maps: dict[str, torch.Tensor] = {}
        self.watching = False

    @property
    def switched(self) -> bool:
        """Whether the layers attend by blocks."""
        return all(layer.blocks is not None for layer in self.layers.values())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """An evaluation: the model's calls inside, in training or not. It may end with the switch."""
        self.start()
        try:
            yield
        except BaseException:
            self.cancel()
            raise
        self.finish()

    def start(self) -> None:
        """Begin an evaluation; `watch` in two halves, for callbacks."""
        if self.switched:
            raise InvalidInput("the layers have been switched already: there is nothing left to watch")
        self.watching = True
        for layer in self.layers.values():
            layer.watch(self.per_head)

    def cancel(self) -> None:
        """Forget the evaluation that was begun."""
        self.watching = False
        for layer in self.layers.values():
            layer.unwatch()

    def pause(self, paused: bool = True) -> None:
        """Leave out the model's calls from now on (of a validation amid a step, say), until ``pause(False)``."""
        for layer in self.layers.values():
            layer.paused = paused

    def finish(self) -> bool:
        """End an evaluation: measure distances, and switch if they have settled. Whether it did."""
        self.watching = False
        seen = {name: layer.watched() for name, layer in self.layers.items()}
        maps = {name: one for name, one in seen.items() if one is not None}
        if len(maps) < len(seen):
            missing = next(name for name in seen if name not in maps)
            raise InvalidInput(f"layer {missing!r} was not called while watched: call the whole model, not traced")
        before, self._maps = self._maps, maps
        if not before:
            return False
        for name, one in maps.items():
            if one.shape != before[name].shape:
                shapes = tuple(one.shape), tuple(before[name].shape)
                raise InvalidInput(f"layer {name!r} saw {shapes[0]} after {shapes[1]}: watch sequences of one length")
        self.distances.append({name: _distance(one, before[name]) for name, one in maps.items()})
        log.info("distances of attention: %s", self.distances[-1])
        if len(self.distances) < 2 or not settled(self.distances[-2], self.distances[-1], self.change):
            return False
        self.switch()
        return True

    def switch(self) -> dict[str, Found]:
        """Switch now, to the patterns of the last evaluation; what was found, by the layers' names."""
        if not self._maps:
            raise InvalidInput("nothing has been watched yet: there is no map to find patterns in")
        found = {name: self.find(one) for name, one in self._maps.items()}
        for name, layer in self.layers.items():
            layer.switch(found[name].pattern)
        self._maps = {}
        if self.pictures is not None and _is_first_process():
            draw_all(found, self.pictures)
        if self.on_switch is not None:
            self.on_switch(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The last maps and all distances. Patterns are in the model's own."""
        return {"maps": {name: one.cpu() for name, one in self._maps.items()}, "distances": list(self.distances)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``; load the model's, too."""
        if set(state["maps"]) - set(self.layers):
            raise InvalidInput(f"the state is of layers {sorted(state['maps'])}, the model has {sorted(self.layers)}")
        self._maps, self.distances = dict(state["maps"]), list(state["distances"])


def settled(before: dict[str, float], now: dict[str, float], change: float) -> bool:
    """Whether the distance of every layer changed by less than this share."""
    return all(d == before[name] or abs(d - before[name]) < change * before[name] for name, d in now.items())


def draw_all(found: dict[str, Found], folder: Path) -> None:
    """A picture for each layer, and for each head that has its own map: <layer>.png or <layer>_head<h>.png."""
    from splatc.draw.maps import save_maps

    folder.mkdir(parents=True, exist_ok=True)
    for name, one in found.items():
        for head, maps in enumerate(one.maps):
            suffix = f"_head{head}" if len(one.maps) > 1 else ""
            save_maps(maps, folder / f"{name or 'attention'}{suffix}.png", title=f"{name}{suffix}")


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b.to(a.device).double()))


def _is_first_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
