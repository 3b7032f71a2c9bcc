"""A pre-norm decoder-only transformer in the manner of GPT-2, small enough to read in one sitting.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (layout and
initialisation); Su et al. 2021, arXiv 2104.09864 (rotary positions); Press and Wolf 2017, arXiv 1608.05859
(tied embeddings).

Shape letters: B samples, L tokens of a sample, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatrain.errors import ConfigError, nearest

POSITIONS = ("rotary", "learned")


class GPT(nn.Module):
    """Maps int64 tokens ``[B, L]`` to logits ``[B, L, V]``; position ``t`` sees tokens ``0..t`` only.

    The output layer is the token embedding, used a second time by a plain function call, so that the state
    dict names every tensor once.

    Args:
        vocab_size: number of token ids; a multiple of 64 is fastest on a GPU.
        context: longest sequence, in tokens.
        layers: number of blocks; they are the elements of ``blocks``.
        heads: attention heads of each block; must divide ``width``.
        width: size of the residual stream.
        dropout: probability for embeddings, attention and residual branches.
        positions: ``rotary`` (no parameters) or ``learned`` (as in GPT-2).
        mlp_ratio: hidden width of the MLP, as a multiple of ``width``.
        bias: whether linear layers and norms have a bias, as GPT-2 does.

    Raises:
        ConfigError: sizes that do not go together.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        layers: int,
        heads: int,
        width: int,
        dropout: float = 0.0,
        positions: str = "rotary",
        mlp_ratio: float = 4,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(vocab_size, context, layers, heads, width, dropout, positions)
        self.vocab_size = vocab_size
        self.context = context
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context, width) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, round(mlp_ratio * width), dropout, bias) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, bias=bias)
        if positions == "rotary":
            cos, sin = rotary_tables(context, width // heads)
            # Not parameters and not saved: they follow from the sizes alone. As buffers they follow .to() and
            # .double(), so the model computes in one precision throughout.
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        else:
            self.rotary_cos = self.rotary_sin = None
        self._initialise(layers)

    rotary_cos: Tensor | None
    rotary_sin: Tensor | None

    def _initialise(self, layers: int) -> None:
        """Normal(0, 0.02) everywhere; the two branches that end in the residual stream are scaled down by
        the square root of their number, so that the stream's variance does not grow with depth (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # norms start at one and biases are zeroed below
            residual = name.endswith(("attention.out.weight", "mlp.out.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return next-token logits.

        Args:
            tokens: int64 ``[B, L]`` with ``L <= context``.
            documents: int64 ``[B, L]``, a number for each document of a row. Given, a position sees its own
                document alone, and positions count from the document's first token: each is computed as if
                it stood alone.

        Returns:
            logits ``[B, L, V]`` in the compute precision.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ConfigError(
                f"a batch holds sequences of {length} tokens, but the model was built with "
                f"context={self.context}. Use model.context={length} or more, or a smaller data.context."
            )
        mask: Tensor | None = None
        places: Tensor | slice = slice(length)
        if documents is not None:
            mask = own_document(documents)  # [B, L, L]
            places = mask.sum(2) - 1  # [B, L]: how many tokens of its document come before
            mask = mask[:, None]  # for all heads
        x = self.token_embedding(tokens)  # [B, L, D]
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[places]
        x = self.dropout(x)
        cos, sin = self.rotary_cos, self.rotary_sin
        if cos is not None and sin is not None:
            cos, sin = cos[places], sin[places]  # [L, D/H/2], or [B, L, D/H/2]
            if documents is not None:
                cos, sin = cos[:, None], sin[:, None]
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return F.linear(self.norm(x), self.token_embedding.weight)


class Block(nn.Module):
    """Attention, then MLP; each reads the normalised residual stream ``[B, L, D]`` and adds to it."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.attention = CausalAttention(width, heads, dropout, bias)
        self.mlp_norm = nn.LayerNorm(width, bias=bias)
        self.mlp = MLP(width, hidden, dropout, bias)

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class CausalAttention(nn.Module):
    """Multi-head self-attention over ``[B, L, D]``; the kernel is chosen by PyTorch."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.out_dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (part.view(heads).transpose(1, 2) for part in (q, k, v))  # [B, H, L, D/H]
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        dropout = self.dropout if self.training else 0.0
        # without a mask the fast kernels are told that it is causal, and need not read one
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(batch, length, width)
        return self.out_dropout(self.out(y))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with GPT-2's tanh form of GELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=bias)
        self.out_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.hidden(x), approximate="tanh")
        return self.out_dropout(self.out(x))  # type: ignore[no-any-return]


def own_document(documents: Tensor) -> Tensor:
    """Whether position ``t`` sees position ``s``: bool ``[B, L, L]``, true where s <= t is of the same document.

    Args:
        documents: int64 ``[B, L]``.
    """
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, :, None] == documents[:, None, :]) & causal


def rotary_tables(context: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[context, head_width / 2]`` of position times frequency, with base 10,000.

    Angles are formed in fp64 and rounded once, so late positions are as precise as early ones.
    """
    half = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    angles = torch.outer(torch.arange(context, dtype=torch.float64), 10_000.0**-half)
    dtype = torch.get_default_dtype()
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (first half, second half) of each head ``[B, H, L, D/H]`` by their position's angle.

    Under bf16 autocast the product is formed in fp32 and rounded once; in fp64 everything is fp64.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def _check_sizes(
    vocab_size: int, context: int, layers: int, heads: int, width: int, dropout: float, positions: str
) -> None:
    sizes = {"vocab_size": vocab_size, "context": context, "layers": layers, "heads": heads, "width": width}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"model.{name}={value} is below 1, the smallest value allowed.")
    if positions not in POSITIONS:
        raise ConfigError(
            f"model.positions={positions} is not one of "
            f"{', '.join(POSITIONS)}.{nearest(positions, POSITIONS)}"
        )
    if width % heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        closest = min(divisors, key=lambda n: abs(n - heads))
        raise ConfigError(
            f"model.width={width} is not divisible by model.heads={heads}. "
            f"Use model.heads={closest} or model.width={math.ceil(width / heads) * heads}."
        )
    if positions == "rotary" and (width // heads) % 2:
        raise ConfigError(
            f"rotary positions need an even head width; model.width={width} over model.heads={heads} gives "
            f"{width // heads}. Use another model.heads, or model.positions=learned."
        )
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout={dropout} is not at least 0 and below 1.")
