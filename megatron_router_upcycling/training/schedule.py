"""Learning rates: the paper's schedule as an addition to Megatron's, and which rates a resumed run uses.

``--lr-decay-style warmup-step-decay`` (section 4.1): linear warm-up (``--lr-warmup-fraction 0.01`` in the
paper), constant, x0.316 at 80% of ``--lr-decay-iters`` and x0.316 again at 90%.

Megatron matches a saved parameter group by all of its settings, learning rates included, so that after a
change of ``--lr`` no group matches. Here a group is matched by the kind of parameters that it holds, and the
schedule's flags decide whether its rates come from the checkpoint or from this run.
"""

from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import arguments, training

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.patches import patching

STYLE = "warmup-step-decay"
STEPS_AT = (0.8, 0.9)
FACTOR = 0.316
# The settings in Megatron's key of a group, and the flags that set them: for all groups, and for the groups
# of --decoupled-lr (embedding and output layer).
RATES = {"max_lr": ("--lr", "--decoupled-lr"), "min_lr": ("--min-lr", "--decoupled-min-lr")}
SETTINGS = (*RATES, "start_wd", "end_wd")

type Group = dict[str, Any]


def install() -> None:
    """Add the style to every parser that Megatron makes, and make Megatron build ``StepDecayScheduler``."""
    patching.wrap("schedule", arguments, "add_megatron_arguments", _offer_style)
    patching.replace("schedule", training, "OptimizerParamScheduler", StepDecayScheduler)


def _offer_style(add_arguments: Callable[..., Any], parser: ArgumentParser) -> ArgumentParser:
    extended = add_arguments(parser)
    action = extended._option_string_actions["--lr-decay-style"]
    action.choices = (*action.choices, STYLE)
    return extended


class StepDecayScheduler(OptimizerParamScheduler):
    """Megatron's scheduler with one more decay style, and a UserError if it does not fit the checkpoint's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        follows_wsd = self.use_checkpoint_opt_param_scheduler and state_dict.get("lr_decay_style") == "WSD"
        if follows_wsd and self.wsd_decay_steps is None:
            raise UserError(
                "--lr-wsd-decay-iters: is missing; the checkpoint's schedule, which"
                " --use-checkpoint-opt-param-scheduler follows, has --lr-decay-style WSD"
            )
        try:
            super().load_state_dict(state_dict)
        except AssertionError as error:
            raise _another_schedule(str(error).replace("checkpointvalue", "checkpoint value")) from None
        self.step(0)  # Megatron set this step's weight decay before it loaded the checkpoint's

    def get_lr(self, param_group: Group) -> float:
        """Learning rate for a parameter group at ``self.num_steps`` (counted in samples)."""
        warming_up = self.lr_warmup_steps > 0 and self.num_steps <= self.lr_warmup_steps
        if self.lr_decay_style != STYLE or warming_up:
            return super().get_lr(param_group)
        done = self.num_steps / self.lr_decay_steps
        passed = sum(done >= step for step in STEPS_AT)
        max_lr = param_group.get("max_lr", self.max_lr)
        return max(max_lr * FACTOR**passed, param_group.get("min_lr", self.min_lr))


def _another_schedule(difference: str) -> UserError:
    return UserError(
        "the checkpoint was saved with another learning-rate schedule, as after a change of --lr or"
        f" --train-iters ({difference}; iterations count in samples); pass --override-opt-param-scheduler to"
        " continue with the new schedule, or --use-checkpoint-opt-param-scheduler with the old one"
    )


def kind(group: Group) -> tuple[Any, ...]:
    """A key for the kind of parameters that ``group`` holds. NeMo's names of entries begin with pre_."""
    keys = [key for key in param_group_identifier_keys if key not in SETTINGS]
    return _has_own_rate(group), *(group.get(key, group.get(f"pre_{key}")) for key in keys)


def kind_but_expert(group: Group) -> tuple[Any, ...]:
    """``kind`` without ``is_expert_parallel``, which differs between expert-parallel layouts."""
    return kind({name: value for name, value in group.items() if name != "is_expert_parallel"})


def _has_own_rate(group: Group) -> bool:
    """Whether ``group`` has a learning rate other than the run's (--decoupled-lr, --use-mup)."""
    return not group.get("default_config", True)


def counterparts(
    current: list[Group], saved: list[Group], kind: Callable[[Group], Any] = kind
) -> list[Group]:
    """For each of the ``current`` groups, the group of ``saved`` that holds its parameters.

    Groups of one kind that differ only in their rates (``--use-mup``) are matched in the order of the rates.
    """
    found = []
    for group in current:
        own, others = (
            sorted({_rates(g) for g in groups if kind(g) == kind(group)}) for groups in (current, saved)
        )
        if len(own) != len(others):
            raise UserError(
                "--load: the checkpoint's optimizer has its parameters in other groups, as after a change of"
                " --decoupled-lr, --apply-wd-to-qk-layernorm or --use-mup; give these as in the earlier run,"
                " or pass --no-load-optim to begin with a fresh optimizer and learning-rate schedule"
            )
        rates = others[own.index(_rates(group))]
        found.append(next(s for s in saved if kind(s) == kind(group) and _rates(s) == rates))
    return found


def _rates(group: Group) -> tuple[float, ...]:
    return tuple(float("-inf") if (value := group.get(name)) is None else value for name in SETTINGS)


def settle(current: list[Group], saved: list[Group], follow: str | None) -> None:
    """Make the settings of the current and the saved groups, which are about to be loaded, equal in place.

    ``follow`` says which settings both get: "run", "checkpoint", or None if they must be equal already.
    """
    pairs = list(zip(current, counterparts(current, saved), strict=True))
    for group, other in sorted(pairs, key=lambda pair: _has_own_rate(pair[0])):
        for name in SETTINGS:
            if (ours := group.get(name)) == (theirs := other.get(name)):
                continue
            if follow is None:
                flag = RATES[name][_has_own_rate(group)] if name in RATES else name
                raise _another_schedule(f"{flag} {ours}, and the checkpoint has {theirs}")
            if follow == "run":
                other[name] = ours
            else:
                group[name] = theirs
