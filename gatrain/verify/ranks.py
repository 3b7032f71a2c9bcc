"""The rank process of `gatrain verify`: computes one window in several ways and compares the gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from gatrain import batch
from gatrain import rank as rank_process
from gatrain.compose import load_config
from gatrain.errors import GatrainError
from gatrain.rundir import RunDir, read_json, write_json
from gatrain.tasks.base import named_weights, phases_of
from gatrain.train.gradient import GradientStrategy
from gatrain.train.precision import forbid_tf32
from gatrain.train.ranks import Ranks
from gatrain.verify import limits
from gatrain.verify.looks import Verification
from gatrain.verify.mutations import ConstantStatistics, MeanOfMeans, RanksAveraged, SixteenBitSums
from gatrain.verify.paths import FP32, FP64, Path

Reference = tuple[Tensor, dict[str, float]]
"""The one-shot gradient and loss sums."""


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """L2 norm of the difference over the norm of ``wanted``; nan where either is not finite."""
    difference, norm = (given.double() - wanted.double()).norm(), wanted.double().norm()
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


def planned_sizes(samples: int, effective_batch: int, micro_batch: int | None) -> list[int]:
    """The planned split of the window, scaled down with it where only part of the window is computed."""
    if micro_batch is None:
        micro_batch = max(1, effective_batch // 4)
    if samples < effective_batch:
        micro_batch = max(1, round(micro_batch * samples / effective_batch))
    return batch.micro_batch_sizes(samples, min(micro_batch, samples))


def work(folder: FilePath, rank: rank_process.Rank) -> None:
    """Compute every case; rank 0 writes ``result.json``."""
    with rank_process.stdout_to(RunDir(folder).rank_log(rank.rank)):  # the user's model may print
        _compute(folder, rank)


def _compute(folder: FilePath, rank: rank_process.Rank) -> None:
    spec = read_json(folder / "verify.json")
    forbid_tf32("fp32")
    proof = Verification(
        load_config(folder / "config.yaml"),
        rank.device,
        Ranks.current(),
        precision=spec["precision"],
        checkpointing=spec["checkpointing"],
    )
    proof.inspect()
    if spec["processes"] == 1:
        proof.choose_samples(float(spec["seconds"]))
        cases = _of_each_phase(proof, lambda: Cases(proof).one_process(spec["planned"]))
    else:
        proof.shorten = spec["shorten"]
        proof.keep(proof.ids[: spec["samples"]])
        cases = _of_each_phase(proof, lambda: Cases(proof).two_processes())
    if rank.is_first:
        window = {"samples": len(proof.ids), "shorten": proof.shorten, "full": proof.full_window}
        write_json(folder / "result.json", {"cases": cases, "notes": proof.notes, "window": window})


def _of_each_phase(proof: Verification, cases: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a task without phases; else those of each phase, each against its own one-shot gradient."""
    found = []
    for phase in phases_of(proof.task) or ("",):
        proof.phase, prefix = phase, f"{phase}: " if phase else ""
        found += [{**case, "name": prefix + case["name"]} for case in cases()]
    return found


class Cases:
    """The rows of the report, in their order. Every rank makes them together."""

    def __init__(self, proof: Verification) -> None:
        self._proof = proof
        self._references: dict[Path, Reference] = {}
        self._own: dict[Path, Reference | None] = {}
        """By the strategy of the user's in one piece; None where it fails there."""
        self._buffers: dict[Path, Tensor] = {}
        self._rounding: float | None = None
        """Relative error of the one-shot gradient in fp32."""
        self._buffer_rounding: float | None = None
        """The same of the model's floating-point buffers after it."""
        if FP64 in proof.paths and FP32 in proof.paths:
            self._rounding = relative_error(self._one_shot(FP32)[0], self._one_shot(FP64)[0])
            self._buffer_rounding = relative_error(self._buffers[FP32], self._buffers[FP64])
            self._say_rounding(self._rounding)

    def one_process(self, planned_micro_batch: int | None) -> list[dict[str, Any]]:
        """The planned split, an awkward one, the mean of means where that is a mistake; then as it trains."""
        count = len(self._proof.ids)
        planned = planned_sizes(count, self._proof.full_window, planned_micro_batch)
        awkward = awkward_sizes(count)
        differ = self._weights_differ(awkward)
        cases = []
        for path in self._proving():
            cases += [
                self._split("planned split", path, [planned]),
                self._split("awkward split", path, [awkward]),
                *self._statistics(path, [awkward]),
            ]
            if self._proof.strategy.normalises_window:
                constant = ConstantStatistics()
                cases.append(self._split("mutation: constant statistics", path, [awkward], constant))
            elif differ:
                cases.append(self._split("mutation: mean of means", path, [awkward], MeanOfMeans()))
        if self._proof.remembers:
            cases.append(self._state_row(self._proof.remembers, planned))
        trained = self._proof.trained
        if trained is not None:
            cases += self._trained(trained, [planned if len(planned) > 1 else awkward])
        return cases

    def _state_row(self, fault: str, sizes: list[int]) -> dict[str, Any]:
        """Gradients at the first window may be equal, but not those of the next."""
        return {
            "name": "state of the model",
            "precision": self._proof.paths[0].name,
            "processes": 1,
            "micro_batches": [sizes],
            "relative_error": float("nan"),
            "tolerance": 0.0,
            "mutation": False,
            "error": fault,
        }

    def two_processes(self) -> list[dict[str, Any]]:
        """Uneven shares on two ranks, and ranks averaged where they should be added. Collective."""
        splits = [awkward_sizes(share) for share in batch.rank_shares(len(self._proof.ids), 2)]
        cases = []
        for path in self._proving():
            cases.append(self._split("two processes", path, splits))
            cases += self._statistics(path, splits)
            if self._proof.strategy.normalises_window:  # a plain one may be refused samples that are alone
                continue
            cases.append(self._split("mutation: ranks averaged", path, splits, RanksAveraged()))
        if self._proof.trained is not None and self._proof.adds_gradients:
            cases.append(self._summed("two processes, summed", self._proof.trained, splits))
        return cases

    def _statistics(self, path: Path, splits: list[list[int]]) -> list[dict[str, Any]]:
        """BatchNorm's running statistics after the split that was just computed, where they are to be exact."""
        proof = self._proof
        if not proof.strategy.normalises_window:
            return []

        def limit(error: float) -> float:
            return limits.split_limit(path.name, proof.casts, error, self._buffer_rounding)

        found, wanted = proof.buffers, self._buffers[path]
        return [self._case("running statistics", path, splits, lambda: found, wanted, limit)]

    def _say_rounding(self, rounding: float) -> None:
        if limits.is_beyond_ceiling("fp32", self._proof.casts, rounding):
            self._proof.notes.append(
                f"In fp32 the one-shot gradient itself is {rounding:.1e} away from the fp64 one, as where rounding "
                "decides on which side of a ReLU's zero a number lies. Splits in fp32 are judged by twice that; "
                "the proof is in fp64."
            )

    def _one_shot(self, path: Path) -> Reference:
        if path not in self._references:
            self._references[path] = self._proof.one_shot(path)
            self._buffers[path] = self._proof.buffers
        return self._references[path]

    def _of_strategy(self, path: Path) -> Reference:
        """What a split is compared with: the one-shot gradient, or, for a strategy of the user's that says to
        change it, its own in one piece. Collective for a strategy of the user's."""
        proof = self._proof
        if not proof.has_own_strategy:
            return self._one_shot(path)
        if path not in self._own:
            self._own[path] = self._in_one_piece(path)
        own = self._own[path]
        return own if own is not None and proof.strategy.changes_gradient else self._one_shot(path)

    def _in_one_piece(self, path: Path) -> Reference | None:
        proof = self._proof
        pieces = [[len(proof.ids)], *[[] for _ in range(proof.ranks.world_size - 1)]]
        try:
            gradient, sums = proof.split(path, pieces)
        except Exception:  # every split will say why
            return None
        totals = proof.ranks.sum([sums.get(name, 0.0) for name in proof.terms()])
        if proof.strategy.changes_gradient and not self._own:  # said once, of the finest precision
            apart = relative_error(gradient, self._one_shot(path)[0])
            proof.notes.append(
                f"{_name(proof.strategy)} gives another gradient than that of the loss, as it says "
                f"(changes_gradient), in {path.name} by {apart:.1e} of it: splits are compared with its own "
                "gradient of the window in one piece."
            )
        return gradient, dict(zip(proof.terms(), totals, strict=True))

    def _blame_strategy(self, path: Path) -> str | None:
        """Where a strategy of the user's gives another gradient than that of the loss even without a split."""
        proof, own = self._proof, self._own.get(path)
        if own is None or proof.strategy.changes_gradient:
            return None
        apart = relative_error(own[0], self._one_shot(path)[0])
        if apart <= limits.split_limit(path.name, proof.casts, apart, self._rounding):
            return None
        return (
            f"{_name(proof.strategy)} gives another gradient than that of the loss even for the window in one "
            f"piece (relative error {apart:.1e}). If that is its purpose, write changes_gradient = True in the "
            "class: then splits are compared with its own gradient of the window in one piece."
        )

    def _proving(self) -> list[Path]:
        return [path for path in self._proof.paths if path != self._proof.trained]

    def _weights_differ(self, sizes: list[int]) -> bool:
        """Whether the micro-batches of ``sizes`` weigh differently, so that their means may not be averaged."""
        (pieces,) = self._proof.pieces([sizes])
        weights = [named_weights(each.weights) for each in pieces]
        return any(weight != weights[0] for weight in weights)

    def _trained(self, path: Path, splits: list[list[int]]) -> list[dict[str, Any]]:
        """The path of training: how far its rounding moves the gradient, and that its sums lose nothing."""
        proof = self._proof
        finer = next((each for each in (FP64, FP32) if each in proof.paths), path)
        wanted, _ = self._of_strategy(finer)
        own, _ = self._of_strategy(path)
        rounding = relative_error(own, wanted) if finer != path else None
        if rounding is not None:
            proof.notes.append(
                f"In {path.name} the one-shot gradient itself is {rounding:.1e} away from the {finer.name} one: "
                "that is the rounding of the model's own arithmetic, whatever the split."
            )
        total, spread = proof.micro_sum(path, splits)

        def limit(error: float) -> float:
            return limits.trained_limit(path.name, rounding, spread)

        against = f"one shot in {finer.name}"
        name = f"trained path, {against}"
        cases = [self._case(name, path, splits, lambda: proof.split(path, splits)[0], wanted, limit)]
        if proof.adds_gradients:
            cases.append(self._summed("trained path, summed", path, splits, total))
        if proof.half_dtypes and proof.adds_gradients:
            cases.append(
                self._case(
                    "mutation: 16-bit sums",
                    path,
                    splits,
                    lambda: proof.split(path, splits, SixteenBitSums())[0],
                    total,
                    lambda error: limits.SUM,
                    mutation=True,
                )
            )
        return cases

    def _summed(
        self, name: str, path: Path, splits: list[list[int]], total: Tensor | None = None
    ) -> dict[str, Any]:
        """The training core's sum of micro-gradients against the same ones added in fp64."""
        proof = self._proof
        wanted = proof.micro_sum(path, splits)[0] if total is None else total
        noise = 0.0
        if proof.device.type == "cuda":  # kernels with atomic adds do not even repeat themselves
            noise = relative_error(proof.micro_sum(path, splits)[0], wanted)

        def limit(error: float) -> float:
            return max(limits.SUM, limits.FACTOR * noise)

        return self._case(name, path, splits, lambda: proof.split(path, splits)[0], wanted, limit)

    def _split(
        self,
        name: str,
        path: Path,
        splits: list[list[int]],
        mutation: GradientStrategy | None = None,
    ) -> dict[str, Any]:
        """The training core's gradient of a split against the one-shot gradient in the same path."""
        proof = self._proof
        wanted, whole_sums = self._one_shot(path) if mutation is not None else self._of_strategy(path)
        precision = limits.coarsest(path.name, proof.casts)
        found: dict[str, float] = {}

        def given() -> Tensor:
            gradient, sums = proof.split(path, splits, mutation)
            found.update(sums)
            return gradient

        def limit(error: float) -> float:
            return limits.split_limit(path.name, proof.casts, error, self._rounding)

        mutates = mutation is not None
        case = self._case(name, path, splits, given, wanted, limit, mutation=mutates)
        if case["error"] is None and not mutates:
            tolerance = 1e-9 if precision == "fp64" else max(1e-4, case["tolerance"])
            case["error"] = self._blame_strategy(path) or self._undecomposable(found, whole_sums, tolerance)
        if case["error"] is None and not mutates and not case["relative_error"] <= case["tolerance"]:
            case["error"] = self._likely_cause()
        return case

    def _case(
        self,
        name: str,
        path: Path,
        splits: list[list[int]],
        given: Callable[[], Tensor],
        wanted: Tensor,
        limit: Callable[[float], float],
        *,
        mutation: bool = False,
    ) -> dict[str, Any]:
        error, distance = None, float("nan")
        try:
            distance = relative_error(given(), wanted)
        except GatrainError as problem:
            error = str(problem)
        except Exception as problem:  # such as a model that refuses a micro-batch of one sample
            error = f"{type(problem).__name__}: {problem}"
        return {
            "name": name,
            "precision": path.name,
            "processes": len(splits),
            "micro_batches": splits,
            "relative_error": distance,
            "tolerance": limit(distance),
            "mutation": mutation,
            "error": error,
        }

    def _undecomposable(
        self, sums: dict[str, float], whole: dict[str, float], tolerance: float
    ) -> str | None:
        """Say so if the micro-batches' loss sums do not add up to the whole window's."""
        totals = self._proof.ranks.sum([sums.get(name, 0.0) for name in whole])
        for total, (name, wanted) in zip(totals, whole.items(), strict=True):
            if abs(total - wanted) > tolerance * max(abs(wanted), 1e-30):
                why = self._likely_cause() or (
                    "it depends on which samples share a micro-batch (batch statistics, in-batch negatives, "
                    "samples mixed with one another, or a mean over something that weight() does not count)."
                )
                return (
                    f"the loss term {name!r} of the micro-batches adds up to {total:.9g}, but is {wanted:.9g} over "
                    f"the whole window: {why}"
                )
        return None

    def _likely_cause(self) -> str | None:
        causes = list(self._proof.causes)
        if not causes and self._proof.has_own_strategy:
            name = _name(self._proof.strategy)
            causes.append(
                f"{name} computes something else for another split, as from one micro-batch's "
                "gradient where the whole window's is meant; or the loss does (gradient=plain shows which)"
            )
        return f"{'; '.join(causes)}." if causes else None


def _name(strategy: GradientStrategy) -> str:
    return f"gradient={type(strategy).__module__}.{type(strategy).__qualname__}"


if __name__ == "__main__":
    rank_process.main(work)
