"""Hand a prepared run to Megatron's training loop."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_router_upcycling.errors import os_error_as
from megatron_router_upcycling.training.launch import Run

# File in --save that says running, stopped (saved before its end: a signal, --exit-*) or finished.
# Scripts that restart a run need it, because torchrun does not pass on the exit status.
RUN_STATE = "run_state"
RESTART_TO_TELL_CAUSE = 16  # exit status of Megatron's rerun state machine, which saved and wants a restart


def model_config(run: Run) -> Any:
    """Megatron's configuration of the model, with the router in its layer spec."""
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_router_upcycling.training.objections import megatrons_objection

    with megatrons_objection(run.args):
        model = gpt_config_from_args(run.args)
    if run.router is not None and run.args.spec is None:
        from megatron_router_upcycling.training.layer_spec import layer_spec_for

        model.transformer_layer_spec = layer_spec_for(run.router)
    return model


def build(args: Namespace, model: Any) -> tuple[list[Any], Any, Any]:
    """Build this rank's model chunks, their optimizer and its schedule, as Megatron's ``pretrain`` does."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    training.initialize_megatron()  # looked up in the module, where the CPU backend replaces it
    return training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model),
        checkpointing_context={},
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def train(run: Run) -> None:
    """Hand a prepared run to ``megatron.training.pretrain``."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_router_upcycling.training import language_model, objections
    from megatron_router_upcycling.training.run_log.listener import RunLog

    model = model_config(run)
    with objections.megatrons_objection(run.args, raised_by_megatron=True):
        container = pretrain_cfg_container_from_args(run.args, model)
    RunLog(run.args).install()
    objections.install(run.args)
    _write_state(run.args, "running")
    try:
        pretrain(
            container,
            language_model.datasets_provider,
            ModelType.encoder_or_decoder,
            language_model.forward_step,
            get_embedding_ranks=language_model.embedding_ranks if run.args.mtp_num_layers else None,
        )
    except SystemExit as ended:
        if ended.code in (None, 0, RESTART_TO_TELL_CAUSE):
            _write_state(run.args, "stopped")
            _leave(run.args)
        raise
    _write_state(run.args, "finished")
    _leave(run.args)


def _leave(args: Namespace) -> None:
    """End Gloo's threads: left to the interpreter's end, they have aborted runs that were finished."""
    import torch

    if args.distributed_backend == "gloo":  # NCCL's end can wait for CUDA graphs
        torch.distributed.destroy_process_group()


def _write_state(args: Namespace, state: str) -> None:
    if args.save and args.rank == 0:
        with os_error_as(f"--save {args.save}: {RUN_STATE} cannot be written"):
            Path(args.save).mkdir(parents=True, exist_ok=True)
            (Path(args.save) / RUN_STATE).write_text(f"{state}\n", encoding="utf-8")
