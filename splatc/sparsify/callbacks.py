"""`SpionSchedule` in the loops of other libraries. These are imported when a callback is made."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splatc.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from splatc.sparsify.schedule import SpionSchedule


class Turns:
    """Which steps of training are evaluations: every ``every``-th, from the first multiple on, until the switch."""

    def __init__(self, schedule: SpionSchedule, every: int) -> None:
        if every < 1:
            raise InvalidInput(f"every is {every}: it must be at least 1")
        self.schedule, self.every, self.last = schedule, every, 0

    def begin(self, step: int) -> None:
        """Before step number ``step`` (steps done so far); again for micro-batches of one step does no harm."""
        if step != self.last and step % self.every == 0 and not self.schedule.switched:
            self.last = step
            self.schedule.start()

    def end(self, step: int) -> None:
        """After a step, or a micro-batch, with the number of steps done by then: an evaluation is all of its step."""
        if self.schedule.watching and step != self.last:
            self.schedule.finish()


def lightning_callback(schedule: SpionSchedule, every: int) -> Any:
    """A callback for Lightning's Trainer: every ``every``-th step of the optimizer is an evaluation, over all its
    micro-batches (accumulate_grad_batches) but not over a validation amid them. Checkpoints hold the schedule's state.
    Raises Unsupported without lightning or pytorch_lightning."""
    turns = Turns(schedule, every)
    base: Any = _found(("lightning.pytorch", "Callback"), ("pytorch_lightning", "Callback"))

    class SpionCallback(base):  # type: ignore[misc]
        __qualname__ = "SpionCallback"  # what checkpoints call it

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            turns.begin(trainer.global_step)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            turns.end(trainer.global_step)

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            schedule.pause()

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            schedule.pause(False)

        def state_dict(self) -> dict[str, Any]:
            return schedule.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            schedule.load_state_dict(state_dict)

    return SpionCallback()


def trainer_callback(schedule: SpionSchedule, every: int) -> Any:
    """A callback for Hugging Face's Trainer: every ``every``-th step is an evaluation, over all its micro-batches. The
    trainer saves no state of callbacks but small numbers: after a resumption, watching begins anew, while patterns
    that were found come back with the model. Raises Unsupported without transformers."""
    turns = Turns(schedule, every)
    base: Any = _found(("transformers", "TrainerCallback"))

    class SpionCallback(base):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            turns.begin(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            turns.end(state.global_step)

    return SpionCallback()


def _found(*places: tuple[str, str]) -> Any:
    for module, name in places:
        try:
            return getattr(import_module(module), name)
        except ImportError:
            continue
    raise Unsupported(f"this callback needs {places[0][0].split('.')[0]}: install it, or use SpionSchedule.watch()")
