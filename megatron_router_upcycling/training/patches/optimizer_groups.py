"""Which learning rate an optimizer has after loading: the checkpoint's or this run's.

An optimizer's parameters are in groups, each with settings of its own. Megatron knows a saved group by all
of them, the learning rates among them, so that after a change of ``--lr`` it finds none. Here a group is
known by what kind of parameters it holds, and its rates are settings that the schedule's flags decide on.
"""

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.schedule import another_schedule

# What of Megatron's key is a setting, and the flags that set it: for all groups, and for those of
# --decoupled-lr (embedding and output layer).
RATES = {"max_lr": ("--lr", "--decoupled-lr"), "min_lr": ("--min-lr", "--decoupled-min-lr")}
SETTINGS = (*RATES, "start_wd", "end_wd")

type Group = dict[str, Any]


def kind(group: Group) -> tuple[Any, ...]:
    """What says which parameters ``group`` holds, experts or not."""
    return (
        has_own_rate(group),
        *(_get(group, key) for key in param_group_identifier_keys if key not in SETTINGS),
    )


def kind_but_expert(group: Group) -> tuple[Any, ...]:
    """``kind`` but for being experts, which differs between expert-parallel layouts."""
    return kind({name: value for name, value in group.items() if name != "is_expert_parallel"})


def has_own_rate(group: Group) -> bool:
    """Whether ``group`` has a learning rate other than the run's (--decoupled-lr, --use-mup)."""
    return not group.get("default_config", True)


def counterparts(
    current: list[Group], saved: list[Group], kind: Callable[[Group], Any] = kind
) -> Iterator[tuple[Group, Group | None]]:
    """Each of the ``current`` groups with the one of those ``saved`` that holds its parameters, or None.

    Groups of one kind that differ in their rates alone (``--use-mup``) are known by the order of these.
    """
    for group in current:
        own, others = (_rates_of(kind(group), groups, kind) for groups in (current, saved))
        if len(own) == len(others):
            rates = others[own.index(_rates(group))]
            yield group, next(s for s in saved if kind(s) == kind(group) and _rates(s) == rates)
        else:
            yield group, None


def settle(current: list[Group], saved: list[Group], follow: str | None) -> None:
    """Make the settings of groups and saved groups equal, in place.

    Args:
        current: all groups of this run's optimizers.
        saved: those of the checkpoint, which are about to be loaded.
        follow: whose settings both get: "run", "checkpoint", or None where they must be equal.
    """
    pairs = list(counterparts(current, saved))
    if any(other is None for _, other in pairs):
        raise other_groups()
    for group, other in sorted(pairs, key=lambda pair: has_own_rate(pair[0])):
        assert other is not None
        for name in SETTINGS:
            if (ours := group.get(name)) == (theirs := other.get(name)):
                continue
            if follow is None:
                flag = RATES[name][has_own_rate(group)] if name in RATES else name
                raise another_schedule(f"{flag} {ours}, and the checkpoint has {theirs}")
            if follow == "run":
                other[name] = ours
            else:
                group[name] = theirs


def other_groups() -> UserError:
    """The error for a run whose parameters are grouped otherwise than the checkpoint's."""
    return UserError(
        "--load: the checkpoint's optimizer has its parameters in other groups, as after a change of"
        " --decoupled-lr, --apply-wd-to-qk-layernorm or --use-mup; give these as the run before had them,"
        " or pass --no-load-optim to begin with a fresh optimizer and learning-rate schedule"
    )


def _get(group: Group, key: str) -> Any:
    return group.get(key, group.get(f"pre_{key}"))  # NeMo's name


def _rates(group: Group) -> tuple[float, ...]:
    return tuple(float("-inf") if (value := group.get(name)) is None else value for name in SETTINGS)


def _rates_of(wanted: Any, groups: list[Group], kind: Callable[[Group], Any]) -> list[tuple[float, ...]]:
    return sorted({_rates(group) for group in groups if kind(group) == wanted})
