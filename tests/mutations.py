"""Mutation testing of what makes a step exact: seeded faults, each of which some law must notice.

    python tests/mutations.py                  all faults; writes benchmarks/results/mutations.json
    python tests/mutations.py clip cached      those whose name has one of these words

A fault is one place in the package with another text. Each is tried in a process forked from one that has torch
and nothing of gatrain: it imports gatrain with the other text and runs the laws, ordinary tests that need no
fixtures, until one fails. Tests of several ranks fork them (gloo), so that each rank has the fault. One that hangs
is noticed, as a test would be by its timeout.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import itertools
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "gatrain"
RESULTS = HERE / "benchmarks" / "results" / "mutations.json"
LIMIT_S = 90
"""Of one fault; what takes longer hangs."""


@dataclass(frozen=True)
class Fault:
    """One text of a file in the place of another, which must be there once."""

    name: str
    file: str
    old: str
    new: str
    laws: tuple[str, ...] = ()
    """Test modules that are tried first."""


def laws_of(module: Any, wanted: Sequence[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """A module's tests by these names: those that need nothing but the values they are parametrised with."""
    from _pytest.mark.structures import ParameterSet

    for name in wanted:
        function = getattr(module, f"test_{name}")
        marks = getattr(function, "pytestmark", [])
        axes = []
        for mark in (mark for mark in marks if mark.name == "parametrize"):
            names = (
                [n.strip() for n in mark.args[0].split(",")]
                if isinstance(mark.args[0], str)
                else mark.args[0]
            )
            is_plain = [not isinstance(row, ParameterSet) for row in mark.args[1]]
            rows = [
                (row if len(names) > 1 else (row,)) if plain else row.values
                for row, plain in zip(mark.args[1], is_plain, strict=True)
            ]
            axes.append([dict(zip(names, row, strict=True)) for row in rows])
        for chosen in itertools.product(*axes):
            values = {key: value for each in chosen for key, value in each.items()}
            yield name, functools.partial(function, **values)


def fork_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`distributed.run_on_ranks` by forks of this process: with its fault, and without importing anything again."""
    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
                    store = dist.FileStore(f"{folder}/store", world_size)
                    limit = timedelta(seconds=LIMIT_S / 2)
                    dist.init_process_group(
                        "gloo", store=store, rank=rank, world_size=world_size, timeout=limit
                    )
                    torch.save(function(*args), f"{folder}/{rank}.pt")
                    dist.barrier()
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        assert not any(codes), "a rank failed"
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world_size)]


def with_fault(fault: Fault) -> None:
    """From here on this process imports the package with the fault. Nothing is written."""
    path = PACKAGE / fault.file
    source = path.read_text()
    assert source.count(fault.old) == 1, f"{fault.name}: {source.count(fault.old)} places in {fault.file}"
    code = compile(source.replace(fault.old, fault.new), str(path), "exec", dont_inherit=True)
    load = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, fullname: str) -> Any:
        return code if Path(self.path) == path else load(self, fullname)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


FAULTS = (
    # --- denominators and counts
    Fault(
        "denominator of this rank's micro-batches alone",
        "train/counts.py",
        "summed = self._ranks.sum([*steps, *local.values(), *window.counts.values()])",
        "summed = [*self._ranks.sum(steps), *local.values(), *self._ranks.sum([*window.counts.values()])]",
        ("exact_gradient",),
    ),
    Fault(
        "extra 1/K",
        "train/gradient/plain.py",
        "step.forward_backward(batch, last=k == last)",
        "step.forward_backward(batch, {n: v / (last + 1) for n, v in step.scale.items()}, last=k == last)",
    ),
    Fault(
        "mean of micro-batch means",
        "train/gradient/plain.py",
        "step.forward_backward(batch, last=k == last)",
        "step.forward_backward(batch, {n: 1 / w / (last + 1) for n, w in window.micro_batches[k].weights.items() if w}, last=k == last)",  # noqa: E501
    ),
    Fault(
        "1/W as well as a sum over ranks",
        "train/step.py",
        "self.scale = {name: 1 / total if total else 0.0 for name, total in totals.items()}",
        "self.scale = {name: 1 / total / self.ranks.world_size if total else 0.0 for name, total in totals.items()}",  # noqa: E501
        ("exact_gradient",),
    ),
    Fault(
        "one denominator for all loss terms",
        "train/step.py",
        "self.scale = {name: 1 / total if total else 0.0 for name, total in totals.items()}",
        "self.scale = dict.fromkeys(totals, 1 / max(totals.values()))",
    ),
    Fault("a window without weight is divided by 1", "train/step.py", "if any(totals.values()):", "if True:"),
    Fault(
        "weights used are not compared with those counted",
        "train/counts.py",
        "if not agree(before, after, 1e-6):",
        "if False:",
    ),
    Fault(
        "only the first loss term counts",
        "train/step.py",
        "shares = [total * scale[name] for name, (total, _) in terms.items()]",
        "shares = [total * scale[name] for name, (total, _) in terms.items()][:1]",
    ),
    Fault(
        "unshifted count of a causal model",
        "tasks/huggingface.py",
        "return self._over_labels.weight(labels[:, 1:], self._weights(batch, labels))",
        "return self._over_labels.weight(labels, self._weights(batch, labels))",
        ("means",),
    ),
    Fault(
        "ignored targets are counted",
        "tasks/losses.py",
        "counted = targets != self._loss.ignore_index\n        if self._loss.weight is None:",
        "counted = targets == targets\n        if self._loss.weight is None:",
        ("tasks",),
    ),
    Fault(
        "class weights are left out of the denominator",
        "tasks/losses.py",
        "class_weights = self._loss.weight.to(targets.device, torch.float64)",
        "class_weights = torch.ones_like(self._loss.weight, dtype=torch.float64)",
        ("tasks",),
    ),
    Fault(
        "a mean over elements divides by samples",
        "tasks/losses.py",
        "            return targets.numel()\n        if targets.is_floating_point()",
        "            return len(targets)\n        if targets.is_floating_point()",
        ("tasks",),
    ),
    Fault(
        "a loss that is a mean is taken for a sum",
        "tasks/losses.py",
        "return value * weight, weight",
        "return value, weight",
        ("tasks",),
    ),
    # --- what a window is
    Fault(
        "the last micro-batch is left out",
        "train/step.py",
        "for k in range(len(micro_batches)):",
        "for k in range(max(1, len(micro_batches) - 1)):",
    ),
    Fault(
        "the next micro-batch in the place of this one",
        "train/step.py",
        "staged.append(self.stage(micro_batches[k + 1].batch))",
        "staged.append(self.stage(micro_batches[k].batch))",
    ),
    Fault(
        "stale gradients of the last window",
        "train/parallel.py",
        "        for parameter in self.parameters:\n            parameter.grad = None",
        "        for parameter in self.parameters[:-1]:\n            parameter.grad = None",
    ),
    Fault(
        "stale partial window: a forgotten half stays",
        "train/step.py",
        "        self.parallel.drop_gradients()\n        self.counts.forget_passes(self._before)",
        "        self.counts.forget_passes(self._before)",
        ("gradient",),
    ),
    Fault(
        "the losses of a forgotten half stay",
        "train/step.py",
        "        self.counts.forget_passes(self._before)\n",
        "",
        ("gradient",),
    ),
    Fault(
        "the short window at the end of an epoch is dropped",
        "train/stage_spans.py",
        "return positions // self.effective_batch if self.drop_last else -(-positions // self.effective_batch)",
        "return positions // self.effective_batch",
        ("windows",),
    ),
    Fault(
        "a window overlaps the one before",
        "train/windows.py",
        "return Window(index, place.epoch, self.ids(place.epoch, place.first, place.last), draws)",
        "return Window(index, place.epoch, self.ids(place.epoch, max(0, place.first - 1), place.last), draws)",
        ("windows",),
    ),
    Fault(
        "ranks repeat a sample",
        "train/windows.py",
        "return first, self.ids[first : first + shares[rank]]",
        "return first, self.ids[max(0, first - 1) : max(0, first - 1) + shares[rank]]",
        ("windows",),
    ),
    Fault(
        "a remainder of a share is dropped",
        "batch.py",
        "return rank_shares(share, steps) if steps else []",
        "return [share // steps] * steps if steps else []",
        ("batch",),
    ),
    Fault(
        "the epoch does not reach the permutation",
        "train/windows.py",
        "_block(self.samples, self.seed, epoch, nth * block, block)",
        "_block(self.samples, self.seed, 0, nth * block, block)",
        ("windows", "batch_stages"),
    ),
    # --- ranks
    Fault(
        "dropped rank: gradients are not added",
        "train/parallel.py",
        "self.ranks.reduce_gradients(self._reduced, self._agree())",
        "self._agree()",
        ("exact_gradient",),
    ),
    Fault(
        "the first parameter is not reduced",
        "train/parallel.py",
        "self.ranks.reduce_gradients(self._reduced, self._agree())",
        "self.ranks.reduce_gradients(self._reduced[1:], self._agree()[1:])",
        ("exact_gradient",),
    ),
    Fault(
        "missing no_sync",
        "train/overlap.py",
        "stack.enter_context(wrapper.no_sync())",
        "pass",
        ("exact_gradient",),
    ),
    Fault(
        "reduced in every micro-step",
        "train/parallel.py",
        "return self._overlap.during_backward() if last and self._overlap is not None else _NOTHING",
        "return self._overlap.during_backward() if self._overlap is not None else _NOTHING",
        ("exact_gradient",),
    ),
    Fault(
        "a bucket starts before its gradients are there",
        "train/overlap.py",
        "and not self._missing[self._started]:",
        "and len(self._missing[self._started]) < 2:",
        ("exact_gradient",),
    ),
    Fault(
        "an unused parameter of one rank keeps its own gradient",
        "train/ranks.py",
        "            if layout:\n",
        "            if layout and parameter.grad is not None:\n",
        ("exact_gradient",),
    ),
    Fault(
        "a failure is told to nobody",
        "train/parallel.py",
        "if self.ranks.world_size == 1 or isinstance(error, PeerFailed):",
        "if True:",
        ("exact_gradient",),
    ),
    Fault(
        "a failed rank is not heard",
        "train/parallel.py",
        "        if failed:\n            error = PeerFailed",
        "        if False:\n            error = PeerFailed",
        ("exact_gradient",),
    ),
    # --- random numbers
    Fault(
        "all micro-steps draw the same numbers",
        "train/micro_batches.py",
        "return *self.seed, index if position is None else position",
        "return self.seed",
        ("exact_gradient",),
    ),
    Fault(
        "micro-steps are not seeded",
        "train/dropout/__init__.py",
        "            seed_everything(*seed)\n\n    def start",
        "            pass\n\n    def start",
        ("exact_gradient", "cached"),
    ),
    # --- update: clip, scaler, schedule, guard
    Fault(
        "clip per micro-step",
        "train/step.py",
        "        self.parallel.settle()\n",
        "        self.parallel.settle()\n        if getattr(self, '_clip', None) is not None:\n            self._clip(self.parallel)\n",  # noqa: E501
        ("engine",),
    ),
    Fault(
        "clip before the loss scale is taken out",
        "train/step.py",
        "        if self.scaler is not None:\n            self.scaler.unscale_(self.optimizer)\n        norm = self.strategy.clip(self, self._clip)",  # noqa: E501
        "        norm = self.strategy.clip(self, self._clip)\n        if self.scaler is not None:\n            self.scaler.unscale_(self.optimizer)\n        norm = norm",  # noqa: E501
        ("engine", "main_gradients"),
    ),
    Fault(
        "no clipping",
        "train/parallel.py",
        "return nn.utils.clip_grad_norm_(parameters, limit)",
        "pass",
        ("engine",),
    ),
    Fault(
        "double unscale",
        "train/step.py",
        "            self.scaler.unscale_(self.optimizer)\n",
        "            self.scaler.unscale_(self.optimizer)\n            for p in self.parallel.parameters:\n                p.grad = p.grad if p.grad is None else p.grad / self.scaler.get_scale()\n",  # noqa: E501
        ("engine", "main_gradients", "cached"),
    ),
    Fault(
        "no unscale",
        "train/step.py",
        "            self.scaler.unscale_(self.optimizer)\n",
        "            pass\n",
        ("engine", "main_gradients"),
    ),
    Fault(
        "scaler decides per micro-step",
        "train/step.py",
        "        self.parallel.settle()\n",
        "        self.parallel.settle()\n        if self.scaler is not None:\n            self.scaler.set_to(self.scaler.get_scale() / 2)\n",  # noqa: E501
        ("engine", "cached"),
    ),
    Fault(
        "the loss is not scaled",
        "train/step.py",
        "share = share if self.scaler is None or gradient is not None else self.scaler.scale(share)",
        "share = share",
        ("engine", "main_gradients"),
    ),
    Fault(
        "schedule per micro-step",
        "train/step.py",
        "        self.counts.add(terms)\n        self.part_norms",
        "        self.counts.add(terms)\n        self.number += 1\n        self.part_norms",
        ("optimizers", "batch_rule"),
    ),
    Fault(
        "the schedule is one step behind",
        "train/schedule.py",
        "return min(1.0, (step + 1) / warmup)",
        "return min(1.0, step / warmup)",
        ("schedules",),
    ),
    Fault(
        "an update for a window that is not finite",
        "train/guard.py",
        "            if bad:\n                return False\n",
        "",
        ("nonfinite",),
    ),
    Fault(
        "the loss is not looked at, the gradient alone",
        "train/guard.py",
        "            bad = bad | loss_is_bad\n",
        "            pass\n",
        ("nonfinite",),
    ),
    Fault(
        "buffers stay as a skipped window left them",
        "train/step.py",
        "        if not update.made:\n            self.guard.restore_buffers()\n        return result, update",
        "        return result, update",
        ("nonfinite",),
    ),
    Fault(
        "after a bad window the next one is made",
        "train/guard.py",
        "self._stopped = found if self._stopped is None else torch.maximum(self._stopped, found)",
        "self._stopped = found",
        ("nonfinite",),
    ),
    # --- precision
    Fault(
        "16-bit gradients are summed in 16 bits",
        "train/main_gradients.py",
        "        stand_in.grad.add_(gradient)",
        "        stand_in.grad = (stand_in.grad.to(gradient.dtype) + gradient).to(torch.float32)",
        ("main_gradients",),
    ),
    Fault(
        "a main gradient replaces the one before",
        "train/main_gradients.py",
        "        stand_in.grad.add_(gradient)",
        "        stand_in.grad = gradient.to(torch.float32)",
        ("main_gradients",),
    ),
    Fault(
        "masters start anew from the rounded weights",
        "train/main_gradients.py",
        "            is_same = master.to(parameter.dtype) == parameter\n",
        "            is_same = torch.zeros_like(parameter, dtype=torch.bool)\n",
        ("main_gradients",),
    ),
    Fault(
        "masters are not copied to the model",
        "train/step.py",
        "        self.masters.copy_to_model()\n",
        "",
        ("main_gradients",),
    ),
    # --- cached gradients
    Fault(
        "cached gradients of the wrong half",
        "train/gradient/cached.py",
        "        cache = self._loss_and_cache(window, step, rows)\n",
        "        cache = self._loss_and_cache(window, step, rows)\n        cache = [each.roll(len(each) // 2, 0) for each in cache]\n",  # noqa: E501
        ("cached",),
    ),
    Fault(
        "cached gradients of another rank's rows",
        "train/gathered_rows.py",
        "sum(count for _, count in every[: ranks.rank])",
        "0",
        ("cached",),
    ),
    Fault(
        "the cache is multiplied by W",
        "train/gradient/cached.py",
        "        self._count(window, step, terms)\n        return cache",
        "        self._count(window, step, terms)\n        return [each * step.ranks.world_size for each in cache]",
        ("cached",),
    ),
    Fault(
        "the second pass draws other masks",
        "train/gradient/cached.py",
        "            set_random_states(self._states.pop(k))\n",
        "            torch.rand(1)\n",
        ("cached",),
    ),
    Fault(
        "the cache keeps the loss scale",
        "train/gradient/cached.py",
        "            cache = [cached / factor for cached in cache]\n",
        "",
        ("cached",),
    ),
    Fault(
        "16-bit rows have a 16-bit cache",
        "train/gradient/cached.py",
        "return leaf.detach().float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf.detach()",
        "return leaf.detach()",
        ("cached",),
    ),
    Fault(
        "every rank counts the window's loss",
        "train/gradient/cached.py",
        "total if step.ranks.rank == 0 else torch.zeros_like(total)",
        "total",
        ("cached",),
    ),
    Fault(
        "rows of this rank alone are compared",
        "train/gathered_rows.py",
        "torch.cat(ranks.gather_rows(leaf.detach()))",
        "leaf.detach()",
        ("cached",),
    ),
    Fault(
        "buffers counted twice, once by each pass",
        "train/gradient/cached.py",
        "        step.reset()  # buffers",
        "        pass  # buffers",
        ("cached",),
    ),
    Fault(
        "rows that differ in the second pass are accepted",
        "train/gradient/cached.py",
        'if step.device.type == "cpu" or not self._is_checked:  # on',
        "if False:  # on",
        ("cached",),
    ),
    Fault(
        "BatchNorm is accepted with cached gradients",
        "train/gradient/cached.py",
        "if names := batch_norms(step.model):",
        "if names := []:",
        ("cached",),
    ),
    Fault(
        "held-out rows in the order of ranks",
        "train/window_evaluation.py",
        "order = places.argsort()",
        "order = torch.arange(len(places))",
        ("cached",),
    ),
    Fault(
        "a short held-out window counts as a whole one",
        "train/window_evaluation.py",
        "for n in range(samples // window_samples)]",
        "for n in range(-(-samples // window_samples))]",
        ("cached",),
    ),
    # --- BatchNorm
    Fault(
        "the whole momentum in each micro-batch",
        "train/norm/keep.py",
        "module.momentum = corrected(momentum, share)",
        "module.momentum = momentum",
        ("norm",),
    ),
    Fault(
        "exact BatchNorm without its adjoint pass",
        "train/norm/layer_by_layer.py",
        "                    self._adjoint_pass(nth)",
        "                    pass",
        ("exact_norm",),
    ),
    Fault(
        "adjoint passes from the first layer up",
        "train/norm/layer_by_layer.py",
        "for nth in reversed(layers):",
        "for nth in layers:",
        ("exact_norm",),
    ),
    Fault(
        "running variance without Bessel's correction",
        "train/norm/over_window.py",
        "unbiased = found.var * (found.count / (found.count - 1))",
        "unbiased = found.var",
        ("exact_norm",),
    ),
    Fault(
        "variances are averaged without that of the means",
        "train/norm/window_statistics.py",
        "within + between",
        "within",
        ("exact_norm",),
    ),
    Fault(
        "sums of one rank alone in the backward of BatchNorm over a window",
        "train/norm/over_window.py",
        "        self._step.ranks.add([total])\n        return total",
        "        return total",
        ("exact_norm",),
    ),
    Fault(
        "a micro-batch among others goes on with another's random numbers",
        "train/norm/swapped.py",
        "            self._step.random.resume(kept.numbers)",
        "            pass",
        ("exact_norm_together",),
    ),
    Fault(
        "a micro-batch among others finds another's attributes",
        "train/norm/swapped.py",
        "                attributes[name] = value",
        "                pass",
        ("exact_norm_together",),
    ),
    Fault(
        "each micro-batch among others counts as a batch",
        "train/norm/together.py",
        "                self._buffers.undo(nth)\n",
        "",
        ("exact_norm",),
    ),
    # --- optimizer accumulation, phases, rules, noise
    Fault(
        "AdamA: moments decay in each micro-batch",
        "optimizers/adama.py",
        "        if id(parameter) in self.begun:\n            return\n",
        "",
        ("fold",),
    ),
    Fault(
        "AdamA: every rank brings the past moments",
        "train/gradient/fold.py",
        "optimizer.holds_past = step.ranks.rank == 0",
        "optimizer.holds_past = True",
        ("fold",),
    ),
    Fault(
        "AdamA: a gradient is folded twice",
        "optimizers/adama.py",
        'state["exp_avg"].add_(gradient, alpha=1 - first)',
        'state["exp_avg"].add_(gradient, alpha=2 - 2 * first)',
        ("fold",),
    ),
    Fault(
        "phases: the other phase's parameters get gradients",
        "train/gradient/phases.py",
        "            parameter.requires_grad_(False)\n",
        "            pass\n",
        ("phases",),
    ),
    Fault(
        "phases: a bad window keeps its first updates",
        "train/gradient/phases.py",
        "                if not made:\n                    self._take_back(step, undone_by)\n",
        "                if not made:\n",
        ("phases",),
    ),
    Fault(
        "batch rule: rate linear in the place of its root",
        "batch_rule.py",
        "    root = math.sqrt(k)\n",
        "    root = k\n",
        ("batch_rule",),
    ),
    Fault(
        "AGC: the ratio is not that of a unit's own weights",
        "train/clipping.py",
        "most = torch.linalg.vector_norm(parameter, dim=dims, keepdim=True)",
        "most = torch.linalg.vector_norm(parameter).reshape([1] * parameter.dim())",
        ("clipping",),
    ),
    Fault(
        "clipping by group: each part is clipped by all parameters",
        "train/clipping.py",
        "norms.append(parallel.clip(part.norm, parameters))",
        "norms.append(parallel.clip(part.norm))",
        ("clipping",),
    ),
    Fault(
        "bf16 sums: rounded to nearest in the place of at random",
        "train/gradient/bf16_sums.py",
        "rounded = (bits + drawn).bitwise_and_",
        "rounded = (bits + 2**15).bitwise_and_",
        ("bf16_sums",),
    ),
    Fault(
        "bf16 sums: what was lost is lost twice",
        "train/gradient/bf16_sums.py",
        "term = gradient.to(torch.float32) - lost",
        "term = gradient.to(torch.float32) + lost",
        ("bf16_sums",),
    ),
    Fault(
        "noise scale: parts are not told from the whole",
        "hooks/noise_estimate.py",
        'spare = parts["count"] - parts["weight"] / parts["total"]',
        'spare = parts["count"]',
        ("noise_scale",),
    ),
)
"""Every one is one text in the place of another, as somebody might have written it."""


LAWS: dict[str, tuple[str, ...]] = {
    "test_exact_gradient": (
        "micro_batches_equal_the_whole_batch",
        "mean_of_means_would_fail_these_tests",
        "a_loss_that_uses_another_count_is_an_error",
        "weights_may_be_real_numbers",
        "each_loss_term_has_a_denominator_of_its_own",
        "a_window_without_any_weight_has_no_gradient",
        "dropout_masks_are_keyed_by_window_rank_and_micro_step",
        "each_micro_step_draws_numbers_of_its_own",
        "every_world_size_sees_the_same_windows",
        "a_failure_on_one_rank_ends_the_window_on_all_without_a_hang",
        "a_parameter_used_on_one_rank_only_gets_its_gradient_on_all",
        "ranks_equal_one_process",
        "one_reduction_per_step_at_any_number_of_micro_steps",
    ),
    "test_engine": (
        "recomputation_does_not_count_a_batch_twice_in_batch_norm",
        "a_task_with_two_loss_terms_steps_the_same_for_any_split",
        "clipping_is_done_once_on_the_whole_gradient",
        "bf16_accumulates_in_fp32",
        "fp16_takes_one_scaling_decision_per_window",
        "warm_up_in_samples_keeps_its_curve_when_the_effective_batch_changes",
    ),
    "test_gradient": (
        "a_half_window_can_be_forgotten_and_computed_in_smaller_micro_batches",
        "a_strategy_may_make_the_update_itself",
    ),
    "test_nonfinite": (
        "a_window_that_is_not_finite_changes_no_bit",
        "an_infinite_loss_with_a_finite_gradient_makes_no_update",
        "without_a_look_from_the_host_nothing_changes_from_the_bad_window_on",
        "a_window_that_overflows_in_fp16_is_computed_again_at_a_lower_scale",
    ),
    "test_main_gradients": (
        "the_gradient_is_the_fp32_sum_of_the_micro_gradients",
        "without_masters_the_sum_is_rounded_once",
        "masters_that_were_not_copied_are_told",
        "updates_below_the_weights_resolution_are_not_lost",
        "what_others_do_to_the_weights_stays_done",
        "fp16_parameters_get_a_loss_scale_and_finite_steps",
        "ranks_add_main_gradients_in_fp32",
    ),
    "test_optimizers": ("every_optimizer_steps_as_in_a_plain_loop_whatever_the_split",),
    "test_windows": (
        "an_epoch_holds_every_sample_once",
        "the_last_window_of_an_epoch_is_short_and_nothing_is_dropped",
        "each_epoch_has_all_samples_in_an_order_of_its_own",
        "the_fingerprint_adds_up_over_ranks_and_sees_order",
        "the_library_form_gives_each_rank_its_part",
    ),
    "test_batch": ("known_cuts",),
    "test_batch_stages": ("an_epoch_with_a_change_in_it_holds_every_sample_once_on_any_number_of_ranks",),
    "test_batch_rule": (
        "another_split_of_the_same_window_has_the_same_rate_betas_and_update",
        "the_rules_are_those_of_their_papers",
        "the_bias_corrected_means_are_the_same_after_a_change",
    ),
    "test_schedules": ("warm_up_and_cosine_over_eight_steps",),
    "test_tasks": (
        "sum_over_weight_is_the_mean_of_pytorch",
        "sums_and_weights_split_anywhere",
        "custom_weight_counts_what_the_mean_divides_by",
    ),
    "test_cached": (
        "the_gradient_is_that_of_the_whole_window_for_any_split_over_ranks",
        "dropout_is_that_of_the_first_pass",
        "buffers_move_once",
        "the_scaler_scales_the_cache_and_the_second_pass_once",
        "small_gradients_of_16_bit_rows_are_not_lost",
        "supervised_losses_that_compare_samples_are_computed_over_all_of_them",
        "rows_that_depend_on_other_samples_are_found_before_the_first_step",
        "evaluation_is_over_whole_windows_whatever_the_split",
        "what_would_not_be_exact_is_refused",
    ),
    "test_means": (
        "ragged_pieces_give_the_gradient_of_the_mean_that_was_asked_for",
        "models_of_transformers_take_the_same_options",
    ),
    "test_fold": (
        "weights_and_moments_are_those_of_the_formulas",
        "the_first_moment_is_adams_and_the_second_a_sum_of_squares",
        "ranks_with_few_or_no_micro_steps_equal_one_rank_with_all_of_them",
    ),
    "test_phases": (
        "a_phase_leaves_no_gradient_in_the_parameters_of_another",
        "each_phase_has_its_own_rate_norm_and_mean_loss_over_its_updates",
        "a_phase_that_is_not_finite_takes_the_windows_other_updates_back",
        "any_split_on_any_number_of_ranks_trains_like_whole_windows_in_turn",
    ),
    "test_clipping": ("a_step_is_clipped_as_the_reference_on_one_rank_and_on_two",),
    "test_bf16_sums": (
        "neither_way_stops_growing_where_rounding_to_nearest_does",
        "rounding_is_right_on_average_and_keeps_what_is_not_finite",
    ),
    "test_packed": ("isolated_documents_have_the_gradient_of_documents_alone",),
    "test_norm": (
        "a_window_leaves_exactly_1_minus_m_of_what_was_before_and_one_micro_batch_changes_nothing",
    ),
    "test_exact_norm": (
        "gradient_and_buffers_are_those_of_one_batch_for_any_model",
        "each_pass_draws_the_same_random_numbers",
    ),
    "test_exact_norm_together": (
        "dropout_is_that_of_each_micro_batch_by_itself",
        "what_a_model_puts_aside_in_its_forward_stays_with_its_micro_batch",
        "ranks_leave_the_way_together_and_none_waits_for_one_that_failed",
    ),
    "test_noise_scale": (
        "the_estimates_have_no_bias_for_parts_of_any_sizes_that_need_not_be_all_of_the_window",
        "a_loss_scale_that_changes_changes_nothing",
    ),
}
"""Tests by module, those that cost least first."""


def laws(first: Sequence[str] = ()) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every law by its name, those of some modules first."""
    import distributed

    distributed.run_on_ranks = fork_ranks
    for name in dict.fromkeys([*(f"test_{each}" for each in first), *LAWS]):
        for law, run in laws_of(importlib.import_module(name), LAWS[name]):
            yield f"{name}.py::test_{law}", run


def broken_law(first: Sequence[str] = ()) -> str:
    """The first law that does not hold, or an empty text."""
    for name, run in laws(first):
        try:
            run()
        except BaseException as error:  # a fault may end the process, too
            return f"{name} ({type(error).__name__})"
    return ""


def outcome(fault: Fault | None) -> tuple[str, float]:
    """The law that notices a fault, tried in a process of its own, and the CPU seconds; empty if none does."""
    read, write = os.pipe()
    began = os.times()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            if fault is not None:
                signal.alarm(LIMIT_S)
                with_fault(fault)
            found = broken_law(fault.laws if fault is not None else ())
        except BaseException as error:
            found = f"import ({type(error).__name__})"
        os.write(write, found.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # its ranks
    ended = os.times()
    spent = ended.children_user + ended.children_system - began.children_user - began.children_system
    return (f"{said or 'any'} (hangs or dies)" if status else said), spent


def warm_up() -> None:
    """Import what the laws need and is not of this package: each fault's process has it from here."""
    import torch._dynamo
    import torch.distributed
    import torch.nn.parallel

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for name in LAWS:
            importlib.import_module(name)
        others = [name for name in sys.modules if not name.startswith(("gatrain", "test", "__"))]
        os.write(write, "\n".join(name for name in others if "." not in name).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        names = pipe.read().split()
    os.waitpid(child, 0)
    for name in names:
        if name in sys.stdlib_module_names or name in ("numpy", "pytest", "filelock", "yaml", "omegaconf"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def main(words: Sequence[str]) -> int:
    warm_up()
    if not words and (broken := outcome(None)[0]):
        print(f"the code as it is breaks {broken}")
        return 1
    names = {fault.name for fault in FAULTS}
    chosen = [
        fault
        for fault in FAULTS
        if not words or any(word == fault.name if word in names else word in fault.name for word in words)
    ]
    survivors, rows = [], []
    for fault in chosen:
        law, seconds = outcome(fault)
        rows.append({"fault": fault.name, "file": fault.file, "caught_by": law, "cpu_s": round(seconds, 2)})
        print(f"{seconds:5.1f} s  {fault.name}: {law or 'SURVIVES'}", flush=True)
        if not law:
            survivors.append(fault.name)
    caught = len(chosen) - len(survivors)
    print(f"{caught} of {len(chosen)} faults caught; survivors: {', '.join(survivors) or 'none'}")
    if not words:
        sys.path.insert(0, str(HERE / "benchmarks"))
        from common import header

        found = {"faults": len(chosen), "caught": caught, "survivors": survivors, "rows": rows}
        RESULTS.write_text(
            json.dumps({**header(), "command": "python tests/mutations.py", **found}, indent=1) + "\n"
        )
    return int(caught < 0.95 * len(chosen))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main(sys.argv[1:]))
