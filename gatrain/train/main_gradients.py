"""16-bit parameters: fp32 gradients, fp32 sums over micro-steps and ranks, and fp32 weights for the optimizer.

A bf16 ``.grad`` stops growing once a term is below 2**-9 of the sum, and a bf16 weight ignores updates below that
part of it. So each backward's 16-bit gradient is added to an fp32 main gradient at once, and dropped.
The main gradient is the ``.grad`` of an fp32 stand-in for the parameter: whoever clips, reduces, unscales or steps
`MainGradients.trained` instead of the model's own parameters need not know of the difference. (PyTorch's own
``grad_dtype`` is no way round: with it, DistributedDataParallel and AdamW refuse the parameter.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from gatrain.errors import ExactnessError

HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""16-bit dtypes by the names that ``precision`` has for them."""


def half_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained 16-bit parameters, tied ones once; frozen ones need no gradient and are left alone."""
    return [p for p in model.parameters() if p.requires_grad and p.dtype in HALF]


def half_names(dtypes: Iterable[torch.dtype]) -> str:
    """Names of the 16-bit dtypes among these: ``bf16``, ``fp16``, ``bf16 and fp16``, or nothing."""
    return " and ".join(sorted({HALF[dtype] for dtype in dtypes if dtype in HALF}))


def gradient_bytes(model: nn.Module) -> list[int]:
    """Bytes of the gradient of each trained parameter, in fp32 at least."""
    trained = (p for p in model.parameters() if p.requires_grad)
    return [4 * p.numel() if p.dtype in HALF else p.nbytes for p in trained]


class MainGradients:
    """fp32 main gradients of a model's 16-bit parameters, until `close`.

    After each backward the 16-bit ``.grad`` has moved on: into the ``.grad`` of the stand-in, in fp32.
    As a context manager it ends with the sums rounded once into the ``.grad`` of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._stand_ins: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._hooks = []
        for parameter in half_parameters(model):
            stand_in = nn.Parameter(self._value(parameter))
            self._stand_ins[id(parameter)] = parameter, stand_in
            if parameter.grad is not None:
                _move_gradient(parameter, stand_in)

            def move(parameter: Tensor, stand_in: nn.Parameter = stand_in) -> None:
                _move_gradient(parameter, stand_in)

            self._hooks.append(parameter.register_post_accumulate_grad_hook(move))
        self.trained: list[nn.Parameter] = [self.of(p) for p in model.parameters() if p.requires_grad]
        """The model's trained parameters in their order, the stand-in in place of each 16-bit one."""

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """The stand-in of a 16-bit parameter; any other parameter is its own."""
        return self._stand_ins[id(parameter)][1] if id(parameter) in self._stand_ins else parameter

    @property
    def dtypes(self) -> str:
        """Which 16-bit dtypes there are, in words; empty if there are none."""
        return half_names(parameter.dtype for parameter, _ in self._stand_ins.values())

    @property
    def has_fp16(self) -> bool:
        """Whether gradients may vanish below fp16's range unless the loss is scaled."""
        return any(parameter.dtype == torch.float16 for parameter, _ in self._stand_ins.values())

    def close(self) -> None:
        """Leave the model's parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> MainGradients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        for parameter, stand_in in self._stand_ins.values():
            if stand_in.grad is not None:
                parameter.grad = torch.empty_like(parameter).copy_(stand_in.grad)

    def _value(self, parameter: nn.Parameter) -> Tensor:
        """Nothing but a shape: the gradients alone are of use."""
        return torch.zeros((), device=parameter.device).expand(parameter.shape)


class MasterWeights(MainGradients):
    """fp32 master weights and main gradients of a model's 16-bit parameters, for a training loop of one's own.

    .. code-block:: python

        masters = gatrain.MasterWeights(model)
        optimizer = torch.optim.AdamW(masters.parameters(), lr=3e-4)
        for micro_batches in ...:
            gatrain.accumulate(model, micro_batches, loss_sum=..., weight=..., master_weights=masters)
            torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
            optimizer.step()
            masters.copy_to_model()
            optimizer.zero_grad()

    Make it once the model is on its device and has its weights. Parameters of other dtypes are their own masters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._note_versions()

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps and what is clipped: ``.grad`` is fp32, whatever the model's own dtype."""
        return list(self.trained)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the master weights into the model's parameters: after each optimizer step."""
        for parameter, master in self._stand_ins.values():
            parameter.copy_(master)
        self._note_versions()

    @torch.no_grad()
    def take_changes(self) -> None:
        """Follow what others did to the 16-bit parameters (a clamp, loaded weights); without that nothing changes.

        Raises:
            ExactnessError: the masters were stepped and not copied: the model would never move.
        """
        if self._versions != [master._version for _, master in self._stand_ins.values()]:
            raise ExactnessError(
                "the master weights changed and the model did not. After optimizer.step() call "
                "masters.copy_to_model(), before the next window."
            )
        for parameter, master in self._stand_ins.values():
            is_same = master.to(parameter.dtype) == parameter
            master.copy_(torch.where(is_same, master, parameter.to(torch.float32)))
        self._note_versions()

    @torch.no_grad()
    def load(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Take weights from a saved state: those given, else the model's own."""
        for parameter, master in self._stand_ins.values():
            master.copy_(masters.get(parameter, parameter))
        self._note_versions()

    def weights(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Each 16-bit parameter of the model with its master."""
        yield from self._stand_ins.values()

    def _note_versions(self) -> None:
        self._versions = [master._version for _, master in self._stand_ins.values()]

    def _value(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().to(torch.float32)


def _move_gradient(parameter: Tensor, stand_in: nn.Parameter) -> None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return
    if gradient.is_sparse:  # rows that appear twice are added in fp32 as well
        gradient = gradient.to(torch.float32).to_dense()
    if stand_in.grad is None:
        stand_in.grad = gradient.to(torch.float32)
    else:
        stand_in.grad.add_(gradient)
