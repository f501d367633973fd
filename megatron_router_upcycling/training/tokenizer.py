"""Which tokenizer a run takes: the one asked for, else the one that stands beside its checkpoint."""

from argparse import Namespace
from pathlib import Path

from megatron_router_upcycling.checkpoint import beside

FLAG = "--tokenizer-model"


def choose(args: Namespace, argv: list[str], load: str | None) -> str | None:
    """Set ``args``' tokenizer to that beside ``load`` where no other is there; a line to say so.

    A path in a YAML file that leads nowhere, as after its folder was moved, counts as none; one given as a
    flag stands.
    """
    named = args.tokenizer_model
    if load is None or any(part == FLAG or part.startswith(f"{FLAG}=") for part in argv):
        return None
    found = None if named and Path(named).exists() else beside.tokenizer_in(Path(load))
    if found is None or args.tokenizer_type not in (None, found[0]):
        return None
    args.tokenizer_type, args.tokenizer_model = found[0], str(found[1])
    return f"tokenizer: {found[1]}" + (f", for {named} is not there" if named else "")


def hand_on(args: Namespace, load: str | None, save: str) -> None:
    """Link the tokenizer, and what else stands beside ``load``, to the checkpoints that this run saves."""
    places = [Path(place) for place in (args.tokenizer_model, load and Path(load) / beside.FOLDER) if place]
    place = next((place for place in places if place.exists()), None)
    if place:
        beside.hand_on(place, Path(save))
