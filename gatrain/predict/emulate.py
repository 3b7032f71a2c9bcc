"""CPU tensors that compute as CUDA tensors would: autocast's lists and the choice of fused kernels.

A machine without a driver cannot run a backward on fake CUDA tensors, so the trace uses fake CPU tensors, and
this file gives the CPU's dispatch entries CUDA's behaviour. Changing the dispatcher (instead of a function mode)
reaches what C++ calls and what the autograd engine recomputes. It changes the whole process for good: for a child
process only.

Sources: ``aten/src/ATen/autocast_mode.h`` (lists), ``transformers/cuda/sdp_utils.cpp`` (attention), and
``native/Dropout.cpp`` (fused dropout) of PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch import library as operators
from torch.utils import _pytree as pytree

_aten = torch.ops.aten


def _names(text: str) -> list[str]:
    return text.split()


LOWER_PRECISION = _names(
    "_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution "
    "prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul "
    "linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
    "_scaled_dot_product_flash_attention scaled_dot_product_attention"
)
FP32 = _names(
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm "
    "native_layer_norm group_norm frobenius_norm nuclear_norm cosine_similarity poisson_nll_loss "
    "cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss "
    "mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss "
    "multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d "
    "_upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa"
)
FP32_RESULT = _names("prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum")
"""Asked to give fp32 with their ``dtype`` argument."""
WIDEST = _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add")

FLASH_HEAD_DIM = 256

_libraries: list[Any] = []  # registrations end with the object that made them
_casts: dict[int, tuple[Tensor, Tensor]] = {}  # a weight and its copy in low precision, while autocast lasts


def emulate_cuda() -> None:
    """Give fake CPU tensors CUDA's autocast lists, attention and dropout. Once in a process, never undone."""
    if _libraries:
        return
    library = operators.Library("aten", "IMPL")
    _libraries.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding a kernel is what is wanted here
        _register_autocast(library)
        _register(library, ["scaled_dot_product_attention.default"], "AutogradCPU", lambda op: _attention)
        _register(library, ["dropout.default"], "AutogradCPU", lambda op: _dropout)
    updates = operators.Library("aten", "IMPL", "Meta")
    _libraries.append(updates)
    for overload in ("_fused_sgd_", "_fused_sgd_.tensor_lr"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{overload}", "Meta"):
            updates.impl(overload, _nothing)
    clear = torch.clear_autocast_cache

    def clear_both() -> None:
        _casts.clear()
        clear()

    torch.clear_autocast_cache = clear_both  # autocast calls it by this name when it ends


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place, so no memory: PyTorch (2.14 and before) has no rule for it and would run it on real zeros."""


def _register_autocast(library: Any) -> None:
    wrappers: dict[str, Callable[[Any], Callable[..., Any]]] = {}
    for name in LOWER_PRECISION:
        wrappers[name] = lambda op: _casting(op, lambda leaves: torch.get_autocast_dtype("cpu"))
    for name in FP32:
        wrappers[name] = lambda op: _casting(op, lambda leaves: torch.float32)
    for name in FP32_RESULT:
        wrappers[name] = _fp32_result
    for name in WIDEST:
        wrappers[name] = lambda op: _casting(op, _widest)
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, full = qualified.partition("::")
        packet, _, overload = full.partition(".")
        if namespace != "aten":
            continue
        if packet in wrappers:
            # frobenius_norm.dim is on the list and other overloads with an out= argument are not
            if not overload.endswith("out"):
                _register(library, [f"{packet}.{overload or 'default'}"], "AutocastCPU", wrappers[packet])
        elif torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "AutocastCPU"):
            library.impl(full, operators.fallthrough_kernel, "AutocastCPU")


def _register(
    library: Any, names: Iterable[str], key: str, wrapper: Callable[[Any], Callable[..., Any]]
) -> None:
    for name in names:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(_aten, packet), overload)
        library.impl(packet if overload == "default" else name, wrapper(op), key)


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _casting(op: Any, dtype_for: Callable[[list[Any]], torch.dtype]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = dtype_for(pytree.arg_tree_leaves(*args, **kwargs))
        with _without_autocast():
            # the last argument first, as GCC has the casts in a call's argument list: it decides where they lie
            kwargs, last_first = pytree.tree_map_only(
                Tensor, lambda leaf: _cast(leaf, dtype), (kwargs, args[::-1])
            )
            return op(*last_first[::-1], **kwargs)

    return run


def _fp32_result(op: Any) -> Callable[..., Any]:
    takes_dtype = any(argument.name == "dtype" for argument in op._schema.arguments)

    def run(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            first = args[0] if args else None
            eligible = isinstance(first, Tensor) and first.dtype in (torch.bfloat16, torch.float16)
            position = next((i for i, a in enumerate(op._schema.arguments) if a.name == "dtype"), 0)
            given = kwargs.get("dtype") or (args[position] if takes_dtype and len(args) > position else None)
            if takes_dtype and eligible and given is None:
                kwargs["dtype"] = torch.float32
                args = args[:position]
            return op(*args, **kwargs)

    return run


def _widest(leaves: list[Any]) -> torch.dtype:
    if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float32 for leaf in leaves):
        return torch.float32
    return torch.get_autocast_dtype("cpu")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype in (torch.float64, dtype):
        return tensor
    is_weight = (
        tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf and not tensor._is_view()
    )
    if not (is_weight and dtype != torch.float32 and torch.is_autocast_cache_enabled()):
        return tensor.to(dtype)
    if id(tensor) not in _casts:
        _casts[id(tensor)] = tensor, tensor.to(dtype)
    return _casts[id(tensor)][1]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention for 16 bits without a mask, the memory-efficient kernel for fp32 or a mask, else the sum
    of its parts.

    On Hopper and data-centre Blackwell PyTorch prefers cuDNN's kernel, if cuDNN is newer than 9.15. It keeps as
    much for the backward (the result and one number a row); that its backward works in as much memory is an
    ASSUMPTION. For GPT-2 on an H100 (2026-11-24, torch 2.11) it makes no difference: the peak is in the loss.
    """
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    fits = query.dim() == 4 and query.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    if fits and is_half and attn_mask is None and query.shape[-1] <= FLASH_HEAD_DIM:
        flash = _aten._scaled_dot_product_flash_attention.default
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]  # type: ignore[no-any-return]
    if fits and not enable_gqa and query.dtype != torch.float64:
        if attn_mask is not None:
            bias = attn_mask.to(query.dtype) if attn_mask.dtype == torch.bool else attn_mask
            attn_mask = bias.expand(*query.shape[:-1], key.shape[-2])
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        efficient = _aten._scaled_dot_product_efficient_attention.default
        return efficient(  # type: ignore[no-any-return]
            query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
        )[0]
    return _aten._scaled_dot_product_attention_math.default(  # type: ignore[no-any-return]
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """One kernel with a mask of one byte an element; the CPU's own keeps a mask in the input's type."""
    if not train or p == 0:
        return _aten.alias.default(input)  # type: ignore[no-any-return]
    return _aten.native_dropout.default(input, p, train)[0]  # type: ignore[no-any-return]
