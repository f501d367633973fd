"""Hooks in Megatron's training loop that write losses and routing statistics to files and Megatron's loggers.

``install`` wraps five functions of ``megatron.training.training``: ``setup_model_and_optimizer`` (the model
was built), ``train_step``, ``training_log`` (an iteration is over), ``evaluate_and_print_results`` and
``evaluate``.
"""

import inspect
import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_router_upcycling.errors import os_error_as
from megatron_router_upcycling.training.patches import patching
from megatron_router_upcycling.training.run_log import files
from megatron_router_upcycling.training.run_log.collector import RoutingCollector

# Parameters of training_log that are read here.
READ = ("iteration", "loss_dict", "total_loss_dict", "learning_rate", "grad_norm", "skipped_iter")
RARELY = 10  # RARE measures are on every tenth routing line, and on the first and the last
# Megatron's loggers, and the beginnings of their warnings that the user cannot act on.
QUIET = {
    "megatron.core.tensor_parallel.random": "CPU RNG state changed",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.rerun_state_machine": "Setting RerunStateMachine mode",
}


class RunLog:
    """One run's listener; ``install`` once, before ``megatron.training.pretrain``."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.save = Path(args.save) if args.save else None
        self.interval = args.routing_diagnostics_interval or args.log_interval
        self.collector: Any = None
        self.moe_losses: dict[str, list[float]] = {}
        self.evaluating: tuple[int, str] | None = None

    def install(self) -> None:
        """Wrap Megatron's functions, and write its arguments to ``--save``."""
        for logger, beginning in QUIET.items():
            logging.getLogger(logger).addFilter(
                lambda record, start=beginning: not record.getMessage().startswith(start)  # type: ignore[misc]
            )
        if self.save and self.args.rank == 0:
            with os_error_as(f"--save {self.save}: cannot be written"):
                files.write_arguments(self.save / files.ARGUMENTS, vars(self.args))
        _wrap("setup_model_and_optimizer", self._set_up)
        _wrap("train_step", self._train_step)
        _wrap("training_log", self._training_log, *READ)
        _wrap("evaluate_and_print_results", self._evaluate_and_print, "prefix", "iteration")
        _wrap("evaluate", self._evaluate)

    def _set_up(self, call: Callable[[], Any], given: dict[str, Any]) -> Any:
        args, result = self.args, call()
        if self.save and self._writes():
            for name in (files.RUN, files.ROUTING):
                files.keep_until(self.save / name, args.iteration)
        if not args.num_experts or not args.routing_diagnostics or args.skip_train:
            return result
        if args.cuda_graph_impl not in ("none", "local"):
            if args.rank == 0:
                print(f"routing diagnostics: none with --cuda-graph-impl {args.cuda_graph_impl}", flush=True)
            return result
        self.collector = RoutingCollector(result[0], args)
        self._keep_moe_losses()
        return result

    def _train_step(self, call: Callable[[], Any], given: dict[str, Any]) -> Any:
        if self.collector is None:
            return call()
        self.collector.count(self._is_wanted(), self._is_rare(self.args.curr_iteration + 1))
        result = call()
        self.collector.count(False, False)
        return result

    def _training_log(self, call: Callable[[], Any], given: dict[str, Any]) -> Any:
        iteration = given["iteration"]
        if iteration % self.args.log_interval == 0:
            # Megatron keeps the sums of a run's first iteration, and would average over it in the next line.
            given["is_first_iteration"] = False
        line = self._losses(given)  # before Megatron resets its sums
        self.moe_losses = {}
        result = call()
        if line:
            self._append(files.RUN, line)
        if self.collector is not None and self._is_wanted(iteration):
            self._write_routing(iteration)
        return result

    def _evaluate_and_print(self, call: Callable[[], Any], given: dict[str, Any]) -> Any:
        self.evaluating = given["iteration"], "test" if "test set" in given["prefix"] else "validation"
        result = call()
        self.evaluating = None
        return result

    def _evaluate(self, call: Callable[[], Any], given: dict[str, Any]) -> Any:
        result = call()
        if self.evaluating and result[0] and "lm loss" in result[0]:
            iteration, name = self.evaluating
            line = {"kind": "held_out", "iteration": iteration, "tokens": self._tokens(), "set": name}
            self._append(files.RUN, line | {"lm_loss": float(result[0]["lm loss"])})
        return result

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Write a line of the log; if that fails, as on a full disk, print a message and keep training."""
        if not (self.save and self._writes()):
            return
        try:
            files.append(self.save / name, line)
        except OSError as error:
            lost = f"the line of iteration {line['iteration']} could not be written ({error.strerror})"
            print(f"{self.save / name}: {lost}; training continues", flush=True)

    def _is_wanted(self, iteration: int | None = None) -> bool:
        """Whether the routing of ``iteration`` is written (default: of the current iteration)."""
        iteration = self.args.curr_iteration + 1 if iteration is None else iteration
        return iteration == 1 or iteration % self.interval == 0

    def _is_rare(self, iteration: int) -> bool:
        if iteration in (1, self.args.train_iters):
            return self._is_wanted(iteration)
        return iteration % (RARELY * self.interval) == 0

    def _writes(self) -> bool:
        """Whether this is the last rank, which has Megatron's loggers and the loss."""
        return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    def _tokens(self) -> int:
        return self.args.consumed_train_samples * self.args.seq_length

    def _losses(self, given: dict[str, Any]) -> dict[str, Any] | None:
        """The line of run.jsonl, or None if nothing is logged now or this is not the last pipeline stage."""
        iteration, losses, totals = given["iteration"], given["loss_dict"], given["total_loss_dict"]
        logged = iteration == 1 or iteration % self.args.log_interval == 0
        if not (logged and "lm loss" in losses) or given["skipped_iter"]:
            return None
        over = totals.get("advanced iterations", 0) + 1
        return {
            "kind": "train",
            "iteration": iteration,
            "tokens": self._tokens(),
            "lm_loss": (float(totals.get("lm loss", 0.0)) + float(losses["lm loss"])) / over,
            "over": over,
            "learning_rate": given["learning_rate"],
            "grad_norm": None if given["grad_norm"] is None else float(given["grad_norm"]),
            "time": int(time.time()),
        }

    def _keep_moe_losses(self) -> None:
        """Keep each layer's auxiliary losses, which Megatron clears after reporting their mean."""
        tracker = get_moe_metrics_tracker()
        clear = tracker.clear

        def keep_and_clear() -> None:
            if self._is_wanted() and self._writes():
                for name, entry in tracker.metrics.items():
                    self.moe_losses[name] = (entry.values.float() / get_num_microbatches()).tolist()
            clear()

        tracker.clear = keep_and_clear  # type: ignore[method-assign]

    def _write_routing(self, iteration: int) -> None:
        from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

        record = self.collector.gather(self._is_rare(iteration))
        if not (self._writes() and record["layers"]):
            return
        for name, values in self.moe_losses.items():
            record[name] = [values[layer] for layer in record["layers"]]
        self._append(files.ROUTING, {"iteration": iteration, "tokens": self._tokens(), **record})
        # The loggers get the mean over layers, and each layer's value.
        scalars: dict[str, float] = {}
        lists = {name: values for name, values in record.items() if name not in ("layers", "load", "rare")}
        for name, values in (lists | record.get("rare", {})).items():
            present = {n: v for n, v in zip(record["layers"], values, strict=True) if not math.isnan(v)}
            if present:
                scalars[f"routing/{name}"] = sum(present.values()) / len(present)
            scalars |= {f"routing/{name}/layer_{layer}": value for layer, value in present.items()}
        if writer := get_tensorboard_writer():
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, iteration)
        if wandb := get_wandb_writer():
            wandb.log(scalars, iteration)


def _wrap(name: str, outer: Callable[[Callable[[], Any], dict[str, Any]], Any], *reads: str) -> None:
    """Wrap ``megatron.training.training.NAME`` in ``outer``(call, arguments by name, which it may change)."""
    from megatron.training import training

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        return outer(lambda: function(*bound.args, **bound.kwargs), bound.arguments)

    patching.wrap("run_log", training, name, call, reads)
