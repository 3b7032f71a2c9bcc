"""The rank process of `gatrain verify`: computes one window in several ways and compares the gradients."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatrain import batch, build
from gatrain import rank as rank_process
from gatrain.compose import load_config
from gatrain.config import RunConfig
from gatrain.errors import GatrainError
from gatrain.rundir import RunDir, read_json, write_json
from gatrain.tasks.base import Batch, Task, named_loss_sums, named_weights
from gatrain.train import samples
from gatrain.train.accumulate import MicroBatch, PlainAccumulation, RankWindow, WindowResult
from gatrain.train.batches import map_tensors, move_to, tensors_of
from gatrain.train.checkpointing import apply_checkpointing
from gatrain.train.modules import batch_norms
from gatrain.train.precision import forbid_tf32
from gatrain.train.ranks import Ranks
from gatrain.train.seeding import seed_everything
from gatrain.train.windows import WindowSchedule

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
PASSES = 7
"""Passes over the window in one precision, over all cases and processes."""
LEAST_SAMPLES, SLOW_SAMPLE_S = 7, 1.0


class Verification:
    """One window of one recipe on one device."""

    def __init__(self, config: RunConfig, device: torch.device, ranks: Ranks) -> None:
        self.config = config
        self.device = device
        self.ranks = ranks
        self.task: Task = build.build_task(config)
        self.notes: list[str] = []
        self.shorten = False
        schedule = WindowSchedule(len(self.task.train_data), config.batch.effective, config.train.seed)
        self.ids: list[int] = schedule.window(0).ids.tolist()
        # read once: every case must see the same random augmentation
        self._samples: dict[int, Any] = {}

    def choose_samples(self, seconds: float) -> None:
        """Keep as many samples of the window as ``seconds`` allow, at least a few."""
        model = self.model(torch.float64)
        self._seconds_of_one_sample(model)  # the first call also pays for warming up
        one_s = self._seconds_of_one_sample(model)
        if one_s > SLOW_SAMPLE_S:
            whole = self.host_batch(self.ids[:1])
            self.shorten = True
            if _elements(self.host_batch(self.ids[:1])) < _elements(whole):
                self.notes.append(
                    "long samples were shortened for this check; the model is the recipe's own."
                )
                one_s = self._seconds_of_one_sample(model)
        affordable = int(seconds / (1.5 * PASSES * max(one_s, 1e-6)))
        count = min(len(self.ids), max(LEAST_SAMPLES, affordable))
        self.ids = self.ids[:count]

    def _seconds_of_one_sample(self, model: nn.Module) -> float:
        began = time.perf_counter()
        probe = self.ids[:2]  # not one: BatchNorm may refuse a single sample
        with self._loss_modules(torch.float64):
            self._one_shot_backward(model, self.on_device(self.host_batch(probe), torch.float64))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - began) / len(probe)

    def host_batch(self, ids: list[int]) -> Batch:
        seed = self.config.train.seed
        for sample in ids:
            if sample not in self._samples:
                (self._samples[sample],) = samples.read(self.task, self.task.train_data, [(0, sample)], seed)
        keys = [(0, sample) for sample in ids]
        collated = samples.collated(self.task, [self._samples[sample] for sample in ids], keys, seed)
        return self.task.shortened(collated) if self.shorten else collated

    def weights_differ(self, sizes: list[int]) -> bool:
        """Whether the micro-batches of ``sizes`` weigh differently, so that their means may not be averaged."""
        first, weights = 0, []
        for size in sizes:
            weights.append(named_weights(self.task.weight(self.host_batch(self.ids[first : first + size]))))
            first += size
        return any(weight != weights[0] for weight in weights)

    def on_device(self, host: Batch, dtype: torch.dtype) -> Batch:
        return map_tensors(
            lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor,
            move_to(host, self.device),
        )

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The recipe's model in ``dtype``, in training mode except for what draws random numbers."""
        model = build.build_model(self.task, self.config.train.seed, self.device).to(dtype)
        for module in model.modules():
            if "dropout" in type(module).__name__.lower():
                module.eval()
        if self.config.checkpointing in ("full", "selective"):
            apply_checkpointing(model, self.config.checkpointing)
        return model

    def inspect(self) -> None:
        """Note what cannot be exact, and why."""
        model = build.build_model(self.task, self.config.train.seed, self.device)
        if norms := batch_norms(model):
            self.notes.append(
                f"BatchNorm normalises each micro-batch by its own statistics ({norms[0]}"
                f"{f' and {len(norms) - 1} more' if len(norms) > 1 else ''}): with it, the result depends on the "
                "split and cannot equal the whole batch. GroupNorm, LayerNorm or frozen BatchNorm are exact."
            )
        if any("dropout" in type(m).__name__.lower() and getattr(m, "p", 0) for m in model.modules()):
            self.notes.append(
                "Dropout draws another mask for each split, so it is off in this check: with it, splits are equal "
                "in distribution, not in value."
            )
        probe = self.on_device(self.host_batch(self.ids[:2]), torch.float32)
        plain = self.model(torch.float32)
        losses = []
        with torch.no_grad(), self._loss_modules(torch.float32):
            for seed in (1, 2):
                seed_everything(seed)
                losses.append(sum(float(total) for total, _ in self._terms(plain, probe).values()))
        if losses[0] != losses[1]:
            self.notes.append(
                "The model draws random numbers in its forward besides nn.Dropout modules: its gradient differs "
                "from call to call, so a difference below is no proof of a wrong split."
            )

    def _terms(self, model: nn.Module, on_device: Batch) -> dict[str, tuple[Tensor, Tensor | float]]:
        return named_loss_sums(self.task.loss_sum(model, on_device))

    @contextlib.contextmanager
    def _loss_modules(self, dtype: torch.dtype) -> Iterator[None]:
        """Losses may hold tensors (class weights): move and convert the task's modules with the model."""
        owners = [self.task, *(v for v in vars(self.task).values() if hasattr(v, "__dict__"))]
        modules = [
            (owner, name, value)
            for owner in owners
            for name, value in vars(owner).items()
            if isinstance(value, nn.Module)
        ]
        for owner, name, module in modules:
            setattr(owner, name, copy.deepcopy(module).to(self.device, dtype))
        try:
            yield
        finally:
            for owner, name, module in modules:
                setattr(owner, name, module)

    def _one_shot_backward(self, model: nn.Module, whole: Batch) -> dict[str, float]:
        """Forward and backward over everything at once, with none of the training core."""
        model.zero_grad(set_to_none=True)
        terms = self._terms(model, whole)
        loss = sum((total / weight for total, weight in terms.values()), start=torch.zeros(()))
        loss.backward()
        return {name: float(total.detach()) for name, (total, _) in terms.items()}

    def one_shot(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, float]]:
        """Gradient and loss sums of the whole window in one batch."""
        model = self.model(dtype)
        with self._loss_modules(dtype), one_algorithm():
            sums = self._one_shot_backward(model, self.on_device(self.host_batch(self.ids), dtype))
        return flat_gradient(model), sums

    def split(
        self,
        dtype: torch.dtype,
        sizes: list[int],
        strategy_class: type[PlainAccumulation] = PlainAccumulation,
    ) -> tuple[Tensor, dict[str, float]]:
        """Gradient and loss sums of this rank's ``sizes`` (and the other ranks') through the training core."""
        model = self.model(dtype)
        first = sum(batch.rank_shares(len(self.ids), self.ranks.world_size)[: self.ranks.rank])
        micro_batches = []
        for size in sizes:
            host = self.host_batch(self.ids[first : first + size])
            first += size
            micro_batches.append(MicroBatch(host, named_weights(self.task.weight(host))))
        strategy = strategy_class(
            model,
            lambda on_device: self.task.loss_sum(model, on_device),
            term_names=self.task.loss_terms,
            ranks=self.ranks,
            sync=self.config.sync,
            stage=lambda host: lambda: self.on_device(host, dtype),
        )
        with self._loss_modules(dtype), one_algorithm():
            result = strategy(RankWindow(micro_batches))
        sums = {name: float(value) for name, value in result.local_loss_sums.items()}
        return flat_gradient(model), sums


class MeanOfMeans(PlainAccumulation):
    """The usual mistake: each micro-batch's own mean, divided by the number of micro-steps."""

    def __call__(self, window: RankWindow) -> WindowResult:
        self._micro_steps = len(window.micro_batches)
        return super().__call__(window)

    def micro_step(
        self, batch: Batch, scale: Mapping[str, float], *, reduce_in_backward: bool = False
    ) -> None:
        exact = self._loss_sum

        def mean(on_device: Batch) -> dict[str, tuple[Tensor, Tensor | float]]:
            # the factor weight / T, which undoes the mean, is what is left out here
            return {
                name: (total / weight / self._micro_steps / scale[name], weight)
                for name, (total, weight) in named_loss_sums(exact(on_device)).items()
            }

        self._loss_sum = mean
        try:
            super().micro_step(batch, scale, reduce_in_backward=reduce_in_backward)
        finally:
            self._loss_sum = exact


class RanksAveraged(PlainAccumulation):
    """The other usual mistake: gradients averaged over the ranks where their sum is wanted."""

    def micro_step(
        self, batch: Batch, scale: Mapping[str, float], *, reduce_in_backward: bool = False
    ) -> None:
        averaged = {name: factor / self._ranks.world_size for name, factor in scale.items()}
        super().micro_step(batch, averaged, reduce_in_backward=reduce_in_backward)


def one_algorithm() -> contextlib.AbstractContextManager[Any]:
    """On a CPU, compute each sample alike whatever its batch.

    oneDNN chooses another convolution for another batch size, and a deep net at its start multiplies that
    rounding; here only the order of the sums may differ.
    """
    return torch.backends.mkldnn.flags(enabled=False)  # type: ignore[no-any-return]


def _elements(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in tensors_of(batch))


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients in one vector; zeros where a parameter has none."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).detach().flatten()
            for p in model.parameters()
            if p.requires_grad
        ]
    )


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """L2 norm of the difference over the norm of ``wanted``; nan where either is not finite."""
    difference, norm = (given - wanted).double().norm(), wanted.double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def awkward_sizes(samples: int) -> list[int]:
    """A split in which no two neighbours are alike: 1 + 3 + 2 + 5 + 1 + 3 + ..."""
    sizes: list[int] = []
    left = samples
    pattern = (1, 3, 2, 5)
    while left:
        sizes.append(min(pattern[len(sizes) % 4], left))
        left -= sizes[-1]
    return sizes


def work(folder: Path, rank: rank_process.Rank) -> None:
    """Compute every case; rank 0 writes ``result.json``."""
    with rank_process.stdout_to(RunDir(folder).rank_log(rank.rank)):  # the user's model may print
        _compute(folder, rank)


def _compute(folder: Path, rank: rank_process.Rank) -> None:
    spec = read_json(folder / "verify.json")
    forbid_tf32("fp32")
    proof = Verification(load_config(folder / "config.yaml"), rank.device, Ranks.current())
    if spec["processes"] == 1:
        proof.choose_samples(float(spec["seconds"]))
        proof.inspect()
        cases = one_process_cases(proof, spec["planned"])
    else:
        proof.ids, proof.shorten = proof.ids[: spec["samples"]], spec["shorten"]
        cases = two_process_cases(proof)
    if rank.rank == 0:
        window = {"samples": len(proof.ids), "shorten": proof.shorten}
        write_json(folder / "result.json", {"cases": cases, "notes": proof.notes, "window": window})


def one_process_cases(proof: Verification, planned_micro_batch: int | None) -> list[dict[str, Any]]:
    """The planned split, an awkward one, and the mean of means where that is a mistake."""
    count = len(proof.ids)
    planned = planned_sizes(count, proof.config.batch.effective, planned_micro_batch)
    awkward = awkward_sizes(count)
    cases = []
    for precision in DTYPES:
        reference = proof.one_shot(DTYPES[precision])
        cases.append(_case(proof, "planned split", precision, [planned], reference))
        cases.append(_case(proof, "awkward split", precision, [awkward], reference))
        if proof.weights_differ(awkward):
            cases.append(
                _case(proof, "mutation: mean of means", precision, [awkward], reference, MeanOfMeans)
            )
    return cases


def two_process_cases(proof: Verification) -> list[dict[str, Any]]:
    """Uneven shares on two ranks, and ranks averaged where they should be added. Collective."""
    splits = [awkward_sizes(share) for share in batch.rank_shares(len(proof.ids), 2)]
    cases = []
    for precision in DTYPES:
        reference = proof.one_shot(DTYPES[precision])
        cases.append(_case(proof, "two processes", precision, splits, reference))
        cases.append(_case(proof, "mutation: ranks averaged", precision, splits, reference, RanksAveraged))
    return cases


def planned_sizes(samples: int, effective_batch: int, micro_batch: int | None) -> list[int]:
    """The planned split of the window, scaled down with it where only part of the window is computed."""
    if micro_batch is None:
        micro_batch = max(1, effective_batch // 4)
    if samples < effective_batch:
        micro_batch = max(1, round(micro_batch * samples / effective_batch))
    return batch.micro_batch_sizes(samples, min(micro_batch, samples))


def _case(
    proof: Verification,
    name: str,
    precision: str,
    splits: list[list[int]],
    reference: tuple[Tensor, dict[str, float]],
    strategy_class: type[PlainAccumulation] = PlainAccumulation,
) -> dict[str, Any]:
    wanted, whole_sums = reference
    error, distance = None, float("nan")
    mutate = strategy_class is not PlainAccumulation
    try:
        given, sums = proof.split(DTYPES[precision], splits[proof.ranks.rank], strategy_class)
        distance = relative_error(given, wanted)
    except GatrainError as problem:
        error = str(problem)
    except Exception as problem:  # such as a model that refuses a micro-batch of one sample
        error = f"{type(problem).__name__}: {problem}"
    else:
        if not mutate:
            error = _undecomposable(proof, sums, whole_sums, 1e-9 if precision == "fp64" else 1e-4)
    return {
        "name": name,
        "precision": precision,
        "processes": len(splits),
        "micro_batches": splits,
        "relative_error": distance,
        "mutation": mutate,
        "error": error,
    }


def _undecomposable(
    proof: Verification, sums: dict[str, float], whole: dict[str, float], tolerance: float
) -> str | None:
    """Say so if the micro-batches' loss sums do not add up to the whole window's."""
    totals = proof.ranks.sum([sums.get(name, 0.0) for name in whole])
    for total, (name, wanted) in zip(totals, whole.items(), strict=True):
        if abs(total - wanted) > tolerance * max(abs(wanted), 1e-30):
            return (
                f"the loss term {name!r} of the micro-batches adds up to {total:.9g}, but is {wanted:.9g} over the "
                "whole window: it depends on which samples share a micro-batch (batch statistics, in-batch "
                "negatives, or a mean over something that weight() does not count)."
            )
    return None


if __name__ == "__main__":
    rank_process.main(work)
