"""The paper's learning-rate schedule beside Megatron's own: warm-up, then two steps down (section 4.1).

``--lr-decay-style warmup-step-decay``: linear warm-up (``--lr-warmup-fraction 0.01`` in the paper), constant,
x0.316 at 80% of ``--lr-decay-iters`` and x0.316 again at 90%.
"""

from argparse import ArgumentParser
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import training

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.patches import patching

STYLE = "warmup-step-decay"
STEPS_AT = (0.8, 0.9)
FACTOR = 0.316


class StepDecayScheduler(OptimizerParamScheduler):
    """Megatron's scheduler with one more decay style, and one line where it does not fit a checkpoint's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint's schedule stopped.

        Raises:
            UserError: this run's schedule is another one, and no flag says which of the two to follow.
        """
        if (
            self.use_checkpoint_opt_param_scheduler
            and state_dict.get("lr_decay_style") == "WSD"
            and self.wsd_decay_steps is None
        ):
            raise UserError(
                "--lr-wsd-decay-iters: is missing; the checkpoint's schedule, which"
                " --use-checkpoint-opt-param-scheduler follows, has --lr-decay-style WSD"
            )
        try:
            super().load_state_dict(state_dict)
        except AssertionError as error:
            raise another_schedule(str(error).replace("checkpointvalue", "checkpoint value")) from None
        self.step(0)  # Megatron has set this step's weight decay before it took the checkpoint's

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Learning rate for a parameter group at ``self.num_steps`` (counted in samples)."""
        warming_up = self.lr_warmup_steps > 0 and self.num_steps <= self.lr_warmup_steps
        if self.lr_decay_style != STYLE or warming_up:
            return super().get_lr(param_group)
        done = self.num_steps / self.lr_decay_steps
        passed = sum(done >= step for step in STEPS_AT)
        max_lr = param_group.get("max_lr", self.max_lr)
        return max(max_lr * FACTOR**passed, param_group.get("min_lr", self.min_lr))


def another_schedule(difference: str) -> UserError:
    """The error for a run that is resumed with another schedule than its checkpoint's, and no flag for it."""
    return UserError(
        "the checkpoint was saved with another learning-rate schedule, as after a change of --lr or"
        f" --train-iters ({difference}; iterations count in samples); pass --override-opt-param-scheduler to"
        " continue with the new schedule, or --use-checkpoint-opt-param-scheduler with the old one"
    )


def install(parser: ArgumentParser) -> None:
    """Offer the style under ``--lr-decay-style`` and let Megatron build the scheduler that knows it."""
    action = parser._option_string_actions["--lr-decay-style"]
    styles = tuple(action.choices or ())
    if STYLE not in styles:
        action.choices = (*styles, STYLE)
    patching.replace("schedule", training, "OptimizerParamScheduler", StepDecayScheduler)
